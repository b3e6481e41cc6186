"""Errors on the wire: OpenAI's body, a status that says who should act, and a message that says what to do.

400 the request is wrong, or asks for more than there is time for   401 no or a wrong key   404 unknown model, session, pin
409 the session is at work   413 body too large   429 too many at a time, again later   503 no room, too slow, or ending
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import BaseRoute, Match

from ...tiers.errors import Busy, ConfigError, KvTierError, QueueFullError, TierFullError, UnknownSessionError

_LOG = logging.getLogger("kvtier.server")
_TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer that is an error. `param` names the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = dict(headers or {})
        if retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        super().__init__(status, message, headers or None)
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """The request is wrong; the message says how to mend it."""
    return ApiError(400, message, param=param, code=code)


def of_ours(error: BaseException) -> ApiError:
    """What an error of the engine means to a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownSessionError):
        return ApiError(404, f"{error}; list sessions with GET /v1/sessions", code=error.code)
    if isinstance(error, ConfigError):
        return bad(str(error), code=error.code)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code=error.code, retry_after_s=error.retry_after_s)
    if isinstance(error, TierFullError):
        message = f"{error}; try again when other requests have ended, or shorten the prompt"
        return ApiError(503, message, code=error.code, retry_after_s=max(1.0, error.retry_after_s))
    if isinstance(error, Busy):
        return ApiError(409, str(error), code=error.code, retry_after_s=error.retry_after_s)
    if isinstance(error, KvTierError):
        return ApiError(503, str(error), code=error.code, retry_after_s=5.0)
    _LOG.error("event=request_failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Every error leaves in the same body. `routes` are all that there are."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(KvTierError)
    async def engines(request: Request, error: KvTierError) -> Response:
        return of_ours(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path}; GET /openapi.json lists what there is"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}; GET /openapi.json lists what there is"
            return ApiError(405, message, headers={"Allow": ", ".join(sorted(_methods(request, routes)))}).response()
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return of_ours(error).response()


def _methods(request: Request, routes: Sequence[BaseRoute]) -> set[str]:
    """What this path does take."""
    matching = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong, by the name of its field; never the value, which may be somebody's text."""
    found: list[dict[str, Any]] = list(error.errors())
    first: dict[str, Any] = (
        max(found, key=lambda one: len(one["loc"])) if found else {"loc": (), "msg": "it is not valid", "type": ""}
    )
    if first["type"] == "json_invalid":
        return bad(
            f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json"
        )
    names = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    param = ".".join(names) or None
    if param is None:
        return bad(f"the body must be a JSON object, sent with Content-Type: application/json ({first['msg']})")
    return bad(f"{param}: {_plain(first['msg'])}", param)


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
