"""Key summaries of every block of the sequences that select: in the device tier, wherever the blocks themselves live.

A summary is named by its block's key, so sequences with one prefix share it, and no reuse of ids can make it speak of other
tokens. It is written when a block fills, and for blocks that were resumed or found in the cache while the first step over
them reads them all anyway (`Summarizer`): nothing of it is stored on disk. Of a packed block it is that of the keys as they
unpack; where the tiers below keep blocks in fewer bits it is widened to cover what they give back. Guards: a row is believed
only after the step that wrote it was committed; rows that a step uses do not leave during it; no key that any tier gives
back lies outside its summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import PageFormat, summarize_blocks, summarize_pages, widen_summaries
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from .attention import LayerPages, typed

IntArray = npt.NDArray[np.int64]
NOWHERE = -1
_MAX_KNOWN = 1024  # sequences whose rows are remembered between steps


@dataclass(slots=True)
class _Known:
    """Rows of a sequence's first blocks as they were found last."""

    last_key: bytes
    rows: IntArray
    serials: IntArray


class SummaryBook:
    """Rows of key summaries, one per block for all full-attention groups; the least recently used make room."""

    def __init__(self, pager: Pager, dtype: torch.dtype) -> None:
        self._pager, self._size = pager, pager.block_size
        self._tensors: list[Tensor | None] = []
        self._roundings: list[list[list[PageFormat]]] = []  # [group][layer]: formats that move its keys
        num_rows = []
        for index, layout in enumerate(pager.layouts):
            rows, formats = pager.summary_rows(index), pager.roundings(index)
            layers = range(layout.num_layers)
            self._roundings.append([[fmt for one in formats if (fmt := one.layers[i]) is not None] for i in layers])
            if layout.window is not None:
                self._tensors.append(None)
                continue
            shape = (layout.num_layers, len(rows), layout.num_kv_heads, 2, layout.head_dim)
            self._tensors.append(typed(rows.reshape(-1), dtype).view(shape))
            num_rows.append(len(rows))
        count = min(num_rows, default=0)
        self._row_at: dict[bytes, int] = {}
        self._key: list[bytes | None] = [None] * count
        self._serial, self._used = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._free = list(range(count - 1, -1, -1))
        self._pending: dict[bytes, int] = {}
        self._known: dict[int, _Known] = {}
        self._now = 0

    def __len__(self) -> int:
        return len(self._key)

    @property
    def block_size(self) -> int:
        return self._size

    def covers(self, group: int) -> bool:
        """Whether the group has summaries: those with full attention."""
        return self._tensors[group] is not None

    def begin(self) -> None:
        """A step begins: what it finds or claims stays until the next one does."""
        self.give_up()
        self._now += 1

    def of_layer(self, group: int, layer: int) -> Tensor:
        """Summaries [rows, kv_heads, 2, head_dim] of one layer."""
        tensor = self._tensors[group]
        assert tensor is not None
        return tensor[layer]

    def write(self, pages: LayerPages, source: Tensor, blocks: IntArray, rows: IntArray) -> None:
        """Summarise these blocks of a layer, for whatever form a tier gives them back in.

        source: packed blocks [m, layer_bytes] where the layer is packed, else k [m, kv_heads, block, head_dim].
        """
        group, target = pages.context_group, self.of_layer(pages.context_group, pages.layer)
        if pages.packed is not None:
            summarize_pages(source, blocks, pages.packed.fmt, target, rows)
        else:
            summarize_blocks(source, blocks, target, rows)
        for fmt in self._roundings[group][pages.layer]:
            widen_summaries(target, rows, fmt)

    def rows_of(self, seq: int, num_blocks: int) -> IntArray:
        """Rows of the sequence's first blocks, NOWHERE where there is none. Looks only at what is new since last time."""
        known = self._still_known(seq, num_blocks)
        first = len(known.rows) if known is not None else 0
        keys = self._pager.block_keys(seq, first * self._size, num_blocks * self._size)
        found = np.fromiter((self._row_at.get(key, NOWHERE) for key in keys), np.int64, len(keys))
        rows = found if known is None else np.concatenate([known.rows, found])
        held = rows[rows >= 0]
        self._used[held] = self._now
        complete = len(rows) if len(held) == len(rows) else int(np.argmax(rows < 0))
        if complete > first:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[seq] = _Known(keys[complete - first - 1], rows[:complete], self._serial[rows[:complete]])
        return rows

    def claim(self, seq: int, rows: IntArray, wanted: IntArray) -> IntArray:
        """Rows for these blocks of the sequence, to be written in this step; fewer, or none, where there is no room.

        `rows`: what rows_of said. Returns the blocks that got one; `rows` is filled in.
        """
        wanted = wanted[: self._make_room(len(wanted))]
        for block in wanted.tolist():  # a block or two in a decode step, a chunk's in a prefill step
            (key,) = self._pager.block_keys(seq, block * self._size, (block + 1) * self._size)
            if key not in self._pending:
                row = self._free.pop()
                self._pending[key] = row
                self._key[row] = key
                self._serial[row] += 1
                self._used[row] = self._now
            rows[block] = self._pending[key]
        return wanted

    def publish(self) -> None:
        """The step that wrote what was claimed is committed."""
        self._row_at.update(self._pending)
        self._pending.clear()

    def give_up(self) -> None:
        """What was claimed and not published means nothing."""
        for row in self._pending.values():
            self._key[row] = None
            self._free.append(row)
        self._pending.clear()

    def _still_known(self, seq: int, num_blocks: int) -> _Known | None:
        known = self._known.get(seq)
        if known is None or not 0 < len(known.rows) <= num_blocks:
            return None
        count = len(known.rows)
        (key,) = self._pager.block_keys(seq, (count - 1) * self._size, count * self._size) or (b"",)
        if key != known.last_key or not np.array_equal(self._serial[known.rows], known.serials):
            return None
        return known

    def _make_room(self, count: int) -> int:
        short = count - len(self._free)
        if short > 0:
            old = np.flatnonzero((self._used < self._now) & np.array([key is not None for key in self._key], bool))
            for row in old[np.argsort(self._used[old])][:short].tolist():
                key = self._key[row]
                assert key is not None
                del self._row_at[key]
                self._key[row] = None
                self._serial[row] += 1
                self._free.append(row)
        return min(count, len(self._free))


@dataclass(slots=True)
class _Part:
    """What one span writes in one group: summaries `rows` of blocks that lie on pages, and of blocks that are staged."""

    pages: IntArray
    page_rows: IntArray
    staged: IntArray = field(default_factory=lambda: np.empty(0, np.int64))  # row, or NOWHERE, per streamed block


class Summarizer:
    """Writes the missing summaries of some spans while a plain step reads their blocks."""

    def __init__(
        self, book: SummaryBook, lease: Lease, spans: Sequence[Span], which: Sequence[int], reads: bool
    ) -> None:
        self._book, self._parts = book, [list[_Part]() for _ in lease.groups]
        wide = [(number, group) for number, group in enumerate(lease.groups) if book.covers(number)]
        for index in which:
            full = spans[index].end // book.block_size
            rows = book.rows_of(spans[index].seq, full)
            missing = rows < 0
            for _, group in wide:  # what this step sees: blocks on pages and, where it reads all layers, staged ones
                if group.stream is None or not reads:
                    listed = group.listed[index]
                    missing &= np.isin(np.arange(full), listed[listed < full])
            book.claim(spans[index].seq, rows, np.flatnonzero(missing))
            wrote = missing & (rows >= 0)
            for number, group in wide:
                self._add(number, group.listed[index], group.tables[index], rows, wrote)

    def _add(
        self, group: int, listed: IntArray, table: npt.NDArray[np.int32], rows: IntArray, wrote: npt.NDArray[np.bool_]
    ) -> None:
        """`listed`: logical blocks on the pages of the table; all others before the end are streamed, in order."""
        full = len(rows)
        at = np.flatnonzero(listed < full)
        at = at[wrote[listed[at]]]
        streamed = np.setdiff1d(np.arange(full), listed)
        staged = np.where(wrote[streamed], rows[streamed], NOWHERE)
        self._parts[group].append(_Part(table[at].astype(np.int64), rows[listed[at]], staged))

    def resident(self, pages: LayerPages) -> None:
        """Of blocks on pages, once this layer's new keys are written, and packed."""
        source = pages.k if pages.packed is None else pages.packed.pages
        for part in self._parts[pages.context_group]:
            if len(part.pages):
                self._book.write(pages, source, part.pages, part.page_rows)

    def staged(self, pages: LayerPages, places: IntArray, source: Tensor, blocks: IntArray) -> None:
        """Of some streamed blocks, by their places among all of them; source and blocks as `write` takes them."""
        for part in self._parts[pages.context_group]:
            rows = part.staged[places]
            at = np.flatnonzero(rows >= 0)
            if len(at):
                self._book.write(pages, source, blocks[at], rows[at])
