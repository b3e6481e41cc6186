"""Persisting: one thread that makes stored sequences durable, many per commit, while whoever stored them goes on.

A sequence that waits here keeps its references, so nothing of it can be dropped before it is written down; then it
ends and its blocks are cache that survives. The queue has a limit: a store that runs ahead of the disk waits.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future

from ..pager.pager import Pager

MAX_WAITING = 64  # sequences
STORE_TIMEOUT_S = 120.0  # of making one durable
_LOG = logging.getLogger("kvtier.engine")


class Persister:
    """Of one pager. Sequences that are added belong to it."""

    def __init__(self, pager: Pager, timeout_s: float) -> None:
        self._pager, self._timeout_s = pager, timeout_s
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, Future[None]]] = []
        self._num_added = self._num_ended = 0  # they end in the order in which they were added
        self._is_closing = False
        self._error: Exception | None = None  # of a write since the last flush
        self.num_failed = 0
        self._thread = threading.Thread(target=self._run, name="kvtier-persist", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Waiting or being written."""
        with self._changed:  # both of one moment
            return self._num_added - self._num_ended

    def add(self, seq: int) -> Future[None]:
        """Take over a sequence. The future ends when it is durable, or holds the error that says why it is not."""
        done: Future[None] = Future()
        with self._changed:
            self._changed.wait_for(lambda: self.num_open < MAX_WAITING)
            self._waiting.append((seq, done))
            self._num_added += 1
            self._changed.notify_all()
        return done

    def flush(self, timeout_s: float) -> None:
        """Wait for what was added before this call, whatever others go on adding.

        Raises: the first error since the last flush; TimeoutError when late.
        """
        with self._changed:
            last = self._num_added
            if not self._changed.wait_for(lambda: self._num_ended >= last, timeout_s):
                late = last - self._num_ended
                raise TimeoutError(f"flush: {late} stored prefixes are not durable after {timeout_s} s")
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Write what waits, then end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                batch, self._waiting = self._waiting, []
            for part in (batch,) if self._persist(batch) else ([one] for one in batch):
                self._settle(part)
                with self._changed:
                    self._num_ended += len(part)
                    self._changed.notify_all()

    def _persist(self, batch: list[tuple[int, Future[None]]]) -> bool:
        """All in one commit; False where that failed and each has to be tried alone."""
        try:
            self._pager.persist([seq for seq, _ in batch], timeout_s=self._timeout_s)
        except Exception:  # whatever it was: found out, and said, one by one
            return False
        for _, done in batch:
            done.set_result(None)
        return True

    def _settle(self, batch: list[tuple[int, Future[None]]]) -> None:
        for seq, done in batch:
            if not done.done():
                try:
                    self._pager.persist([seq], timeout_s=self._timeout_s)
                    done.set_result(None)
                except Exception as error:  # this thread's supervisor: the error goes to whoever waits or flushes
                    with self._changed:
                        self.num_failed += 1
                        self._error = self._error or error
                    _LOG.warning("event=prefix_not_durable reason=%s", getattr(error, "code", type(error).__name__))
                    done.set_exception(error)
            self._pager.finish(seq)
