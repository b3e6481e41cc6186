"""EngineLoop: an engine in a thread of its own, and what other threads may ask of it.

Requests go in at any time and are scheduled together; what comes out is told to a listener, on the loop's thread.
Everything else that touches the engine is a call that runs between two steps. What waits for a disk (parking, resuming,
checkpoints) runs on keeper threads, so no step waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..tiers.errors import QueueFullError, TierUnavailableError
from .engine import Engine
from .request import Request
from .sampling import Output, SamplingParams, TokenLogprob

T = TypeVar("T")
MAX_WAITING = 1024  # requests that are not active
KEEPERS = 4  # threads that wait for a disk
_LOG = logging.getLogger("kvtier.engine")


class Listener(Protocol):
    """Hears of one submission, on the loop's thread: return at once, raise nothing."""

    def on_token(self, index: int, token: int, logprob: TokenLogprob | None) -> bool:
        """The next token of output `index` (0 to n - 1). True ends that output here: a stop text was found."""
        ...

    def on_end(self, index: int, output: Output, error: BaseException | None) -> None:
        """Output `index` is complete, or ended early: see output.finish_reason."""
        ...


@dataclass(slots=True)
class Submission:
    """One request on its way through the loop, with its twins."""

    first: Request
    _loop: EngineLoop

    def cancel(self) -> None:
        """End it at the next step; its listener hears finish_reason 'cancelled'. Harmless once it has ended."""
        with suppress(TierUnavailableError):  # then the loop has ended, and with it everything that ran
            self._loop.tell(self._mark)

    def _mark(self, engine: Engine) -> None:
        for request in (self.first, *self.first.twins):
            request.is_cancelled = True


class EngineLoop:
    """Owns the engine until `close`."""

    def __init__(self, engine: Engine, *, max_waiting: int = MAX_WAITING) -> None:
        self.engine = engine
        self._max_waiting = max_waiting
        self._calls: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._gate = threading.Lock()  # no call enters the queue behind the last look at it
        self._is_closing = False
        self._failure: BaseException | None = None
        self._keeper = ThreadPoolExecutor(KEEPERS, thread_name_prefix="kvtier-keeper")
        self._thread = threading.Thread(target=self._run, name="kvtier-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ asking
    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        listener: Listener,
        *,
        namespace: str = "default",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Submission:
        """Schedule a prompt. Raises: ConfigError (too long), QueueFullError (too many wait), TierUnavailableError (closed)."""

        def make(engine: Engine) -> Request:
            return engine.request(prompt, params, namespace, priority=priority)

        return self.submit_request(make, listener, timeout_s=timeout_s)

    def submit_request(
        self, make: Callable[[Engine], Request], listener: Listener, *, timeout_s: float | None = None
    ) -> Submission:
        """Schedule what `make` returns; it runs on the loop's thread. Raises as submit does, and what `make` raises."""
        return self.start_request(make, listener, timeout_s=timeout_s).result()

    def start_request(
        self, make: Callable[[Engine], Request], listener: Listener, *, timeout_s: float | None = None
    ) -> Future[Submission]:
        """As submit_request, without waiting for the step that runs; for callers that have their own event loop."""

        def schedule(engine: Engine) -> Submission:
            self._refuse_if_full()  # before anything is made for it
            return Submission(self._schedule(make(engine), listener, timeout_s), self)

        return self.call(schedule)

    def call(self, fn: Callable[[Engine], T]) -> Future[T]:
        """Run fn(engine) between two steps. Raises TierUnavailableError when the loop has ended."""
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody wants it any more
            try:
                future.set_result(fn(engine))
            except BaseException as error:
                future.set_exception(error)

        self.tell(run)
        return future

    def tell(self, fn: Callable[[Engine], None]) -> None:
        with self._gate:
            if self._is_closing or self._failure is not None:
                raise TierUnavailableError("the engine has ended; start the server again") from self._failure
            self._calls.put(fn)
        self._wake.set()

    def keep(self, fn: Callable[[], T]) -> Future[T]:
        """Run something that waits for a disk on a keeper thread; it must touch only what nobody else touches now."""
        return self._keeper.submit(fn)

    def cancel_all(self) -> None:
        """End everything that runs or waits at the next step, as Submission.cancel does."""

        def mark(engine: Engine) -> None:
            for request in engine.scheduler.requests():
                request.is_cancelled = True

        self.tell(mark)

    @property
    def is_running(self) -> bool:
        return not self._is_closing and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """Why the loop ended by itself, if it did."""
        return self._failure

    # ------------------------------------------------------------------ ending
    def close(self, timeout_s: float = 30.0) -> None:
        """Cancel what runs, finish what the keeper does, end the thread. The engine stays open."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._keeper.shutdown(wait=True)

    # ------------------------------------------------------------------ the loop's thread
    def _refuse_if_full(self) -> None:
        waiting = len(self.engine.scheduler.waiting)
        if waiting >= self._max_waiting:
            raise QueueFullError(f"{waiting} requests wait already; try again later", retry_after_s=1.0)

    def _schedule(self, request: Request, listener: Listener, timeout_s: float | None) -> Request:
        scheduler = self.engine.scheduler
        if timeout_s is not None:
            request.deadline_s = scheduler.clock() + timeout_s
        for index, one in enumerate((request, *request.twins)):
            one.on_token, one.on_end = _teller(listener, index), _ender(listener, index)
        scheduler.add(request)
        return request

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._answer_calls()
                if any(self.engine.scheduler.requests()):
                    self._step()
                else:
                    self._wake.wait()
                    self._wake.clear()
        except BaseException as error:  # nothing may die unheard: whoever waits is told
            self._failure = error
            _LOG.exception("event=engine_failed")
        with self._gate:
            self._is_closing = True
        self._answer_calls()  # some of them schedule requests, whose listeners have to hear of their end
        self._end_all(self._failure)

    def _step(self) -> None:
        """A step that fails ends the requests that it may have been about, and no others."""
        try:
            self.engine.step()
        except Exception as error:
            _LOG.exception("event=step_failed")
            for request in list(self.engine.scheduler.active):
                request.end("error", error)
            self.engine.settle_ended()

    def _end_all(self, error: BaseException | None) -> None:
        for request in self.engine.scheduler.requests():
            if not request.is_done:
                request.end("cancelled" if error is None else "error", error)
        try:
            self.engine.settle_ended()
        except Exception:
            _LOG.exception("event=engine_end_failed")

    def _answer_calls(self) -> None:
        """Those that are there now: who calls again as soon as he is answered waits for a step."""
        for _ in range(self._calls.qsize()):
            self._calls.get_nowait()(self.engine)


def _teller(listener: Listener, index: int) -> Callable[[Request, int], None]:
    def tell(request: Request, token: int) -> None:
        known = request.output.logprobs  # none of beams: their tokens are told when the search is over
        logprob = known[-1] if known else None
        if listener.on_token(index, token, logprob):
            request.stop()

    return tell


def _ender(listener: Listener, index: int) -> Callable[[Request], None]:
    def tell(request: Request) -> None:
        listener.on_end(index, request.output, request.error)

    return tell
