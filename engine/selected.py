"""Selected attention: a step scores every block by its key summary, layer by layer, and reads those that matter most.

The new rows' own blocks and the sinks are always read. Picked blocks that are resident are read on their pages, the others
as layer slices from the pager's cache; the partial results merge by LSE. What the layer picked in the step before is asked
for while the layer before it computes. Guards: the answer is that of attention over exactly the picked blocks, and the
bound that is reported covers all the others.

Source: Quest (arXiv 2406.10774); the second look for a recall target follows from the bound of kernels/selection.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import (
    Selection,
    block_attention,
    merge_states,
    omitted_share,
    paged_attention,
    score_pages,
    select_pages,
    to_device,
)
from ..kernels.compressed import compressed_attention
from ..pager.lease import Lease, Span
from .attending import Attention, SelectionReport
from .attention import LayerPages, slice_views, typed
from .packed import attend_blocks
from .summaries import SummaryBook

IntArray = npt.NDArray[np.int64]
_MAX_REMEMBERED = 256  # sequences whose picks are remembered as guesses


class Picks:
    """What each layer picked in the last step of a sequence; a guess for the next one."""

    def __init__(self) -> None:
        self._by_place: dict[tuple[int, int, int], IntArray] = {}  # (sequence, group, layer) -> block ids
        self._sequences: dict[int, None] = {}

    def note(self, seq: int, group: int, layer: int, blocks: IntArray) -> None:
        if seq not in self._sequences and len(self._sequences) >= _MAX_REMEMBERED:
            self._by_place.clear()
            self._sequences.clear()
        self._sequences[seq] = None
        self._by_place[seq, group, layer] = blocks

    def last(self, seq: int, group: int, layer: int) -> IntArray:
        return self._by_place.get((seq, group, layer), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True)
class _Share:
    """One span of a selected step: its rows in q, its whole context blocks, and how it selects."""

    span: Span
    first: int
    end: int
    attention: Attention
    report: SelectionReport
    summaries: IntArray  # rows of the book, one per whole context block

    @property
    def num_blocks(self) -> int:
        return len(self.summaries)


class SelectedStep:
    """The selection of one lease; its attention function is called once per layer."""

    def __init__(
        self,
        lease: Lease,
        book: SummaryBook,
        picks: Picks,
        asked: Sequence[tuple[Attention, SelectionReport]],
        dtype: torch.dtype,
    ) -> None:
        self._lease, self._book, self._picks, self._dtype = lease, book, picks, dtype
        self._size = book.block_size
        bounds = lease.cu_q.tolist()
        self._shares = [
            _Share(span, a, b, attention, report, book.rows_of(span.seq, span.start // self._size))
            for span, (a, b), (attention, report) in zip(lease.spans, pairwise(bounds), asked, strict=True)
        ]
        for share in self._shares:
            share.report.steps += 1

    def attend(self, pages: LayerPages, q: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """Attend all rows q [T, Hq, D] to what they pick. Returns out, float32, and lse."""
        group, layer = pages.context_group, pages.layer
        selection = self._lease.groups[group].selection
        assert selection is not None
        before = selection.counts
        shares = self._shares_of(pages)
        scores = [self._scores(pages, share, q, scale, softcap) for share in shares]
        chosen = [self._choose(share, found, scale) for share, found in zip(shares, scores, strict=True)]
        kind: dict[str, Any] = dict(scale=scale, softcap=softcap, out_dtype=torch.float32)
        out, lse = self._resident(pages, q, chosen, kind)
        for index, (share, found, picked) in enumerate(zip(shares, scores, chosen, strict=True)):
            rows = slice(share.first, share.end)
            below = picked[selection.pages[index][picked] < 0]
            self._merge_slices(pages, q, out, lse, rows, selection.spans[index][below], kind)
            if share.attention.recall is not None:
                more = _missing_for(share, found, picked, self._lse_of(pages, share, lse), scale, self._size)
                self._merge_more(pages, q, out, lse, index, more, kind)
                picked = np.union1d(picked, more)
            self._report(pages, share, found, picked, self._lse_of(pages, share, lse), scale)
            self._picks.note(share.span.seq, group, layer, selection.spans[index][picked])
            share.report.bytes_of_full += int((selection.pages[index] < 0).sum()) * selection.slice_bytes
        guesses = [self._picks.last(s.span.seq, group, layer + 1) for s in self._shares]
        selection.guess(layer + 1, np.concatenate(guesses))
        share = self._shares[0]  # of several spans the first stands for what all of them fetched
        share.report.note_slices(selection.counts - before, selection.slice_bytes)
        return out, lse

    def _shares_of(self, pages: LayerPages) -> list[_Share]:
        """Of a packed group without what its tail holds, which is read there anyway."""
        if pages.packed is None:
            return self._shares
        kept_from = [int(listed[0]) for listed in self._lease.groups[pages.group].listed]
        return [
            replace(share, summaries=share.summaries[:first])
            for share, first in zip(self._shares, kept_from, strict=True)
        ]

    # ------------------------------------------------------------------ choosing
    def _scores(self, pages: LayerPages, share: _Share, q: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Bounds [1, rows * heads, blocks]: the rows of a span choose together, as if they were heads."""
        heads = pages.k.shape[1]
        grouped = _as_heads(q[share.first : share.end], heads)
        table, count = share.summaries[None], [share.num_blocks]
        scores = score_pages(grouped, self._book.of_layer(pages.context_group, pages.layer), table, count)
        return scores if softcap is None else softcap / scale * torch.tanh(scores * (scale / softcap))

    def _choose(self, share: _Share, scores: Tensor, scale: float) -> IntArray:
        """Logical numbers of the picked whole blocks, ascending."""
        count = share.num_blocks
        num_newest = -(-share.span.end // self._size) - count  # blocks with the new rows, read anyway
        k = max(2, share.attention.pages - num_newest)
        if k >= count:
            return np.arange(count)
        chosen = select_pages(scores, [count], k, scale=scale, keep_first=1, keep_last=1)
        found = chosen.indices[0].cpu().numpy()  # the one look at the device that choosing takes
        return found[found >= 0]

    # ------------------------------------------------------------------ attending
    def _resident(
        self, pages: LayerPages, q: Tensor, chosen: list[IntArray], kind: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Over picked blocks that are resident and the newest ones, causally, in one pass."""
        if pages.packed is not None:
            return self._resident_packed(pages, q, chosen, kind)
        held, size = self._lease.groups[pages.group], self._size
        assert held.selection is not None
        rows, lens = [], []
        for index, (share, picked) in enumerate(zip(self._shares, chosen, strict=True)):
            on_pages = held.selection.pages[index][picked]
            listed = held.listed[index]
            newest = held.tables[index][: len(listed)][listed >= share.num_blocks]
            rows.append(np.concatenate([on_pages[on_pages >= 0], newest]))
            lens.append(share.span.end - (share.num_blocks - int((on_pages >= 0).sum())) * size)
        return paged_attention(q, pages.k, pages.v, _table(rows), lens, self._lease.cu_q, **kind)

    def _resident_packed(
        self, pages: LayerPages, q: Tensor, chosen: list[IntArray], kind: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The newest ones are in the tail, in full precision, and what is picked is packed: two passes."""
        packed, tail, cu_q = pages.packed, self._lease.groups[pages.group], self._lease.cu_q
        selection = self._lease.groups[pages.context_group].selection
        assert packed is not None and selection is not None
        state = paged_attention(q, pages.k, pages.v, tail.tables, tail.kv_lens, cu_q, **kind)
        rows = [on_pages[picked] for on_pages, picked in zip(selection.pages, chosen, strict=True)]
        rows = [row[row >= 0] for row in rows]
        if any(map(len, rows)):
            lens = [len(row) * self._size for row in rows]
            part = compressed_attention(q, packed.pages, packed.fmt, _table(rows), lens, cu_q, **kind)
            state = merge_states(*state, *part)
        return state

    def _merge_slices(
        self,
        pages: LayerPages,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        rows: slice,
        blocks: IntArray,
        kind: dict[str, Any],
    ) -> None:
        """Over picked blocks that are not resident, as they come."""
        if not len(blocks):
            return
        for picked in self._lease.pick(pages.context_group, pages.layer, blocks):
            if pages.packed is not None:
                fetched = typed(picked.rows, torch.uint8)
                part = attend_blocks(pages.packed.fmt, fetched, picked.row_ids, q[rows], **kind)
            else:
                k, v = slice_views(pages.shape, typed(picked.rows, self._dtype), self._size)
                part = block_attention(q[rows], k, v, pages=picked.row_ids, **kind)
            out[rows], lse[rows] = merge_states(out[rows], lse[rows], *part)

    def _merge_more(
        self, pages: LayerPages, q: Tensor, out: Tensor, lse: Tensor, index: int, more: IntArray, kind: dict[str, Any]
    ) -> None:
        """Over blocks that a recall target asks for beyond the first picks."""
        selection, share = self._lease.groups[pages.context_group].selection, self._shares[index]
        assert selection is not None
        rows, on_pages = slice(share.first, share.end), selection.pages[index][more]
        if (on_pages >= 0).any():
            here, packed = on_pages[on_pages >= 0], pages.packed
            if packed is not None:
                part = attend_blocks(packed.fmt, packed.pages, here, q[rows], **kind)
            else:
                part = block_attention(q[rows], pages.k, pages.v, pages=here, **kind)
            out[rows], lse[rows] = merge_states(out[rows], lse[rows], *part)
        self._merge_slices(pages, q, out, lse, rows, selection.spans[index][more[on_pages < 0]], kind)

    # ------------------------------------------------------------------ telling
    def _lse_of(self, pages: LayerPages, share: _Share, lse: Tensor) -> Tensor:
        """[1, rows * heads], in the order of the scores."""
        return _as_heads(lse[share.first : share.end, :, None], pages.k.shape[1])[..., 0]

    def _report(
        self, pages: LayerPages, share: _Share, scores: Tensor, picked: IntArray, lse: Tensor, scale: float
    ) -> None:
        report = share.report
        num_newest = -(-share.span.end // self._size) - share.num_blocks
        report.pages_read += len(picked) + num_newest
        report.pages_total += share.num_blocks + num_newest
        left_out = omitted_share(scores, _selection(scores, picked), lse, scale=scale, block=self._size)
        report.note_bound(*torch.stack([left_out.max(), left_out.mean()]).tolist())


def _table(rows: list[IntArray]) -> IntArray:
    """Rows of pages of different lengths as a block table, -1 behind their ends."""
    table = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _as_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Rows [r, Hq, D] as one row [1, kv_heads * r * group, D] whose heads keep their KV head."""
    rows, heads, width = x.shape
    return x.view(rows, kv_heads, heads // kv_heads, width).transpose(0, 1).reshape(1, rows * heads, width)


def _selection(scores: Tensor, picked: IntArray) -> Selection:
    at = to_device(picked, scores.device)
    chosen = torch.zeros(1, scores.shape[2], dtype=torch.bool, device=scores.device)
    chosen[0, at] = True
    return Selection(at[None], torch.full((1,), len(picked), device=scores.device), chosen)


def _missing_for(share: _Share, scores: Tensor, picked: IntArray, lse: Tensor, scale: float, block: int) -> IntArray:
    """The further blocks without which some head might leave out more than the recall target allows.

    Reading more only adds to what is read, so the weight read so far decides, and one look is enough.
    """
    recall = share.attention.recall
    assert recall is not None
    weights = torch.exp((scores[0] * scale + float(np.log(block)) - lse[0, :, None]).double().clamp(max=700.0))
    weights[:, to_device(picked, scores.device)] = 0.0
    order = weights.amax(0).argsort(descending=True)
    behind = weights[:, order].flip(1).cumsum(1).flip(1)  # of each block in this order and all after it
    is_small = (behind <= (1 - recall) / recall).all(0)
    count = torch.where(is_small.any(), is_small.int().argmax(), len(order))
    told = torch.cat([count[None], order]).cpu().numpy()  # one look at the device, not three
    return np.sort(np.setdiff1d(told[1 : 1 + told[0]], picked))
