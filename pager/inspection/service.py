"""What a running pager puts up for inspectors: the socket that answers, the snapshot page and the history beside it.

One thread answers, another publishes (publisher.py). What cannot be made is a line in the log, and the pager goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..status import StatusServer, pager_status
from .inspector import SCHEMA, Inspector
from .places import owners
from .publisher import Publisher
from .views import session_row, sorted_sessions

if TYPE_CHECKING:
    from ..core import Core

TOP_SESSIONS = 40
BLOCKS_PER_LOOK = 1 << 15  # about half a millisecond under the pager's lock
OWNER_COST = 2048  # of making a row, in blocks: some 40 us, at 20 ns a block


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
        snapshots = Snapshots()
        return cls(server, Publisher.start(Path(path), lambda: snapshots.take(core)))

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
        self._server.close()


class Snapshots:
    """What `top` shows: the status, and the hottest and coldest sessions.

    Rows of sessions are made anew a few at a time, those first that are oldest: all of them at once would be a pass over every
    block that is referred to, and a snapshot shall not cost more than a look at the levels.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()  # the oldest first
        self._core: Core | None = None

    def take(self, core: Core) -> dict[str, Any]:
        if core is not self._core:  # a daemon tells of the model that was opened last
            self._core = core
            self._rows.clear()
        with core.lock:
            self._look(core)
            status = pager_status(core)
            status["uptime_s"] = core.clock() - core.observer.started_s
        hottest = sorted_sessions(list(self._rows.values()), "device", TOP_SESSIONS)
        return {"schema": SCHEMA, "status": status, "sessions": hottest["sessions"], "num_sessions": hottest["total"]}

    def _look(self, core: Core) -> None:
        now_s = core.clock()
        there = {(owner.name, owner.namespace): owner for owner in owners(core)}
        for gone in self._rows.keys() - there.keys():
            del self._rows[gone]
        left = BLOCKS_PER_LOOK
        for who in [*(there.keys() - self._rows.keys()), *self._rows]:
            if left <= 0:
                return
            left -= OWNER_COST + sum(map(len, there[who].tables))
            self._rows[who] = session_row(core, there[who], now_s)
            self._rows.move_to_end(who)


def _locked_status(core: Core) -> dict[str, Any]:
    with core.locked():
        return pager_status(core)
