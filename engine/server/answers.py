"""From the engine's thread to asyncio: the outputs of one HTTP request as they grow.

A Listener's calls become pieces in a queue of the event loop; what an HTTP handler does is iterate. Nothing here blocks
the engine, and nothing that goes wrong here may stop it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...tiers.errors import Busy, QueueFullError, TierFullError
from ..loop import Submission
from ..sampling import Output, TokenLogprob
from .errors import ApiError, bad, of_ours
from .text import LoggedToken, Piece, TextStream

_LOG = logging.getLogger("kvtier.server")
_ENDS = ("stop", "length")
_RUNNING = {"prefill", "decode"}  # lines of a ledger that say that the request was in a step


@dataclass(frozen=True, slots=True)
class Delta:
    """What output `index` has more to show; its last one says why it ended."""

    index: int
    text: str = ""
    logged: tuple[LoggedToken, ...] = ()
    finish_reason: str | None = None


@dataclass(slots=True)
class Ended:
    """One complete output, and when its first and last tokens came (seconds of the monotonic clock)."""

    index: int
    output: Output
    error: BaseException | None
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(slots=True)
class Answers:
    """All outputs of a request: len(prompts) x n, in order. Iterate `deltas` once."""

    streams: Sequence[TextStream]
    ends: dict[int, Ended] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _queue: asyncio.Queue[Delta | Ended] = field(default_factory=asyncio.Queue)
    _starting: list[Future[Submission]] = field(default_factory=list)
    _is_cancelled: bool = False

    def listener(self, first: int) -> _OnLoop:
        """Hears of a submission whose outputs are first, first + 1, ..."""
        return _OnLoop(self, first)

    def add(self, starting: Future[Submission]) -> None:
        """A submission under way; it is cancelled with the others, also when it begins later."""
        self._starting.append(starting)
        if self._is_cancelled:
            starting.add_done_callback(_cancel)

    def begun(self) -> list[Submission]:
        """Those that the scheduler has taken."""
        return [one.result() for one in self._starting if one.done() and not one.cancelled() and not one.exception()]

    def cancel(self) -> None:
        """Nobody waits for these any more. Harmless when they have ended."""
        if not self._is_cancelled:
            self._is_cancelled = True
            for starting in self._starting:
                starting.add_done_callback(_cancel)

    @property
    def is_complete(self) -> bool:
        return len(self.ends) == len(self.streams)

    async def deltas(self, silence_s: float | None = None) -> AsyncIterator[Delta | None]:
        """Pieces as they come, until all outputs are complete; None after so much silence. Raises: ApiError."""
        while not self.is_complete:
            try:
                async with asyncio.timeout(silence_s):
                    item = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Ended):
                self.ends[item.index] = item
                failed = _failure(item)
                if failed is not None:
                    raise failed
                rest = self.streams[item.index].finish()
                yield Delta(item.index, rest.text, rest.logged, item.output.finish_reason)
            else:
                yield item

    def put(self, item: Delta | Ended) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            pass  # the event loop has ended: nobody listens any more


class _OnLoop:
    """The Listener; its methods run on the engine's thread."""

    def __init__(self, answers: Answers, first: int) -> None:
        self._answers, self._first = answers, first
        self._times: dict[int, tuple[float, float]] = {}
        self._failed: dict[int, Exception] = {}

    def on_token(self, index: int, token: int, logprob: TokenLogprob | None) -> bool:
        now_s = time.monotonic()
        self._times[index] = self._times.get(index, (now_s, now_s))[0], now_s
        stream = self._answers.streams[self._first + index]
        try:
            piece = stream.push(token, logprob)
        except Exception as error:  # a tokenizer that fails must not take the engine's step with it
            self._failed[index] = error
            return True
        if piece != Piece():
            self._answers.put(Delta(self._first + index, piece.text, piece.logged))
        return stream.is_stopped

    def on_end(self, index: int, output: Output, error: BaseException | None) -> None:
        first_s, last_s = self._times.get(index, (0.0, 0.0))
        failed = error or self._failed.get(index)
        self._answers.put(Ended(self._first + index, output, failed, first_s, last_s))


def _cancel(starting: Future[Submission]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        try:
            starting.result().cancel()
        except Exception as error:
            _LOG.info("event=not_cancelled reason=%s", error)  # the engine has ended, and its requests with it


def _failure(ended: Ended) -> ApiError | None:
    error, reason = ended.error, ended.output.finish_reason
    if isinstance(error, Busy) and not isinstance(error, (QueueFullError, TierFullError)):
        return ApiError(503, f"{error}; try again", code=error.code, retry_after_s=error.retry_after_s)  # a slow tier
    if error is not None:
        return of_ours(error)
    if reason in _ENDS:
        return None
    if reason == "deadline":
        if _RUNNING.isdisjoint(ended.output.ledger):
            message = "the request's turn did not come in its time or the server's; try again when there is less to do"
            return ApiError(503, message, code="deadline", retry_after_s=1.0)
        message = "the request took longer than its time or the server's; ask for fewer tokens, or shorten the prompt"
        return bad(message, code="deadline")
    return ApiError(503, "the server is ending; send the request again", code="cancelled", retry_after_s=5.0)


async def cancel_when_gone(receive: Any, answers: Answers) -> None:
    """Cancel as soon as the client has hung up. Ends only then."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answers.cancel()
