"""RequestRoom: how many bytes of large requests the daemon keeps, of all connections together; who finds no room waits.

Each attached tenant has an equal part, so one that fills its own (with frames that it never ends, say) is in nobody else's
way; within a part it is first come, first served. A frame that is all that its tenant keeps always has room. Runs on the loop.
"""

from __future__ import annotations

from .attached import Attachments
from .connection import Connection

MAX_BYTES = 64 << 20


class RequestRoom:
    """Of one daemon. A connection asks before it takes a large frame, and is told by `let_in` where it has to wait."""

    def __init__(self, attachments: Attachments) -> None:
        self._attachments = attachments
        self._waiting: dict[Connection, int] = {}  # bytes, in order of their coming

    def may_take(self, connection: Connection, nbytes: int) -> bool:
        """Now. If not, it is let in later."""
        tenant = self._tenant(connection)
        if self._has_room(connection, nbytes) and all(self._tenant(other) != tenant for other in self._waiting):
            return True
        self._waiting[connection] = nbytes
        return False

    def look(self) -> None:
        """Now and then: let in whoever has room now."""
        held_up = set[str | None]()
        for connection, nbytes in list(self._waiting.items()):
            tenant = self._tenant(connection)
            if tenant not in held_up and self._has_room(connection, nbytes):
                self.forget(connection)
                connection.let_in()
            else:
                held_up.add(tenant)

    def forget(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def _tenant(self, connection: Connection) -> str | None:
        attachment = self._attachments.by_connection.get(connection)
        return None if attachment is None else attachment.tenant.name

    def _has_room(self, connection: Connection, nbytes: int) -> bool:
        part, own = self._attachments.share(self._tenant(connection), MAX_BYTES)
        kept = sum(other.request_bytes + (0 if other is connection else other.buffer_bytes) for other in own)
        return not kept or kept + nbytes <= part
