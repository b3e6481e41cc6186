"""How much of the cold tier each namespace may hold. Bookkeeping only; nothing here moves a block.

A namespace at its quota evicts from itself alone: its unreferenced blocks make room for its new ones, and where there
are none, new ones stay above until they leave. Bytes are of disk, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..tiers.layout import format_bytes
from .keys import owner_tag
from .states import IntArray

if TYPE_CHECKING:
    from .group import BlockGroup


class Quotas:
    """Limits by namespace, in bytes; namespaces without one share what there is."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._names = {owner_tag(name): name for name in limits}
        self._limits = {owner_tag(name): limit for name, limit in limits.items()}
        self._groups: Sequence[BlockGroup] = ()

    def watch(self, groups: Sequence[BlockGroup]) -> None:
        """The quota of a namespace is over all layer groups."""
        self._groups = groups

    def used_bytes(self, owner: int) -> int:
        """Bytes of disk that a namespace's blocks take, those on their way included."""
        total = 0
        for group in self._groups:
            d = group.directory
            total += int(((d.nvme_slot >= 0) & (d.owner == owner)).sum()) * group.cold_bytes
        return total

    def allows(self, group: BlockGroup, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each block could go down now, alone: room in its quota, or a block of its own kind to give up."""
        allowed = np.ones(len(blocks), bool)
        for owner in self._limited(group, blocks):
            if self._room(group, owner) + len(self.unreferenced(group, owner)) < 1:
                allowed[group.directory.owner[blocks] == owner] = False
        return allowed

    def admit(self, group: BlockGroup, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Those of these blocks that may go down together, and what has to be evicted for them."""
        d, admitted, evicted = group.directory, np.ones(len(blocks), bool), []
        for owner in self._limited(group, blocks):
            own, room = np.flatnonzero(d.owner[blocks] == owner), self._room(group, owner)
            victims = group.policy.victims(max(0, len(own) - room), self.unreferenced(group, owner))
            evicted.append(victims)
            admitted[own[max(0, room + len(victims)) :]] = False
        return blocks[admitted], np.concatenate(evicted) if evicted else blocks[:0]

    def unreferenced(self, group: BlockGroup, owner: int) -> IntArray:
        d = group.directory
        is_own = d.nvme_valid & (d.refs == 0) & (d.nvme_holds == 0) & (d.owner == owner)
        return group.unpinned_by_ttl(np.flatnonzero(is_own))

    def explain(self, namespace: str) -> str:
        """Why a namespace cannot store more; empty when its quota is not the reason."""
        owner = owner_tag(namespace)
        if owner not in self._limits:
            return ""
        limit, used = self._limits[owner], self.used_bytes(owner)
        smallest = min((group.cold_bytes for group in self._groups), default=0)
        if used + smallest <= limit:
            return ""
        return (
            f"namespace {namespace!r} holds {format_bytes(used)} of its {format_bytes(limit)} on nvme; raise "
            f"namespace_quotas[{namespace!r}] or forget sessions of it"
        )

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Limit and use by namespace, for status."""
        return {
            name: {"limit_bytes": self._limits[owner], "used_bytes": self.used_bytes(owner)}
            for owner, name in self._names.items()
        }

    def _limited(self, group: BlockGroup, blocks: IntArray) -> list[int]:
        if not self._limits:
            return []
        owners: list[int] = np.unique(group.directory.owner[blocks]).tolist()
        return [owner for owner in owners if owner in self._limits]

    def _room(self, group: BlockGroup, owner: int) -> int:
        """Blocks of this group that still fit; negative when the quota was lowered."""
        return (self._limits[owner] - self.used_bytes(owner)) // group.cold_bytes
