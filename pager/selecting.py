"""Selected slices: layer slices of blocks that a step picks while it runs, fetched past the host tier into a small cache.

What a step of selected attention reads differs by layer, so blocks stay where they are and only the picked layers of them
come up: from host slots, or from nvme through the ring's bounce rows. The cache has a directory of its own, by layer and
block, least recently used first out; what one step fetched serves the next. Guards: a slice is served only while its block
is what it was (the directory's serial number and version), rule 7 for the copies below, rule 12 for rows that are
filled again, and slices whose copy turns out to have failed leave with the step that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tiers.streams import Event
from .held_below import HeldBelow
from .rules import Rule
from .states import NOWHERE, IntArray
from .streaming import CorruptSliceError, StagingRing

if TYPE_CHECKING:
    from .group import BlockGroup

MIN_SLICES = 16  # rows of the smallest cache


class SliceCache:
    """Device rows for layer slices, and which slice lies in each; made once per group."""

    def __init__(self, group: BlockGroup, num_rows: int) -> None:
        self.rows = group.backend.alloc_device(num_rows, group.layout.layer_bytes)
        self.nbytes = num_rows * group.layout.layer_bytes
        self._directory = group.directory
        self._row_at = np.full((group.layout.num_layers, 1024), NOWHERE, np.int32)  # [layer, block]
        self._layer = np.zeros(num_rows, np.int64)
        self._block = np.full(num_rows, NOWHERE, np.int64)
        self._serial = np.zeros(num_rows, np.int64)
        self._version = np.zeros(num_rows, np.int64)
        self._used = np.zeros(num_rows, np.int64)
        self._reader: list[Event | None] = [None] * num_rows
        self._now = 0

    def __len__(self) -> int:
        return len(self._block)

    def begin(self) -> None:
        """What is touched from here on may not leave before the next call."""
        self._now += 1

    def find(self, layer: int, blocks: IntArray) -> IntArray:
        """Rows that hold this layer of these blocks as they are now, NOWHERE for the others. Counts as a use."""
        self._grow()
        rows = self._row_at[layer, blocks].astype(np.int64)
        at, d = np.maximum(rows, 0), self._directory
        same = (rows >= 0) & (self._serial[at] == d.serial[blocks]) & (self._version[at] == d.version[blocks])
        self._used[rows[same]] = self._now
        return np.where(same, rows, NOWHERE)

    def room(self) -> int:
        """Rows that may be filled again now."""
        return int((self._used < self._now).sum())

    def take(self, count: int) -> IntArray:
        """The `count` least recently used rows, emptied; at most `room()`."""
        order = np.argpartition(self._used, count - 1)[:count] if count < len(self) else np.arange(len(self))
        self.drop(order)
        self._used[order] = self._now
        return order

    def drop(self, rows: IntArray) -> None:
        """Forget what lies in these rows."""
        held = rows[self._block[rows] >= 0]
        self._row_at[self._layer[held], self._block[held]] = NOWHERE
        self._block[rows] = NOWHERE

    def put(self, layer: int, blocks: IntArray, rows: IntArray) -> None:
        """These rows hold this layer of these blocks from here on."""
        self._grow()
        self._layer[rows], self._block[rows] = layer, blocks
        self._serial[rows], self._version[rows] = self._directory.serial[blocks], self._directory.version[blocks]
        self._row_at[layer, blocks] = rows

    def readers(self, rows: IntArray) -> list[Event]:
        """Computing that may still read these rows."""
        return list({id(e): e for i in rows.tolist() if (e := self._reader[i]) is not None}.values())

    def read_by(self, rows: IntArray, event: Event) -> None:
        for row in rows.tolist():  # events are objects; as many as a layer picks
            self._reader[row] = event

    def _grow(self) -> None:
        missing = len(self._directory.page) - self._row_at.shape[1]
        if missing > 0:
            self._row_at = np.pad(self._row_at, ((0, 0), (0, missing)), constant_values=NOWHERE)


@dataclass(frozen=True, slots=True)
class Picked:
    """Slices ready for attention: rows[row_ids[i]] is this layer of blocks[i], until the next ones are asked for."""

    rows: Any
    row_ids: IntArray
    blocks: IntArray


@dataclass(frozen=True, slots=True)
class SliceCounts:
    """What became of slices: of those asked for, how many lay in the cache (kept) or came by a guess (guess_used); of all
    that were brought up (fetched), how many on a guess."""

    asked: int = 0
    kept: int = 0
    guess_used: int = 0
    fetched: int = 0
    guessed: int = 0

    def __add__(self, other: SliceCounts) -> SliceCounts:
        return SliceCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: SliceCounts) -> SliceCounts:
        return SliceCounts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(slots=True, eq=False)
class _Load:
    """Slices on their way into the cache."""

    layer: int
    blocks: IntArray
    rows: IntArray
    ticket: Any = None
    on_nvme: IntArray | None = None  # indices into blocks
    bounce: IntArray | None = None


class SliceSelection:
    """The context of one selected lease: which blocks are resident, and slices of the others on demand.

    `spans`: for each span the ids of its whole context blocks, in order. `pages` are their pages, NOWHERE for those that
    are not resident. Holds the copies below until `close`.
    """

    def __init__(
        self, group: BlockGroup, cache: SliceCache, ring: StagingRing, spans: Sequence[IntArray], below: IntArray
    ) -> None:
        self._group, self._cache, self._ring, self._backend = group, cache, ring, group.backend
        d = group.directory
        self.spans = list(spans)
        self._held = HeldBelow(group, np.unique(below))
        self.pages = [np.where(np.isin(ids, self._held.blocks), NOWHERE, d.page[ids]) for ids in self.spans]
        self._guess: _Load | None = None
        self._open: list[_Load] = []  # submitted, not yet finished
        self._bounce_event: list[Event | None] = [None, None]  # copies out of the halves: what is asked for, guesses
        self._filled: list[tuple[IntArray, Event]] = []
        self.counts = SliceCounts()
        self._is_closed = False

    @property
    def slice_bytes(self) -> int:
        return self._group.layout.layer_bytes

    def fetch(self, layer: int, blocks: IntArray) -> Iterator[Picked]:
        """Slices of these blocks, in any order, those that are here first. Raises CorruptSliceError."""
        cache = self._cache
        cache.begin()
        blocks = np.unique(blocks)
        used = self._take_guess(layer, blocks)
        rows = cache.find(layer, blocks)
        here, missing = rows >= 0, blocks[rows < 0]
        self.counts += SliceCounts(len(blocks), kept=int(here.sum()) - used, guess_used=used)
        load = self._load(layer, missing, half=0)
        if here.any():
            yield from self._show(blocks[here], rows[here])
        while load is not None:
            self._finish(load, half=0)
            missing = missing[len(load.blocks) :]
            yield from self._show(load.blocks, load.rows)
            if len(missing):
                cache.begin()  # what was shown has been computed on: its rows may be filled again
            load = self._load(layer, missing, half=0)

    def guess(self, layer: int, blocks: IntArray) -> None:
        """Start bringing slices that a later layer will likely ask for; a wrong guess costs only time."""
        if self._guess is not None or layer >= self._group.layout.num_layers:
            return
        blocks = np.unique(blocks[np.isin(blocks, self._held.blocks)])
        missing = blocks[self._cache.find(layer, blocks) < 0]
        self._guess = self._load(layer, missing, half=1)
        if self._guess is not None:
            self.counts += SliceCounts(guessed=len(self._guess.blocks))

    def copy_failed(self) -> bool:
        """Wait for the copies that were computed on; whether one failed: then what was computed means nothing."""
        for _, event in self._filled:
            event.wait()
        is_bad = self._held.has_changed() or any(event.error is not None for _, event in self._filled)
        if is_bad:
            self._forget_filled()
        else:
            self._filled.clear()
        return is_bad

    def close(self) -> None:
        """Wait for what is on its way and let go of every slot. What no commit has proven leaves the cache."""
        if self._is_closed:
            return
        self._is_closed = True
        for load in self._open:
            if load.ticket is not None:
                load.ticket.event.wait()
        if self._open:
            self._backend.promote.record().wait()
        for event in [*self._bounce_event, *(event for _, event in self._filled)]:
            if event is not None:
                event.wait()
        self._forget_filled()
        self._held.let_go()

    # ------------------------------------------------------------------ inside
    def _show(self, blocks: IntArray, rows: IntArray) -> Iterator[Picked]:
        yield Picked(self._cache.rows, rows, blocks)
        self._cache.read_by(rows, self._backend.compute.record())

    def _take_guess(self, layer: int, blocks: IntArray) -> int:
        """Finish what was guessed; say how many of it are among these blocks of this layer."""
        guess, self._guess = self._guess, None
        if guess is None:
            return 0
        self._finish(guess, half=1)
        return int(np.isin(guess.blocks, blocks).sum()) if guess.layer == layer else 0

    def _load(self, layer: int, blocks: IntArray, *, half: int) -> _Load | None:
        """Start copies of as many of these slices as there is room for."""
        cache, rules = self._cache, self._group.rules
        room = max(cache.room() // 2, min(cache.room(), MIN_SLICES // 2)) if half else cache.room()
        blocks = blocks[: min(room, len(self._ring.rows) // 2)]
        if not len(blocks):
            return None
        load = _Load(layer, blocks, cache.take(len(blocks)))
        self._open.append(load)
        if rules.holds(Rule.STAGING_RING_HAS_EVENTS):
            for event in cache.readers(load.rows):
                self._backend.promote.wait(event)  # rule 12
        at = np.searchsorted(self._held.blocks, blocks)
        in_host = self._held.in_host[at]
        if in_host.any():
            slots, promote = self._held.host_slots[at[in_host]], self._backend.promote
            self._group.forms.get_layer(promote, layer, cache.rows, load.rows[in_host], slots)
        if not in_host.all():
            self._read(load, np.flatnonzero(~in_host), at, half)
        self._count(len(blocks), len(blocks) - int(in_host.sum()))
        return load

    def _read(self, load: _Load, which: IntArray, at: IntArray, half: int) -> None:
        """Start reading slices from nvme into this half of the bounce rows."""
        busy = self._bounce_event[half]
        if busy is not None and self._group.rules.holds(Rule.STAGING_RING_HAS_EVENTS):
            busy.wait()  # rule 12
        assert self._group.cold is not None
        tier, slots = self._group.cold.tier, self._held.nvme_slots[at[which]]
        load.on_nvme, load.bounce = which, half * (len(self._ring.rows) // 2) + np.arange(len(which))
        stamps = tier.stamps(self._group.index, slots)
        load.ticket = tier.read_layer(self._group.index, slots, load.layer, self._ring.bounce, load.bounce, stamps)

    def _finish(self, load: _Load, *, half: int) -> None:
        """These slices can be computed on once the compute stream gets there."""
        if load.ticket is not None:
            assert load.on_nvme is not None and load.bounce is not None
            load.ticket.event.wait()
            bad = load.on_nvme if load.ticket.event.error is not None else load.on_nvme[~load.ticket.ok]
            if len(bad):
                raise CorruptSliceError(load.blocks[bad])
            self._backend.promote.copy_rows(self._cache.rows, load.rows[load.on_nvme], self._ring.bounce, load.bounce)
        self._open.remove(load)
        event = self._backend.promote.record()
        self._bounce_event[half] = event
        self._backend.compute.wait(event)
        self._filled.append((load.rows, event))
        self._cache.put(load.layer, load.blocks, load.rows)

    def _forget_filled(self) -> None:
        for rows, _ in self._filled:
            self._cache.drop(rows)
        self._filled.clear()

    def _count(self, count: int, num_from_nvme: int) -> None:
        self.counts += SliceCounts(fetched=count)
        add = self._group.counters.add
        for name, n in (("host_to_device", count), ("nvme_to_host", num_from_nvme)):
            if n:
                add("moved_bytes", n * self.slice_bytes, direction=name, reason="select")
                add("moved_slices", n, direction=name, reason="select")
