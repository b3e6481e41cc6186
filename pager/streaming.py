"""Streaming: layer slices of blocks that do not fit in the device tier, through a small ring of staging rows.

A streamed step sees its whole context without promoting it: for layer after layer, chunks of slices are copied from host
slots (or read from nvme into bounce rows, then copied) into the ring while earlier chunks are being computed on. Both run
ahead across layers, because the order is known, and reads further than copies, because a disk is slow to start. Where
computing reads host memory as it reads the device's (on a CPU), nothing is copied twice: slices in host slots are read in
place, all of a layer at once, and those from nvme are read straight into the ring. Guards rule 12: a ring slot is refilled
only after the event of its last reader, a bounce slot only after the copy out of it. A copy that fails may show only after
it was computed on, so a streamed step counts only when all of them are known to be good (`copy_failed`, at commit).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..tiers.host import HostMemory
from ..tiers.streams import Backend, Event
from .group import BlockGroup
from .held_below import HeldBelow
from .rules import Rule
from .states import IntArray

RING_SLOTS = 3  # one computed on, one filled, one being filled
MAX_CHUNK_BYTES = 16 << 20
MAX_BOUNCE_SLOTS = 8  # chunks that may be on their way from nvme


class StagingRing:
    """Device rows for layer slices and, with an nvme tier, host rows to read them into; made once per group.

    Where computing reads host memory these are the same rows: all slots are ring slots, and all are read into.
    """

    def __init__(self, group: BlockGroup, memory: HostMemory, staging_bytes: int, bounce_bytes: int) -> None:
        slice_bytes, backend = group.layout.layer_bytes, group.backend
        self.chunk_slices = self.chunk_slices_of(slice_bytes, staging_bytes)
        self.num_bounce_slots = bounce_bytes // (self.chunk_slices * slice_bytes)
        self.is_read_into = backend.reads_host and self.num_bounce_slots > 0
        self.num_slots = RING_SLOTS + (self.num_bounce_slots if self.is_read_into else 0)
        num_rows, num_bounce = self.num_slots * self.chunk_slices, self.num_bounce_slots * self.chunk_slices
        self.nbytes = RING_SLOTS * self.chunk_slices * slice_bytes  # of the device tier
        self.bounce_nbytes = num_bounce * slice_bytes  # of the host tier
        if self.is_read_into:
            self.rows = self.bounce = backend.alloc_device(num_rows, slice_bytes)
            memory.adopt(self.rows[num_rows - num_bounce :])
        else:
            self.rows, self.bounce = backend.alloc_device(num_rows, slice_bytes), memory.alloc(num_bounce, slice_bytes)
        self.reader: list[Event | None] = [None] * self.num_slots  # last compute on this slot
        self.filled: list[Event | None] = [None] * self.num_slots  # last copy into this slot
        self.emptied: list[Event | None] = [None] * self.num_bounce_slots  # last copy out of these bounce rows

    @property
    def reads_ahead(self) -> int:
        """Chunks that may be begun, that which is computed on among them: one more would be read over what is in use."""
        return self.num_slots if self.is_read_into else self.num_bounce_slots or RING_SLOTS

    @staticmethod
    def chunk_slices_of(slice_bytes: int, staging_bytes: int) -> int:
        """Slices of one ring slot: at least one, however large it is."""
        return max(1, min(staging_bytes // RING_SLOTS, MAX_CHUNK_BYTES) // slice_bytes)


@dataclass(slots=True)
class Staged:
    """Layer slices of `blocks` ready for attention, valid until the next ones are asked for.

    In the ring: rows[:count], which begin at its row `start` (views of `Pager.staging_rows` are made once and narrowed). In
    place: rows[slots], host slots' slices of this layer; the same slots in every layer (`Pager.readable_host_rows`).
    """

    rows: Any
    count: int
    blocks: IntArray
    start: int
    places: IntArray  # of these blocks among those that are streamed
    slots: IntArray | None = None

    @property
    def ring_rows(self) -> IntArray:
        """The ring's rows that they lie in."""
        return np.arange(self.start, self.start + self.count)


@dataclass(frozen=True, slots=True)
class _Part:
    """Blocks whose slices make one chunk, the same in every layer: all in the host tier, or all on nvme, in `slots` of it.

    Places count in all streamed blocks.
    """

    places: IntArray
    blocks: IntArray
    is_cold: bool
    slots: IntArray


@dataclass(slots=True)
class _Chunk:
    number: int
    layer: int
    part: _Part
    ticket: Any = None
    is_copied: bool = False


class SliceStream:
    """The chunks of one streamed lease, layer by layer. Holds its host slots and nvme slots until `close`."""

    def __init__(self, group: BlockGroup, ring: StagingRing, blocks: IntArray) -> None:
        self._group, self._ring, self._blocks = group, ring, blocks
        self._backend: Backend = group.backend
        self._held = HeldBelow(group, blocks)
        self._host_rows = group.forms.rows_like_pages
        in_host, cold = np.flatnonzero(self._held.in_host), np.flatnonzero(~self._held.in_host)
        self._in_place: _Part | None = None
        if self._host_rows is not None and len(in_host):
            self._in_place, in_host = self._part(in_host, is_cold=False), in_host[:0]
        self._parts = _mixed(self._chunks(in_host, is_cold=False), self._chunks(cold, is_cold=True))
        self._chunks_per_layer = len(self._parts)
        self._begun: dict[int, _Chunk] = {}
        self._base = 0  # chunk numbers go on across seeks, so that ring slots stay in turn
        self._next = 0  # to be begun
        self._first_layer = 0
        self._unchecked: list[Event] = []  # copies into the ring that may still turn out to have failed
        self._is_closed = False

    @property
    def has_copies(self) -> bool:
        """Whether anything takes the ring."""
        return self._chunks_per_layer > 0

    def layer(self, layer: int) -> Iterator[Staged]:
        """Chunks of one layer; what is read in place comes first. Raises CorruptSliceError when a slice cannot be trusted."""
        first = (layer - self._first_layer) * self._chunks_per_layer
        if self.has_copies:
            if self._base + first not in self._begun and self._base + first != self._next:
                first = self._seek(layer)
            self._run_ahead(self._base + first)
        if self._in_place is not None:
            yield self._of_host(self._in_place, layer)
        for number in range(self._base + first, self._base + first + self._chunks_per_layer):
            yield self._take(number)
            self._ring.reader[number % self._ring.num_slots] = self._backend.compute.record()

    def copy_failed(self) -> bool:
        """Wait for every copy that was computed on, and say whether one failed: then what was computed means nothing."""
        for event in self._unchecked:
            event.wait()
        return self._held.has_changed() or any(event.error is not None for event in self._unchecked)

    def close(self) -> None:
        """Wait for copies under way and let go of every slot."""
        if self._is_closed:
            return
        self._is_closed = True
        self._settle_all()
        self._held.let_go()

    # ------------------------------------------------------------------ inside
    def _seek(self, layer: int) -> int:
        """Layers are asked for out of order: drop what ran ahead and start there."""
        self._settle_all()
        self._base = self._next
        self._first_layer = layer
        return 0

    def _settle_all(self) -> None:
        for number in sorted(self._begun):
            chunk = self._begun.pop(number)
            if chunk.ticket is not None:
                chunk.ticket.event.wait()
        for event in self._ring.filled:
            if event is not None:
                event.wait()

    def _of_host(self, part: _Part, layer: int) -> Staged:
        size = self._group.layout.layer_bytes
        assert self._host_rows is not None
        rows, slots = self._host_rows[:, layer * size : (layer + 1) * size], part.slots
        for name, n in (("attended_slices", len(slots)), ("attended_bytes", len(slots) * size)):
            self._group.counters.add(name, n, tier="host", reason="stream")
        return Staged(rows, len(slots), part.blocks, 0, part.places, slots)

    def _run_ahead(self, number: int) -> None:
        """Begin what this chunk and those behind it need, as far as there is room."""
        while self._next < number + self._ring.reads_ahead and self._begin(self._next):
            pass
        for ahead in range(number, min(number + RING_SLOTS, self._next)):
            self._fill(self._begun[ahead], must=False)

    def _take(self, number: int) -> Staged:
        self._run_ahead(number)
        chunk = self._begun[number]
        self._fill(chunk, must=True)
        del self._begun[number]
        ring, part = self._ring, chunk.part
        slot = number % ring.num_slots
        if not self._is_read_into(chunk):
            filled = ring.filled[slot]
            assert filled is not None
            self._backend.compute.wait(filled)
        start, count = slot * ring.chunk_slices, len(part.blocks)
        return Staged(ring.rows[start : start + count], count, part.blocks, start, part.places)

    def _part(self, places: IntArray, *, is_cold: bool) -> _Part:
        slots = self._held.nvme_slots if is_cold else self._held.host_slots
        return _Part(places, self._blocks[places], is_cold, slots[places])

    def _chunks(self, places: IntArray, *, is_cold: bool) -> list[_Part]:
        size = self._ring.chunk_slices
        return [self._part(places[at : at + size], is_cold=is_cold) for at in range(0, len(places), size)]

    def _is_read_into(self, chunk: _Chunk) -> bool:
        """Whether its slices are read from nvme to where they are computed on."""
        return self._ring.is_read_into and chunk.part.is_cold

    def _begin(self, number: int) -> bool:
        """Start reading what a chunk needs from nvme. False when there are no more."""
        after, index = divmod(number - self._base, self._chunks_per_layer)
        layer = self._first_layer + after
        if layer >= self._group.layout.num_layers:
            return False
        chunk = self._begun[number] = _Chunk(number, layer, self._parts[index])
        self._next = number + 1
        if chunk.part.is_cold:
            ring = self._ring
            last = (
                ring.reader[number % ring.num_slots]
                if ring.is_read_into
                else ring.emptied[number % ring.num_bounce_slots]
            )
            if last is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
                last.wait()  # rule 12
            assert self._group.cold is not None
            nvme, group, slots = self._group.cold.tier, self._group.index, chunk.part.slots
            rows = self._read_rows(chunk)
            chunk.ticket = nvme.read_layer(group, slots, layer, ring.bounce, rows, nvme.stamps(group, slots))
        if index == 0:
            self._count(layer)
        return True

    def _fill(self, chunk: _Chunk, must: bool) -> None:
        """Queue the copies into the ring slot of a chunk, once what it needs is read."""
        ticket, part = chunk.ticket, chunk.part
        if chunk.is_copied or not (must or ticket is None or ticket.event.is_done()):
            return
        if ticket is not None:
            ticket.event.wait()
            bad = part.blocks if ticket.event.error is not None else part.blocks[~ticket.ok]
            if len(bad):
                raise CorruptSliceError(bad)
        chunk.is_copied = True
        if not self._is_read_into(chunk):
            self._copy(chunk)

    def _copy(self, chunk: _Chunk) -> None:
        ring, part, promote = self._ring, chunk.part, self._backend.promote
        slot = chunk.number % ring.num_slots
        reader, rows = ring.reader[slot], slot * ring.chunk_slices + np.arange(len(part.slots))
        if reader is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
            promote.wait(reader)  # rule 12
        if part.is_cold:
            promote.copy_rows(ring.rows, rows, ring.bounce, self._read_rows(chunk))
        else:
            self._group.forms.get_layer(promote, chunk.layer, ring.rows, rows, part.slots)
        filled = ring.filled[slot] = promote.record()
        if part.is_cold:
            ring.emptied[chunk.number % ring.num_bounce_slots] = filled
        self._unchecked = [event for event in self._unchecked if not event.is_done() or event.error is not None]
        self._unchecked.append(filled)

    def _read_rows(self, chunk: _Chunk) -> IntArray:
        """Where its slices are read to, in `bounce`."""
        slots = self._ring.num_slots if self._ring.is_read_into else self._ring.num_bounce_slots
        return chunk.number % slots * self._ring.chunk_slices + np.arange(len(chunk.part.slots))

    def _count(self, layer: int) -> None:
        """Moved bytes of a whole layer, when its first chunk is asked for."""
        forms, count, size = self._group.forms, self._group.counters.add, self._group.layout.layer_bytes
        from_host = [part.slots for part in self._parts if not part.is_cold]
        from_nvme = [part.blocks for part in self._parts if part.is_cold]
        num_cold, num_copied = sum(map(len, from_nvme)), sum(map(len, from_host))
        cold_bytes = forms.cold_layer_bytes(np.concatenate(from_nvme), layer) if num_cold else 0
        copied_bytes = forms.layer_bytes(np.concatenate(from_host), layer) if num_copied else 0
        if not self._ring.is_read_into:
            num_copied, copied_bytes = num_copied + num_cold, copied_bytes + num_cold * size
        for name, n, nbytes in (
            ("host_to_device", num_copied, copied_bytes),
            ("nvme_to_host", num_cold, cold_bytes),
        ):
            if n:
                count("moved_bytes", nbytes, direction=name, reason="stream")
                count("moved_slices", n, direction=name, reason="stream")


def _mixed(some: list[_Part], others: list[_Part]) -> list[_Part]:
    """Both, each evenly spread: copies from the host tier and reads from nvme go on side by side."""
    places = [(at / len(parts), part) for parts in (some, others) for at, part in enumerate(parts)]
    return [part for _, part in sorted(places, key=lambda place: place[0])]


class CorruptSliceError(Exception):
    """Slices of these blocks failed their checks; the pager turns this into a BlockMissError."""

    def __init__(self, blocks: IntArray) -> None:
        super().__init__(f"{len(blocks)} blocks could not be read back")
        self.blocks = blocks
