"""Reading: a sequence's blocks, visited where they are, for whoever copies K/V out instead of attending over pages.

Nothing is promoted: what is in the device or host tier is read in place, what is on nvme comes up into host slots and
is read there. Each piece is pinned (device) or held (host, rule 7) while the caller looks at it, and only that piece, so
several readers get through a small host tier together. A block that is lost ends the reading with a miss.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..tiers.errors import Busy
from .core import Core
from .group import MAX_MOVE_BYTES, BlockGroup
from .page_table import Sequence, seen_blocks
from .prefix import lose
from .rules import Rule
from .states import IntArray

READ_AHEAD_MOVES = 2  # reads from nvme on their way, each of at most MAX_MOVE_BYTES, while a piece is looked at
_MAX_ROUND_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """Blocks of one layer group that stay where they are until the next piece is asked for.

    Shapes: rows uint8 [*, block_bytes] (numpy, or a CUDA tensor); rows[row_ids[i]] is block logical[i] of the sequence.
    """

    tier: Literal["device", "host"]
    rows: Any
    row_ids: IntArray
    logical: IntArray
    slots: IntArray  # the pages or host slots that are held


class BlockReader:
    """Reads for one pager."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def read(self, seq_id: int, group_index: int, timeout_s: float) -> Generator[HeldBlocks]:
        """See Pager.read_blocks."""
        core, group = self._core, self._core.groups[group_index]
        deadline_s = core.clock() + timeout_s
        with core.locked():
            seq = core.idle_sequence(seq_id, "reading it")
            logical = seen_blocks(group.layout, seq.tables[group.index].ids, seq.num_computed, seq.num_computed)
            seq.num_leases += 1
        awaited: list[IntArray] = []  # what this reader has in group.awaited
        try:
            while len(logical):
                with core.locked():
                    self._start_reads(group, seq, logical, awaited)
                    piece = self._hold(group, seq, logical)
                if piece is None:
                    self._wait(group, deadline_s, len(logical))
                    continue
                try:
                    yield _in_full(group, piece)
                    self._check_unchanged(group, seq, piece)
                finally:
                    self._let_go(group, piece)
                logical = np.setdiff1d(logical, piece.logical, assume_unique=True)
        finally:
            with core.lock:
                self._await(group, awaited, logical[:0])
                seq.num_leases -= 1

    def _start_reads(self, group: BlockGroup, seq: Sequence, logical: IntArray, awaited: list[IntArray]) -> None:
        """Bring the next blocks from nvme into host slots, a little ahead; what is or comes up there has to wait for us."""
        d, blocks = group.directory, seq.tables[group.index].ids[logical]
        gone = ~d.is_valid(blocks) & (d.host_slot[blocks] < 0) & (d.page[blocks] < 0)
        if gone.any():
            lose(self._core, seq, int(logical[np.argmax(gone)]), group)
        self._await(group, awaited, blocks[d.host_slot[blocks] >= 0])
        rising = int(((d.host_slot[blocks] >= 0) & ~d.in_host(blocks)).sum())
        limit = READ_AHEAD_MOVES * max(1, MAX_MOVE_BYTES // group.layout.block_bytes) - rising
        cold = blocks[(d.host_slot[blocks] < 0) & ~d.in_device(blocks) & d.nvme_valid[blocks]][: max(limit, 0)]
        if group.cold is None or not len(cold):
            return
        asker = seq.chain.owner
        self._core.make_host_room(group, group.forms.slots_of(cold, below=True), asker)
        cold, _ = group.forms.fitting(cold, group.leaving.host_room(asker=asker), below=True)
        for batch in group.batches(cold):
            slots = group.take_host_slots(group.forms.slots_of(batch, below=True), asker=asker)
            if slots is None:
                break
            group.cold.read(batch, slots, "load")
            self._await(group, awaited, blocks[d.host_slot[blocks] >= 0])

    def _await(self, group: BlockGroup, awaited: list[IntArray], blocks: IntArray) -> None:
        """Say which host copies must not make room for others; none ends it."""
        group.awaited = [other for other in group.awaited if not any(other is own for own in awaited)]
        awaited[:] = [blocks] if len(blocks) else []
        group.awaited += awaited

    def _hold(self, group: BlockGroup, seq: Sequence, logical: IntArray) -> HeldBlocks | None:
        """The next blocks that can be read, in order, of one tier and of at most MAX_MOVE_BYTES; None when none can."""
        d, blocks = group.directory, seq.tables[group.index].ids[logical]
        most = max(1, MAX_MOVE_BYTES // group.layout.block_bytes)
        if (inside := d.in_device(blocks)).any():
            chosen, ids = logical[inside][:most], blocks[inside][:most]
            pages = d.page[ids]
            for event in group.pages.pending(group.pages.last_write, pages):
                self._core.backend.compute.wait(event)
            group.pages.pins[pages] += 1
            return HeldBlocks("device", group.pool.rows, pages, chosen, pages)
        if (hosted := d.in_host(blocks)).any():
            chosen, ids = logical[hosted][:most], blocks[hosted][:most]
            slots = d.host_slot[ids]
            group.host.holds[slots] += 1  # rule 7
            return HeldBlocks("host", group.slab.rows, group.slab.place(slots), chosen, slots)
        return None

    def _check_unchanged(self, group: BlockGroup, seq: Sequence, piece: HeldBlocks) -> None:
        """Rule 11: the caller has copied; was it still that block? Raises BlockMissError."""
        if piece.tier == "host" and self._core.rules.holds(Rule.READER_CHECKS_GENERATION):
            intact = group.slab.intact(piece.slots)
            if not intact.all():
                with self._core.lock:
                    lose(self._core, seq, int(piece.logical[np.argmin(intact)]), group)

    def _let_go(self, group: BlockGroup, piece: HeldBlocks) -> None:
        with self._core.lock:
            if piece.tier == "host":
                group.host.holds[piece.slots] -= 1
                return
            group.pages.pins[piece.slots] -= 1
            group.pages.note_event(group.pages.last_read, piece.slots, self._core.backend.compute.record())

    def _wait(self, group: BlockGroup, deadline_s: float, num_waiting: int) -> None:
        """For copies of ours, or for others to let go of host slots."""
        if self._core.clock() > deadline_s:
            raise Busy(
                f"read: still waiting for {num_waiting} blocks of group {group.layout.name!r}; {len(group.host)} host "
                "slots, none came free: raise host_bytes",
                retry_after_s=0.1,
            )
        self._core.backend.wait_any(_MAX_ROUND_WAIT_S)


def _in_full(group: BlockGroup, piece: HeldBlocks) -> HeldBlocks:
    """The same blocks for the caller to read: unpacked into memory of their own where the host tier has a format."""
    if piece.tier == "device" or group.forms.packed is None:
        return piece
    rows = group.forms.packed.read(piece.slots)
    return replace(piece, rows=rows, row_ids=np.arange(len(rows)))
