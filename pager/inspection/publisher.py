"""Publishing: a thread that writes the snapshot page and the history beside a socket.

It takes at most a four-hundredth of a core: fresh snapshots four times a second while somebody watches, every few seconds
otherwise, and fewer where one takes long. To wake beside a busy thread costs a third of a millisecond, so it seldom does.
It never stops what it tells of, and imports neither numpy nor the pager.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...tiers.errors import KvTierError
from .history import STEP_S, HistoryFile, history_path, row_of
from .snapshot import SnapshotPage, page_path

WATCHED_STEP_S, IDLE_STEP_S = 0.25, 5.0
MAX_SHARE = 0.0025  # of one core, for publishing: a daemon at work may use a third of a core, and shall not slow by 1 %
CLOSE_S = 2.0  # for the thread, whose last look may wait for the pager's lock
_LOG = logging.getLogger("kvtier.status")


class Publisher:
    """Writes the page and the history from a thread of its own. `tell` gives what to publish, or None for nothing now."""

    def __init__(self, socket_path: Path, tell: Callable[[], dict[str, Any] | None]) -> None:
        """Raises OSError."""
        self._tell = tell
        self._page = SnapshotPage(page_path(socket_path))
        self._history = HistoryFile(history_path(socket_path))
        self._noted_s = float("-inf")  # when the history last got a row
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-snapshot", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, socket_path: Path, tell: Callable[[], dict[str, Any] | None]) -> Publisher | None:
        """None, with a notice, where the files cannot be made: being looked at is not worth failing for."""
        try:
            return cls(socket_path, tell)
        except OSError as error:
            _LOG.warning("event=no_snapshot_page reason=%s", error.strerror)
            return None

    def close(self) -> None:
        """Returns also while the thread is held up: what it writes to is closed by itself."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        self._page.remove()

    def _run(self) -> None:
        try:
            self._publish_until_stopped()
        finally:
            self._page.unmap()
            self._history.close()

    def _publish_until_stopped(self) -> None:
        due_s = float("-inf")
        while True:
            now_s = time.monotonic()
            if now_s >= due_s or (self._page.is_watched(time.time()) and now_s >= due_s - IDLE_STEP_S + WATCHED_STEP_S):
                spent_s = self._publish(now_s)
                due_s = now_s + max(IDLE_STEP_S, spent_s / MAX_SHARE)
                if self._stop.wait(spent_s / MAX_SHARE):
                    return
            if self._stop.wait(WATCHED_STEP_S):
                return

    def _publish(self, now_s: float) -> float:
        """Returns the CPU seconds that it took this thread. Readers are told when the next one comes at the latest."""
        started_s = time.thread_time()
        try:
            told = self._tell()
            if told is None:
                return 0.0
            next_s = max(
                IDLE_STEP_S, 2.0 * (time.thread_time() - started_s) / MAX_SHARE
            )  # to write it costs less again
            self._page.write(told | {"next_s": next_s}, time.time())
            if now_s - self._noted_s >= STEP_S:
                self._history.write(row_of(told["status"], time.time()))
                self._noted_s = now_s
        except (KvTierError, OSError) as error:
            _LOG.info("event=snapshot_failed reason=%s", error)
        return time.thread_time() - started_s
