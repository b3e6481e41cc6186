"""Copies below the device that a step reads slices of, held while it does: what streams and selections have in common.

Guards rule 7 (a slot is held while it is read) and rule 11 (a reader re-checks the generation of the slots it read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rules import Rule
from .states import IntArray

if TYPE_CHECKING:
    from .group import BlockGroup


class HeldBelow:
    """Of these blocks, each once, each in the host tier or on nvme; for each where. The lock is held when it is made."""

    def __init__(self, group: BlockGroup, blocks: IntArray) -> None:
        self._group, self.blocks = group, blocks
        d = group.directory
        self.in_host = d.in_host(blocks)
        self.host_slots, self.nvme_slots = d.host_slot[blocks], d.nvme_slot[blocks]
        self._hold(1)

    def has_changed(self) -> bool:
        """Whether a slot that may have been read holds something else by now."""
        changed = ~self._group.slab.intact(self.host_slots[self.in_host])
        return bool(changed.any()) and self._group.rules.holds(Rule.READER_CHECKS_GENERATION)  # rule 11

    def let_go(self) -> None:
        self._hold(-1)

    def _hold(self, count: int) -> None:
        self._group.host.holds[self.host_slots[self.in_host]] += count  # rule 7
        self._group.directory.nvme_holds[self.blocks[~self.in_host]] += count
