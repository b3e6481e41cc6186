"""Marks: hints about blocks that the daemon may not have yet, told once it has them: `demote`, and pins for a time.

A pin is told again to a daemon that comes after the one that was told, for as long as it has left. Bounded: the oldest is
forgotten. The pager's lock is held by whoever calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..wire.messages import MARKS, PIN

if TYPE_CHECKING:
    from ..core import Core
    from .tier import RemoteTier

MAX_MARKS = 1024


@dataclass(slots=True, eq=False)
class _Mark:
    keys: list[bytes]
    hint: str
    until_s: float  # of a pin
    is_told: bool = False


class Marks:
    """Of one client pager."""

    def __init__(self, core: Core, tier: RemoteTier) -> None:
        self._core, self._tier = core, tier
        self._marks: list[_Mark] = []

    @property
    def are_heard(self) -> bool:
        return MARKS in self._tier.attachment.connection.welcome.features

    def note(self, keys: list[bytes], hint: str, ttl_s: float) -> None:
        if keys:
            until_s = self._core.clock() + ttl_s if hint == PIN else math.inf
            self._marks = [*self._marks[1 - MAX_MARKS :], _Mark(keys, hint, until_s)]

    def forget_told(self) -> None:
        """The daemon that was told is gone."""
        for mark in self._marks:
            mark.is_told = False

    def tell(self) -> None:
        """Whatever can be told now. Submits, waits for nothing."""
        if not self._marks:
            return
        now_s = self._core.clock()
        self._marks = [mark for mark in self._marks if mark.until_s > now_s]
        for mark in self._marks:
            if not mark.is_told and not self._is_on_its_way(mark.keys):
                mark.is_told = True
                ttl_ms = max(1, int(1000 * (mark.until_s - now_s))) if mark.hint == PIN else 0
                self._tier.hint(mark.keys, mark.hint, ttl_ms)
        self._marks = [mark for mark in self._marks if mark.hint == PIN or not mark.is_told]

    def _is_on_its_way(self, keys: list[bytes]) -> bool:
        """Whether the daemon will have more of these blocks than it has."""
        for group in self._core.groups:
            d = group.directory
            blocks = d.find(keys)
            blocks = blocks[blocks >= 0]
            if (d.is_valid(blocks) & ~d.nvme_valid[blocks]).any():
                return True
        return False
