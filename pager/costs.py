"""Costs: how long it takes to have K/V back, by loading it or by computing it again, as measured in this process.

One meter for all who weigh the two: the scheduler (park a request or forget it) and admission (is cache worth a write).
Copies are metered by the pager's own counters, computing by whoever runs the model (`note_computing`). Before a copy was
measured its direction has a usual rate; before anything was computed, computing counts as endless, so that nobody forgets
K/V on a guess. Pure arithmetic: no clock, and nothing moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from .accounting import Counters

if TYPE_CHECKING:
    from .group import BlockGroup

USUAL_BYTES_PER_S = {"host_to_device": 5e9, "nvme_to_host": 1e9}  # until copies have been measured
_KEPT = 0.8  # of what was known of computing, per step


class Costs:
    """Of one pager; `groups` are told once they are there."""

    def __init__(self, counters: Counters, block_size: int) -> None:
        self.groups: SequenceOf[BlockGroup] = ()
        self._counters, self._block_size = counters, block_size
        self._tokens = self._seconds = 0.0  # of prompts computed, fading

    def note_computing(self, tokens: int, seconds: float) -> None:
        """The K/V of so many tokens were computed in so many seconds."""
        self._tokens, self._seconds = _KEPT * self._tokens + tokens, _KEPT * self._seconds + seconds

    @property
    def compute_s_per_token(self) -> float:
        """As measured lately; 0 before anything was."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def load_s(self, nbytes: float, direction: str) -> float:
        seconds = self._counters.get("move_seconds", direction=direction)
        if seconds <= 0:
            return nbytes / USUAL_BYTES_PER_S[direction]
        return nbytes * seconds / max(1.0, self._counters.get("moved_bytes", direction=direction))

    def load_cost(self, index: int, tier: str) -> float:
        """Time to load a block of that layer group from the tier below over that to compute it; inf where none is below."""
        if not self._tokens or len(self.groups) <= index:
            return math.inf
        group = self.groups[index]
        computing = self._block_size * self.compute_s_per_token / len(self.groups)
        if tier == "device" and len(group.host):
            return self.load_s(group.tier_bytes("host"), "host_to_device") / computing
        if tier == "host" and group.cold is not None:
            return self.load_s(group.cold_bytes, "nvme_to_host") / computing
        return math.inf

    def is_load_quicker(self) -> bool:
        """Whether a block of the cold tier is back on the device, in all groups, before it could be computed."""
        if not self._tokens:
            return True
        loading = sum(
            self.load_s(group.cold_bytes, "nvme_to_host") + self.load_s(group.tier_bytes("host"), "host_to_device")
            for group in self.groups
        )
        return loading < self._block_size * self.compute_s_per_token
