"""What a running pager puts up for inspectors: the socket that answers, the snapshot page and the history beside it.

One thread answers, another publishes (publisher.py). What cannot be made is a line in the log, and the pager goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..status import StatusServer, pager_status
from .inspector import SCHEMA, Inspector
from .publisher import Publisher
from .views import sessions

if TYPE_CHECKING:
    from ..core import Core

TOP_SESSIONS = 40


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
        return cls(server, Publisher.start(Path(path), lambda: snapshot(core)))

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        self._server.close()


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
