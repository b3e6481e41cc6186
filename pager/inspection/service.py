"""What a running pager puts up for inspectors: the socket that answers, the snapshot page and the history beside it.

One thread answers, one publishes. Publishing takes at most a hundredth of that thread's time: fresh snapshots ten times a
second while somebody watches, every few seconds otherwise, and fewer where one takes long. Nothing of this may stop a
pager: what cannot be made is a line in the log.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...tiers.errors import KvTierError
from ..status import StatusServer, pager_status
from .history import STEP_S, HistoryFile, history_path, row_of
from .inspector import SCHEMA, Inspector
from .snapshot import SnapshotPage, page_path
from .views import sessions

if TYPE_CHECKING:
    from ..core import Core

WATCHED_STEP_S, IDLE_STEP_S = 0.1, 5.0
MAX_SHARE = 0.01  # of one core, for publishing
TOP_SESSIONS = 40
_LOG = logging.getLogger("kvtier.status")


class InspectionService:
    """Of one Core, from `start` to `close`."""

    def __init__(self, server: StatusServer, publisher: Publisher | None) -> None:
        self._server, self._publisher = server, publisher

    @classmethod
    def start(cls, path: str, core: Core) -> InspectionService | None:
        """None where the socket cannot be made."""
        server = StatusServer.start(path, lambda: _locked_status(core), Inspector(core).answer)
        if server is None:
            return None
        try:
            publisher = Publisher(core, Path(path))
        except OSError as error:
            _LOG.warning("event=no_snapshot_page reason=%s", error.strerror)
            publisher = None
        return cls(server, publisher)

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        self._server.close()


class Publisher:
    """Writes the page and the history from a thread of its own."""

    def __init__(self, core: Core, socket_path: Path) -> None:
        """Raises OSError."""
        self._core = core
        self._page = SnapshotPage(page_path(socket_path))
        self._history = HistoryFile(history_path(socket_path))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-snapshot", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2.0)
        self._page.close()
        self._history.close()

    def _run(self) -> None:
        due_s = noted_s = float("-inf")
        while True:
            now_s = time.monotonic()
            if now_s >= due_s or (self._page.is_watched(time.time()) and now_s >= due_s - IDLE_STEP_S + WATCHED_STEP_S):
                spent_s = self._publish(with_history=now_s - noted_s >= STEP_S)
                noted_s = now_s if now_s - noted_s >= STEP_S else noted_s
                due_s = now_s + max(IDLE_STEP_S, spent_s / MAX_SHARE)
                if self._stop.wait(spent_s / MAX_SHARE):
                    return
            if self._stop.wait(WATCHED_STEP_S):
                return

    def _publish(self, *, with_history: bool) -> float:
        """Returns the CPU seconds that it took this thread."""
        started_s = time.thread_time()
        try:
            told = snapshot(self._core)
            self._page.write(told, time.time())
            if with_history:
                self._history.write(row_of(told["status"], time.time()))
        except (KvTierError, OSError) as error:
            _LOG.info("event=snapshot_failed reason=%s", error)
        return time.thread_time() - started_s


def snapshot(core: Core) -> dict[str, Any]:
    """What `top` shows: the status, and the hottest and coldest sessions."""
    hottest = sessions(core, limit=TOP_SESSIONS)
    with core.lock:
        status = pager_status(core)
        status["uptime_s"] = core.clock() - core.observer.started_s
    return {"schema": SCHEMA, "status": status, "sessions": hottest["sessions"], "num_sessions": hottest["total"]}


def _locked_status(core: Core) -> dict[str, Any]:
    with core.locked():
        return pager_status(core)
