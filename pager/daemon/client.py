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

    def require_at_rest(self, index: int, slots: IntArray) -> None:
        if self.writing is not None and self.writing[0] == index and (slots == self.writing[1]).any():
            raise ProtocolError(f"slot {self.writing[1]}: its WRITE is not over")
        in_use = self.holdings[index].is_in_use(slots)
        if in_use.any():
            raise ProtocolError(f"slot {slots[in_use][0]}: its COPY is not over")
