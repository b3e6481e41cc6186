"""How an answer leaves: whole, or as server-sent events with keep-alives. A client that hangs up ends its request.

Usage is always in the last chunk: in one of its own (with no choices) when stream_options.include_usage asks for it, as
OpenAI sends it, else in the chunk that ends the last output, where no client stumbles over it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from .answers import cancel_when_gone
from .errors import ApiError, of_ours
from .service import Asked, Service
from .wire import Whole, Wire

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}  # for OpenAPI


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come; `on_end` runs whatever happens, also when nothing could be sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], on_gone: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_end, self._on_gone = events, on_end, on_gone

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watching = asyncio.create_task(self._watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watching.cancel()
            self._on_end()

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._on_gone()


async def answer_whole(service: Service, request: Request, asked: Asked, wire: Wire) -> Response:
    """Wait for all outputs. Raises: ApiError."""
    outputs = [Whole() for _ in asked.answers.streams]
    watching = asyncio.create_task(cancel_when_gone(request.receive, asked.answers))
    try:
        async for delta in asked.answers.deltas():
            if delta is not None:
                outputs[delta.index].take(delta)
    except ApiError as error:
        service.metrics.answered(asked.endpoint, error.code or "error")
        raise
    finally:
        watching.cancel()
        asked.answers.cancel()
    usage = service.usage(asked)
    service.metrics.answered(asked.endpoint, "ok")
    reply = wire.reply(outputs, usage).model_dump() | {"usage": usage.to_wire()}
    found = usage.prompt_tokens_details
    split = f"device={found.device_tokens};host={found.host_tokens};nvme={found.disk_tokens}"
    return JSONResponse(reply, headers={"X-KvTier-Cached": split})


def answer_in_events(service: Service, asked: Asked, wire: Wire, has_own_usage: bool) -> Response:
    """The caller is inside the gate; the end of the stream leaves it."""

    def on_end() -> None:
        asked.answers.cancel()
        service.gate.leave()

    return EventStream(_events(service, asked, wire, has_own_usage), on_end, asked.answers.cancel)


async def _events(service: Service, asked: Asked, wire: Wire, has_own_usage: bool) -> AsyncIterator[bytes]:
    opened: set[int] = set()
    outcome = "ok"
    try:
        async for delta in asked.answers.deltas(service.settings.keep_alive_s):
            if delta is None:
                yield KEEP_ALIVE
                continue
            if delta.index not in opened:
                opened.add(delta.index)
                opening = wire.opening(delta.index)
                if opening is not None:
                    yield event(opening)
            chunk = wire.chunk(delta)
            if asked.answers.is_complete:
                usage = service.usage(asked)
                if not has_own_usage:
                    chunk["usage"] = usage.to_wire()
            yield event(chunk)
        if has_own_usage:
            yield event(wire.last(usage))
    except ApiError as error:
        outcome = error.code or "error"
        yield event(error.body())
    except Exception as error:
        outcome = "internal"
        yield event(of_ours(error).body())
    finally:
        service.metrics.answered(asked.endpoint, outcome)
    yield DONE
