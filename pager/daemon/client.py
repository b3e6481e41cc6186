"""Client: what one attached process holds of one store."""

from __future__ import annotations

from ...tiers.errors import ProtocolError
from ..states import IntArray
from .holdings import Holdings
from .reading import LeaseRequest
from .tenants import Tenant


class Client:
    """Leases and reservations by layer group, requests under way, sessions that it has taken."""

    def __init__(self, tenant: Tenant, holdings: list[Holdings]) -> None:
        self.tenant, self.holdings = tenant, holdings
        self.requests: list[LeaseRequest] = []
        self.sessions: set[str] = set()  # those that it has taken
        self.writing: tuple[int, int] | None = None  # group and slot that a payload is on its way into
        self.holds_apart = False  # version 1: a COMMIT holds nothing, HOLD comes behind it
        self._is_gone = False

    def take(self, session: str) -> None:
        """Nobody else may have it. On any thread: a request may outlive its socket."""
        self.sessions.add(session)
        if self._is_gone:
            self.sessions.discard(session)

    def gone(self) -> None:
        """Its socket ended: its sessions are nobody's, and nothing is on its way."""
        self._is_gone, self.writing = True, None
        self.sessions.clear()

    def require_at_rest(self, index: int, slots: IntArray) -> None:
        if self.writing is not None and self.writing[0] == index and (slots == self.writing[1]).any():
            raise ProtocolError(f"slot {self.writing[1]}: its WRITE is not over")
        in_use = self.holdings[index].is_in_use(slots)
        if in_use.any():
            raise ProtocolError(f"slot {slots[in_use][0]}: its COPY is not over")
