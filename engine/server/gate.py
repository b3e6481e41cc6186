"""Who may come in: a body no larger than allowed, with a known key; so many requests at a time; nobody while ending."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from .errors import ApiError
from .settings import DEFAULT_NAMESPACE, ServerSettings

OPEN_PATHS = {"/health", "/ready"}  # for probes, which have no key
_WHILE_DRAINING = OPEN_PATHS | {"/metrics"}
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the HTTP request being answered
_LINGER_BYTES, _LINGER_S = 64 << 20, 5.0  # of a body that is too large, read so that the client sees the answer


class ApiKeys:
    """Keys by the hash that they are compared by: in constant time, all of them every time."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._secret = secrets.token_bytes(32)
        self._namespaces = [(self._hash(key.encode()), namespace) for key, namespace in keys.items()]

    def namespace(self, authorization: bytes) -> str:
        """The namespace of an Authorization header. Raises: ApiError."""
        if not self._namespaces:
            return DEFAULT_NAMESPACE
        scheme, _, key = authorization.partition(b" ")
        hashed, found = self._hash(key.strip()), None
        for known, namespace in self._namespaces:
            if hmac.compare_digest(known, hashed):
                found = namespace
        if scheme.lower() != b"bearer" or found is None:
            raise ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY' with a key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._secret).digest()


class Guard:
    """ASGI middleware: the namespace of the key goes to scope["state"], a body that is too large goes nowhere."""

    def __init__(self, app: Any, settings: ServerSettings, gate: Gate) -> None:
        self._app, self._limit, self._keys = app, settings.max_request_bytes, ApiKeys(settings.api_keys)
        self._gate = gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                scope["state"]["namespace"] = self._keys.namespace(headers.get(b"authorization", b""))
            if scope["path"] not in _WHILE_DRAINING:
                self._gate.check_open()
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._limit:
                await _read_away(receive)
                raise self._too_large()
        except ApiError as error:
            await error.response()(scope, receive, answer)
            return
        await self._app(scope, self._limited(receive), answer)

    def _limited(self, receive: Any) -> Any:
        total = 0

        async def limited() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._limit:
                await _read_away(receive)
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._limit} bytes; send a shorter prompt, or start the server with a larger "
            "--max-request-bytes",
            code="request_too_large",
        )


async def _read_away(receive: Any) -> None:
    total, until_s = 0, time.monotonic() + _LINGER_S
    while total < _LINGER_BYTES and time.monotonic() < until_s:
        message = await receive()
        total += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


class Gate:
    """Counts requests at work. Of one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.num_inside = 0
        self.is_draining = False

    def check_open(self) -> None:
        """Raises: ApiError."""
        if self.is_draining:
            raise ApiError(503, "the server is ending; send the request again", code="draining", retry_after_s=5.0)

    def enter(self) -> None:
        """Raises: ApiError; otherwise `leave` when done."""
        self.check_open()
        if self.num_inside >= self._limit:
            raise ApiError(
                429,
                f"{self.num_inside} requests are at work, as many as this server takes; try again soon",
                code="too_many_requests",
                retry_after_s=1.0,
            )
        self.num_inside += 1

    def leave(self) -> None:
        self.num_inside -= 1
