"""Streaming: layer slices of blocks that do not fit in the device tier, through a small ring of staging rows.

A streamed step sees its whole context without promoting it: for layer after layer, chunks of slices are copied from
host slots (or read from nvme into bounce rows, then copied) into the ring while earlier chunks are being computed on.
The ring runs ahead across layers, because the order is known. Guards rule 12: a ring slot is refilled only after the
event of its last reader, a bounce slot only after the copy out of it. A copy that fails may show only after it was
computed on, so a streamed step counts only when all of them are known to be good (`copy_failed`, at commit).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tiers.host import HostMemory
from ..tiers.streams import Backend, Event
from .group import BlockGroup
from .rules import Rule
from .states import IntArray

RING_SLOTS = 3  # one computed on, one filled, one being filled
MAX_CHUNK_BYTES = 16 << 20


class StagingRing:
    """Device rows for layer slices and, with an nvme tier, host rows to read them into; made once per group."""

    def __init__(self, group: BlockGroup, memory: HostMemory, staging_bytes: int, with_bounce: bool) -> None:
        slice_bytes = group.layout.layer_bytes
        self.chunk_slices = max(1, min(staging_bytes // RING_SLOTS, MAX_CHUNK_BYTES) // slice_bytes)
        num_rows = RING_SLOTS * self.chunk_slices
        self.rows = group.backend.alloc_device(num_rows, slice_bytes)
        self.bounce = memory.alloc(num_rows if with_bounce else 0, slice_bytes)
        self.nbytes = num_rows * slice_bytes
        self.bounce_nbytes = self.nbytes if with_bounce else 0
        self.reader: list[Event | None] = [None] * RING_SLOTS  # last compute on this slot
        self.filled: list[Event | None] = [None] * RING_SLOTS  # last copy into this slot (and out of its bounce rows)

    @staticmethod
    def smallest_bytes(layer_bytes: int) -> int:
        return RING_SLOTS * layer_bytes


@dataclass(slots=True)
class Staged:
    """Layer slices ready for attention: rows[:count] of `blocks`, valid until the next one is asked for."""

    rows: Any
    count: int
    blocks: IntArray


@dataclass(slots=True)
class _Chunk:
    position: int
    layer: int
    blocks: IntArray
    ticket: Any = None
    on_nvme: IntArray | None = None  # indices into blocks
    is_copied: bool = False


class SliceStream:
    """The chunks of one streamed lease, layer by layer. Holds its host slots and nvme slots until `close`."""

    def __init__(self, group: BlockGroup, ring: StagingRing, blocks: IntArray) -> None:
        self._group, self._ring, self._blocks = group, ring, blocks
        self._backend: Backend = group.backend
        d = group.directory
        self._from_host = d.in_host(blocks)
        self._host_slots = d.host_slot[blocks]
        self._nvme_slots = d.nvme_slot[blocks]
        group.host.holds[self._host_slots[self._from_host]] += 1  # rule 7
        d.nvme_holds[blocks[~self._from_host]] += 1
        self._chunks_per_layer = -(-len(blocks) // ring.chunk_slices)
        self._issued: dict[int, _Chunk] = {}
        self._base = 0  # chunk numbers go on across seeks, so that ring slots stay in turn
        self._next_issue = 0
        self._first_layer = 0
        self._unchecked: list[Event] = []  # copies into the ring that may still turn out to have failed
        self._is_closed = False

    def layer(self, layer: int) -> Iterator[Staged]:
        """Chunks of one layer, in block order. Raises CorruptSliceError when a slice cannot be trusted."""
        first = (layer - self._first_layer) * self._chunks_per_layer
        if self._base + first not in self._issued and self._base + first != self._next_issue:
            first = self._seek(layer)
        for number in range(self._base + first, self._base + first + self._chunks_per_layer):
            yield self._take(number)
            self._ring.reader[number % RING_SLOTS] = self._backend.compute.record()

    def copy_failed(self) -> bool:
        """Wait for every copy that was computed on, and say whether one failed: then what was computed means nothing."""
        for event in self._unchecked:
            event.wait()
        changed = ~self._group.slab.intact(self._host_slots[self._from_host])
        if changed.any() and self._group.rules.holds(Rule.READER_CHECKS_GENERATION):
            return True  # rule 11
        return any(event.error is not None for event in self._unchecked)

    def close(self) -> None:
        """Wait for copies under way and let go of every slot."""
        if self._is_closed:
            return
        self._is_closed = True
        self._settle_all()
        d = self._group.directory
        self._group.host.holds[self._host_slots[self._from_host]] -= 1
        d.nvme_holds[self._blocks[~self._from_host]] -= 1

    # ------------------------------------------------------------------ inside
    def _seek(self, layer: int) -> int:
        """Layers are asked for out of order: drop what ran ahead and start there."""
        self._settle_all()
        self._base = self._next_issue
        self._first_layer = layer
        return 0

    def _settle_all(self) -> None:
        for number in sorted(self._issued):
            chunk = self._issued.pop(number)
            if chunk.ticket is not None:
                chunk.ticket.event.wait()
        for event in self._ring.filled:
            if event is not None:
                event.wait()

    def _take(self, number: int) -> Staged:
        while self._next_issue < number + RING_SLOTS and self._issue(self._next_issue):
            pass
        for ahead in sorted(self._issued):
            self._copy_if_read(self._issued[ahead], must=ahead == number)
        chunk = self._issued.pop(number)
        slot = number % RING_SLOTS
        filled = self._ring.filled[slot]
        assert filled is not None
        self._backend.compute.wait(filled)
        start = slot * self._ring.chunk_slices
        rows = self._ring.rows[start : start + len(chunk.blocks)]
        return Staged(rows, len(chunk.blocks), chunk.blocks)

    def _issue(self, number: int) -> bool:
        layer = self._first_layer + (number - self._base) // self._chunks_per_layer
        if layer >= self._group.layout.num_layers:
            return False
        index = (number - self._base) % self._chunks_per_layer
        part = slice(index * self._ring.chunk_slices, (index + 1) * self._ring.chunk_slices)
        blocks, slot = self._blocks[part], number % RING_SLOTS
        chunk = _Chunk(number, layer, blocks)
        self._issued[number] = chunk
        self._next_issue = number + 1
        reader = self._ring.reader[slot]
        if reader is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
            self._backend.promote.wait(reader)  # rule 12
        in_host = self._from_host[part]
        base = slot * self._ring.chunk_slices
        if in_host.any():
            low = layer * self._group.layout.layer_bytes
            slab, slots = self._group.slab, self._host_slots[part][in_host]
            source = slab.rows[:, low : low + self._group.layout.layer_bytes]
            target_rows = base + np.flatnonzero(in_host)
            self._backend.promote.copy_rows(self._ring.rows, target_rows, source, slab.place(slots))
        if not in_host.all():
            chunk.on_nvme = np.flatnonzero(~in_host)
            filled = self._ring.filled[slot]
            if filled is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
                filled.wait()  # rule 12: the bounce rows of this slot are still being copied from
            assert self._group.cold is not None
            nvme, slots = self._group.cold.tier, self._nvme_slots[part][chunk.on_nvme]
            stamps = nvme.stamps(self._group.index, slots)
            chunk.ticket = nvme.read_layer(
                self._group.index, slots, layer, self._ring.bounce, base + chunk.on_nvme, stamps
            )
        else:
            self._mark_filled(chunk)
        self._count(chunk, int(in_host.sum()))
        return True

    def _copy_if_read(self, chunk: _Chunk, must: bool) -> None:
        if chunk.is_copied or not (must or chunk.ticket.event.is_done()):
            return
        chunk.ticket.event.wait()
        assert chunk.on_nvme is not None
        bad = chunk.on_nvme if chunk.ticket.event.error is not None else chunk.on_nvme[~chunk.ticket.ok]
        if len(bad):
            raise CorruptSliceError(chunk.blocks[bad])
        rows = (chunk.position % RING_SLOTS) * self._ring.chunk_slices + chunk.on_nvme
        self._backend.promote.copy_rows(self._ring.rows, rows, self._ring.bounce, rows)
        self._mark_filled(chunk)

    def _mark_filled(self, chunk: _Chunk) -> None:
        filled = self._backend.promote.record()
        self._ring.filled[chunk.position % RING_SLOTS] = filled
        self._unchecked = [event for event in self._unchecked if not event.is_done() or event.error is not None]
        self._unchecked.append(filled)
        chunk.is_copied = True

    def _count(self, chunk: _Chunk, num_from_host: int) -> None:
        slice_bytes = self._group.layout.layer_bytes
        count = self._group.counters.add
        for name, n in (("host_to_device", len(chunk.blocks)), ("nvme_to_host", len(chunk.blocks) - num_from_host)):
            if n:
                count("moved_bytes", n * slice_bytes, direction=name, reason="stream")
                count("moved_slices", n, direction=name, reason="stream")


class CorruptSliceError(Exception):
    """Slices of these blocks failed their checks; the pager turns this into a BlockMissError."""

    def __init__(self, blocks: IntArray) -> None:
        super().__init__(f"{len(blocks)} blocks could not be read back")
        self.blocks = blocks
