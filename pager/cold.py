"""The cold side of one layer group: which of its blocks are on nvme, and every copy to, from and within that tier.

What fails here is never fatal: a block that cannot be written stays above, one that cannot be read is a miss, and a
disk that refuses everything is left alone for a while, said so, and tried again.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..tiers.errors import KvTierError
from ..tiers.nvme.manifest import STAMP
from .quota import Quotas
from .states import NOWHERE, SEVERAL, IntArray

if TYPE_CHECKING:
    from ..tiers.nvme.store import NvmeTier
    from .below import LowerTier
    from .group import BlockGroup, Move

MAX_WRITE_ERRORS = 3  # in a row; then the tier takes no writes for a while and the pager goes on without it
RETRY_S = 30.0
_LOG = logging.getLogger("kvtier.pager")


class ColdSide:
    """Blocks of one group on nvme. The group's lock is held by whoever calls."""

    def __init__(self, group: BlockGroup, tier: LowerTier, quotas: Quotas) -> None:
        self.group, self.tier, self.quotas = group, tier, quotas
        self.index = group.index
        self.ring: NvmeTier | None = cast("NvmeTier", tier) if tier.is_ring else None  # with segments to keep clean
        self.fmt = self.ring.format(self.index) if self.ring is not None else None  # where it keeps fewer bits
        self._errors_in_row = 0
        self._paused_until_s = float("-inf")
        self._left: list[tuple[int, int]] = []  # blocks and the slots that they were moved out of

    # ------------------------------------------------------------------ room
    @property
    def takes_writes(self) -> bool:
        return self.group.clock() >= self._paused_until_s and self.tier.takes_writes

    @property
    def block_bytes(self) -> int:
        """Of disk, for one block."""
        return self.ring.usual_bytes(self.index) if self.ring is not None else self.group.layout.block_bytes

    @property
    def is_lossy(self) -> bool:
        """Whether whole blocks are kept in fewer bits."""
        return self.fmt is not None

    def stored_bytes(self, blocks: IntArray) -> npt.NDArray[np.int64]:
        """Of copies here, as the manifest lists them."""
        stamps = self.tier.stamps(self.index, self.group.directory.nvme_slot[blocks])
        return stamps["stored_bytes"].astype(np.int64)

    def room(self, asker: int | None = None, reason: str = "") -> int:
        """Slots that could be had now for that namespace: free ones, and those of blocks that nobody refers to."""
        return max(0, self._free_slots() + len(self._may_leave(asker, reason)))

    def _free_slots(self) -> int:
        """Where slots are counted as what a packed block takes, one in full precision takes the room of several."""
        free = self.tier.free_slots(self.index)
        if self.ring is None or not self.is_lossy:
            return free
        d = self.group.directory
        below = np.flatnonzero(d.nvme_slot >= 0)
        whole = int((self.stored_bytes(below) > self.group.layout.block_bytes).sum())
        more = self.ring.geometry(self.index).stride / self.block_bytes - 1
        return free - math.ceil(whole * more)

    def is_near(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether the copies below lie in memory, of whoever keeps them."""
        d = self.group.directory
        return d.nvme_valid[blocks] & self.tier.is_near(self.index, np.maximum(d.nvme_slot[blocks], 0))

    def may_sink(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each block's namespace still has room below."""
        return self.quotas.allows(self.group, blocks)

    def admit(self, blocks: IntArray) -> IntArray:
        """Those of these blocks that their namespaces' quotas let in, after evicting for them what the quotas say."""
        admitted, victims = self.quotas.admit(self.group, blocks)
        if len(admitted) < len(blocks):
            self.group.note("refused", "nvme", np.setdiff1d(blocks, admitted), "quota")
        if len(victims):
            self.drop_copies(victims, "quota")
        return admitted

    def _may_leave(self, asker: int | None, reason: str) -> IntArray:
        """For write-back none that the host holds too: that copy would have to go down next, and so on for ever."""
        d = self.group.directory
        blocks = self.group.unpinned_by_ttl(np.flatnonzero(d.nvme_valid & (d.refs == 0) & (d.nvme_holds == 0)))
        if reason == "writeback":
            blocks = blocks[d.host_slot[blocks] == NOWHERE]
        return self.quotas.spare(self.group, "nvme", blocks, asker)

    def _victims(self, n: int, asker: int | None, reason: str) -> IntArray:
        return self.group.policy.of("nvme").victims(n, self._may_leave(asker, reason))

    def _take_slots(self, n: int, asker: int | None, reason: str) -> IntArray | None:
        short = n - self._free_slots()
        if short > 0:
            victims = self._victims(short, asker, reason)
            if len(victims) < short:
                return None
            self.drop_copies(victims, "pressure")
        try:
            return self.tier.allocate(self.index, n)
        except KvTierError:
            return None

    # ------------------------------------------------------------------ leaving
    def leave(self, blocks: IntArray) -> None:
        """Give the slots of these blocks back; for blocks that end, or whose copy is stale."""
        d = self.group.directory
        stored = blocks[d.nvme_slot[blocks] >= 0]
        if len(stored):
            self.tier.free(self.index, d.nvme_slot[stored])
            d.nvme_slot[stored] = NOWHERE
            d.nvme_valid[stored] = False
            self.group.policy.left("nvme", stored, evicted=False)

    def drop_copies(self, blocks: IntArray, reason: str) -> None:
        """Evict: the copies on nvme go, and with them blocks that no other tier holds."""
        self.group.policy.left("nvme", blocks)
        self.leave(blocks)
        self.group.count_eviction("nvme", blocks, reason)
        self.group.dirty_if_alone(blocks)
        self.group.forget_lost(blocks, "nvme")

    def lose_copies(self, blocks: IntArray) -> None:
        """A checksum, key or generation did not match: the copy is gone, counted, and never served."""
        group, d = self.group, self.group.directory
        group.counters.add(self.tier.loss_counter, len(blocks), tier="nvme")
        is_corrupt = self.tier.loss_counter == "corrupt_blocks"
        group.note("corrupt" if is_corrupt else "failed", "nvme", blocks, self.tier.loss_counter)
        self.tier.quarantine(self.index, d.nvme_slot[blocks])
        d.nvme_slot[blocks] = NOWHERE
        d.nvme_valid[blocks] = False
        group.policy.left("nvme", blocks, evicted=False)
        group.dirty_if_alone(blocks)
        group.unname_lost(blocks)

    # ------------------------------------------------------------------ moves: submit
    def read(self, blocks: IntArray, host_slots: IntArray, reason: str) -> None:
        """Nvme -> host, into free host slots, as many as the blocks take; checked against what the manifest says."""
        group, d = self.group, self.group.directory
        source = d.nvme_slot[blocks]
        host_slots = group.forms.stage(blocks, host_slots, below=True)
        d.host_slot[blocks] = host_slots
        group.policy.entered("host", blocks)
        group.host.writer[host_slots] = d.owner[blocks]
        d.nvme_holds[blocks] += 1
        d.nvme_hit[blocks] = True
        target, stamps = group.forms.for_disk(host_slots), self.tier.stamps(self.index, source)
        ticket = self.tier.read(self.index, source, target, host_slots, stamps)
        group.submit("nvme_to_host", blocks, source, host_slots, ticket.event, reason, ticket)

    def write(self, blocks: IntArray, reason: str) -> int:
        """Host -> nvme for blocks VALID in the host tier, of one namespace where there are quotas.

        Returns how many were submitted (0: no room below).
        """
        group, d = self.group, self.group.directory
        targets = self._take_slots(len(blocks), int(d.owner[blocks[0]]), reason)
        if targets is None:
            return 0
        self.quotas.wrote(group, blocks)
        group.admission.wrote(len(blocks) * self.block_bytes)
        slots = d.host_slot[blocks]
        group.host.holds[slots] += 1  # rule 7
        d.nvme_slot[blocks] = targets
        group.policy.entered("nvme", blocks)
        d.nvme_holds[blocks] += 1
        d.nvme_hit[blocks] = False
        stamps, parents = self._stamps_for(blocks)
        ticket = self.tier.write(self.index, targets, group.forms.for_disk(slots), slots, stamps, parents)
        group.submit("host_to_nvme", blocks, slots, targets, ticket.event, reason, ticket)
        return len(blocks)

    def relocate(self, blocks: IntArray, targets: IntArray) -> None:
        """Nvme -> nvme: out of a segment that shall become clean."""
        group, d = self.group, self.group.directory
        source = d.nvme_slot[blocks]
        d.nvme_holds[blocks] += 1
        assert self.ring is not None
        ticket = self.ring.relocate(self.index, source, targets)
        group.submit("nvme_to_nvme", blocks, source, targets, ticket.event, "reclaim", ticket)

    def _stamps_for(self, blocks: IntArray) -> tuple[npt.NDArray[Any], list[bytes]]:
        d = self.group.directory
        stamps = np.zeros(len(blocks), STAMP)
        stamps["owner"] = d.owner[blocks]
        parents = []
        for i, block in enumerate(blocks.tolist()):
            key = d.key[block]
            stamps[i]["key"] = key if key is not None else _private_key(block, int(d.version[block]))
            stamps[i]["tokens"] = d.tokens[block] if key is not None else 0  # 0: means nothing after a restart
            parents.append(d.parent[block] or b"")
        return stamps, parents

    # ------------------------------------------------------------------ moves: completion
    def finish_read(self, move: Move, failed: bool) -> None:
        assert move.ticket is not None
        group, d = self.group, self.group.directory
        d.nvme_holds[move.blocks] -= 1
        good = move.ticket.ok & (not failed)
        group.host.publish(move.target[good])
        self._drop_half_read(move.target[~good])
        bad = move.blocks[~good]
        d.host_slot[bad] = NOWHERE
        group.policy.left("host", bad, evicted=False)
        if len(bad):
            self.lose_copies(bad)

    def _drop_half_read(self, slots: IntArray) -> None:
        """What was in these slots before may be there still."""
        self.group.host.drop(slots)
        self.group.host.writer[slots] = SEVERAL

    def finish_write(self, move: Move, failed: bool) -> None:
        assert move.ticket is not None
        group, d = self.group, self.group.directory
        group.host.holds[move.source] -= 1
        d.nvme_holds[move.blocks] -= 1
        current = d.version[move.blocks] == move.versions
        written = move.ticket.ok & (not failed)
        good = written & current
        d.nvme_valid[move.blocks[good]] = True
        bad = ~good
        if bad.any():
            self.tier.free(self.index, move.target[bad])
            d.nvme_slot[move.blocks[bad]] = NOWHERE
            group.policy.left("nvme", move.blocks[bad], evicted=False)
        self._note_writes(written)
        self._drop_stale(move)

    def _drop_stale(self, move: Move) -> None:
        """Blocks that were appended to while their older copy was read: it could not go then, it goes now."""
        group, d = self.group, self.group.directory
        stale = move.blocks[d.version[move.blocks] != move.versions]
        for block in stale[d.in_host(stale)].tolist():
            if group.host.holds[d.host_slot[block]] == 0:
                group.leave_host(np.array([block]))

    def finish_relocate(self, move: Move, failed: bool) -> None:
        """The block is at its new place; the old one is given back once nobody reads there."""
        assert move.ticket is not None
        d = self.group.directory
        d.nvme_holds[move.blocks] -= 1
        is_there = d.nvme_slot[move.blocks] == move.source  # else its copy was dropped meanwhile
        moved = move.ticket.ok & is_there & (not failed)
        d.nvme_slot[move.blocks[moved]] = move.target[moved]
        d.nvme_hit[move.blocks[moved]] = False
        self.tier.free(self.index, move.target[~moved])
        self._left += zip(move.blocks[moved].tolist(), move.source[moved].tolist(), strict=True)
        self.give_back_left()
        lost = move.ticket.unreadable & is_there & (not failed)
        unread = move.blocks[lost & (d.nvme_holds[move.blocks] == 0)]  # who reads one of the others finds out by itself
        if len(unread):
            self.lose_copies(unread)
        tried = is_there & ~lost
        if tried.any():
            self._note_writes(moved[tried])

    def give_back_left(self) -> None:
        """Free the slots that blocks were moved out of, but for those that a reader still has."""
        d = self.group.directory
        read = [(block, slot) for block, slot in self._left if d.nvme_holds[block] > 0]
        gone = [slot for block, slot in self._left if d.nvme_holds[block] == 0]
        self._left = read
        if gone:
            self.tier.free(self.index, np.array(gone))

    def abandon(self, move: Move) -> None:
        """The mover is gone, its copy has ended one way or the other."""
        d = self.group.directory
        if move.kind == "nvme_to_nvme":
            self.finish_relocate(move, failed=False)
        elif move.kind == "nvme_to_host":
            d.nvme_holds[move.blocks] -= 1
            self._drop_half_read(move.target)
            d.host_slot[move.blocks] = NOWHERE
        else:
            self.group.host.holds[move.source] -= 1
            d.nvme_holds[move.blocks] -= 1
            d.nvme_slot[move.blocks] = NOWHERE
            self.tier.free(self.index, move.target)
            self._drop_stale(move)

    def _note_writes(self, written: npt.NDArray[np.bool_]) -> None:
        """Several calls in a row of which nothing went down: leave the disk alone for a while, and say so."""
        if written.any():
            self._errors_in_row = 0
            return
        self._errors_in_row += 1
        self.group.counters.add("nvme_write_errors", 1)
        if self._errors_in_row >= MAX_WRITE_ERRORS:
            self._errors_in_row = 0
            self._paused_until_s = self.group.clock() + RETRY_S
            _LOG.warning(
                "nvme tier takes no writes (%s); going on without it, next try in %d s",
                self.tier.last_write_error or "unknown error",
                RETRY_S,
            )


def _private_key(block: int, version: int) -> bytes:
    """A name for an unnamed block while it is on disk; tokens=0 in its stamp tells that it means nothing later."""
    return b"private" + block.to_bytes(12, "little") + version.to_bytes(13, "little")
