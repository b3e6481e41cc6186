"""Streaming: layer slices of blocks that do not fit in the device tier, through a small ring of staging rows.

A streamed step sees its whole context without promoting it: for layer after layer, chunks of slices are copied from host
slots (or read from nvme into bounce rows, then copied) into the ring while earlier chunks are being computed on. Both run
ahead across layers, because the order is known, and reads further than copies, because a disk is slow to start. Where
computing reads host memory as it reads the device's (on a CPU), slices in host slots are read in place, all of a layer at
once, and only those from nvme take the ring. Guards rule 12: a ring slot is refilled only after the event of its last
reader, a bounce slot only after the copy out of it. A copy that fails may show only after it was computed on, so a streamed
step counts only when all of them are known to be good (`copy_failed`, at commit).
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
    """Device rows for layer slices and, with an nvme tier, host rows to read them into; made once per group."""

    def __init__(self, group: BlockGroup, memory: HostMemory, staging_bytes: int, bounce_bytes: int) -> None:
        slice_bytes = group.layout.layer_bytes
        self.chunk_slices = self.chunk_slices_of(slice_bytes, staging_bytes)
        num_rows = RING_SLOTS * self.chunk_slices
        self.rows = group.backend.alloc_device(num_rows, slice_bytes)
        self.nbytes = num_rows * slice_bytes
        self.num_bounce_slots = bounce_bytes // (self.chunk_slices * slice_bytes)
        self.bounce = memory.alloc(self.num_bounce_slots * self.chunk_slices, slice_bytes)
        self.reader: list[Event | None] = [None] * RING_SLOTS  # last compute on this slot
        self.filled: list[Event | None] = [None] * RING_SLOTS  # last copy into this slot
        self.emptied: list[Event | None] = [None] * self.num_bounce_slots  # last copy out of these bounce rows

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
    """Blocks whose slices make one chunk: the same in every layer. Indices count in `blocks`, places in all streamed ones."""

    places: IntArray
    blocks: IntArray
    in_host: IntArray
    host_slots: IntArray  # of those
    on_nvme: IntArray
    nvme_slots: IntArray  # of those


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
        is_in_place = self._held.in_host if self._host_rows is not None else np.zeros(len(blocks), bool)
        self._in_place = self._part(np.flatnonzero(is_in_place))
        ringed, size = np.flatnonzero(~is_in_place), ring.chunk_slices
        self._parts = [self._part(ringed[at : at + size]) for at in range(0, len(ringed), size)]
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
        if len(self._in_place.blocks):
            yield self._of_host(layer)
        for number in range(self._base + first, self._base + first + self._chunks_per_layer):
            yield self._take(number)
            self._ring.reader[number % RING_SLOTS] = self._backend.compute.record()

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

    def _of_host(self, layer: int) -> Staged:
        part, size = self._in_place, self._group.layout.layer_bytes
        assert self._host_rows is not None
        rows, slots = self._host_rows[:, layer * size : (layer + 1) * size], part.host_slots
        for name, n in (("attended_slices", len(slots)), ("attended_bytes", len(slots) * size)):
            self._group.counters.add(name, n, tier="host", reason="stream")
        return Staged(rows, len(slots), part.blocks, 0, part.places, slots)

    def _run_ahead(self, number: int) -> None:
        """Begin what this chunk and those behind it need, as far as there is room."""
        ahead = self._ring.num_bounce_slots or RING_SLOTS  # one more would be read over what is still to be copied out
        while self._next < number + ahead and self._begin(self._next):
            pass
        for ahead in range(number, min(number + RING_SLOTS, self._next)):
            self._fill(self._begun[ahead], must=False)

    def _take(self, number: int) -> Staged:
        self._run_ahead(number)
        self._fill(self._begun[number], must=True)
        chunk = self._begun.pop(number)
        slot = number % RING_SLOTS
        filled = self._ring.filled[slot]
        assert filled is not None
        self._backend.compute.wait(filled)
        start, count = slot * self._ring.chunk_slices, len(chunk.part.blocks)
        return Staged(self._ring.rows[start : start + count], count, chunk.part.blocks, start, chunk.part.places)

    def _part(self, places: IntArray) -> _Part:
        held = self._held
        in_host = held.in_host[places]
        return _Part(
            places,
            self._blocks[places],
            np.flatnonzero(in_host),
            held.host_slots[places[in_host]],
            np.flatnonzero(~in_host),
            held.nvme_slots[places[~in_host]],
        )

    def _begin(self, number: int) -> bool:
        """Start reading what a chunk needs from nvme. False when there are no more."""
        after, index = divmod(number - self._base, self._chunks_per_layer)
        layer = self._first_layer + after
        if layer >= self._group.layout.num_layers:
            return False
        chunk = self._begun[number] = _Chunk(number, layer, self._parts[index])
        self._next = number + 1
        slots = chunk.part.nvme_slots
        if len(slots):
            emptied = self._ring.emptied[number % self._ring.num_bounce_slots]
            if emptied is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
                emptied.wait()  # rule 12
            assert self._group.cold is not None
            nvme, group = self._group.cold.tier, self._group.index
            rows = self._bounce_rows(chunk)
            chunk.ticket = nvme.read_layer(group, slots, layer, self._ring.bounce, rows, nvme.stamps(group, slots))
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
            bad = part.on_nvme if ticket.event.error is not None else part.on_nvme[~ticket.ok]
            if len(bad):
                raise CorruptSliceError(part.blocks[bad])
        promote, slot = self._backend.promote, chunk.number % RING_SLOTS
        base, reader = slot * self._ring.chunk_slices, self._ring.reader[slot]
        if reader is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
            promote.wait(reader)  # rule 12
        if len(part.in_host):
            self._group.forms.get_layer(promote, chunk.layer, self._ring.rows, base + part.in_host, part.host_slots)
        if ticket is not None:
            promote.copy_rows(self._ring.rows, base + part.on_nvme, self._ring.bounce, self._bounce_rows(chunk))
        filled = self._ring.filled[slot] = promote.record()
        if ticket is not None:
            self._ring.emptied[chunk.number % self._ring.num_bounce_slots] = filled
        self._unchecked = [event for event in self._unchecked if not event.is_done() or event.error is not None]
        self._unchecked.append(filled)
        chunk.is_copied = True

    def _bounce_rows(self, chunk: _Chunk) -> IntArray:
        first = chunk.number % self._ring.num_bounce_slots * self._ring.chunk_slices
        return first + np.arange(len(chunk.part.on_nvme))

    def _count(self, layer: int) -> None:
        """Moved bytes of a whole layer, when its first chunk is asked for."""
        forms, count = self._group.forms, self._group.counters.add
        places = np.concatenate([part.places for part in self._parts])
        on_nvme = self._blocks[places[~self._held.in_host[places]]]
        from_host = forms.layer_bytes(np.concatenate([part.host_slots for part in self._parts]), layer)
        for name, n, nbytes in (
            ("host_to_device", len(places), from_host + len(on_nvme) * self._group.layout.layer_bytes),
            ("nvme_to_host", len(on_nvme), forms.cold_layer_bytes(on_nvme, layer)),
        ):
            if n:
                count("moved_bytes", nbytes, direction=name, reason="stream")
                count("moved_slices", n, direction=name, reason="stream")


class CorruptSliceError(Exception):
    """Slices of these blocks failed their checks; the pager turns this into a BlockMissError."""

    def __init__(self, blocks: IntArray) -> None:
        super().__init__(f"{len(blocks)} blocks could not be read back")
        self.blocks = blocks
