"""Attention over pages where they lie, for few query rows: reading the cache is the whole cost of a decode step.

Runs of neighbouring pages, of one sequence or of several, are the batch axis of one flash call on a view of the pool;
each page gives a partial result and these merge by LSE. Pages in short runs are gathered where that is cheaper than a
call each. Guards: a page is taken whole only when the whole of it is asked for; ends of a range are sliced first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .cpu_layer import PagedLayer
from .cpu_tile import attend_pages

Range = tuple[int, np.ndarray, int, int]  # query row, its sequence's pages, positions [start, end)
Slices = Sequence[tuple[Tensor, Tensor]]
MAX_RUN_PAGES = 512  # so many partial results are merged at once: 4 MiB of 32 heads; each merge wakes all threads

# The cost of reading pages by one call each, and by gathering them; measured on two cores with AVX-512.
CALL_US = 13.0  # one call of the flash kernel and the slicing before it
PAGE_HEAD_US = 0.6  # what the kernel spends on starting a page and KV head
GATHER_US, GATHER_HEAD_US = 30.0, 8.0  # starting a gather
GATHERED_BYTES_PER_US = 14_000.0


def is_in_place(layer: PagedLayer, rows: int) -> bool:
    """Say whether this many query rows per KV head are better served in place; else they are worth a copy."""
    has_one_width = layer.k.shape[3] == layer.v.shape[3]
    return layer.use_flash and has_one_width and rows * 2 <= layer.block  # a page's result is smaller than the page


@dataclass(frozen=True, slots=True)
class View:
    """Token slots [a, b) of `count` neighbouring pages, for one query row or one per page."""

    page: int
    count: int
    owner: int | Tensor
    a: int
    b: int

    def of(self, pool: Tensor, slots_axis: int) -> Tensor:
        """These token slots of a pool [pages, ..., token slots, dim]."""
        part = pool.narrow(0, self.page, self.count)
        if self.b - self.a < pool.shape[slots_axis]:
            part = part.narrow(slots_axis, self.a, self.b - self.a)
        return part


@dataclass(frozen=True, slots=True)
class Reading:
    """How pages are read for some query rows: the same for every layer of a step, so worked out once."""

    views: tuple[View, ...]
    gathers: tuple[tuple[np.ndarray, int], ...]  # whole pages to copy together, and their query row
    num_queries: int
    merges_early: bool  # many partial results: those of one view are merged while they are in the cache
    owners: Tensor  # of several queries: the row of each partial result, in the order in which they are made


def plan_reading(layer: PagedLayer, num_queries: int, ranges: list[Range]) -> Reading:
    """Decide how to read ranges of positions, all visible to the rows they name; every row needs a key."""
    views: list[View] = []
    gathers: list[tuple[np.ndarray, int]] = []
    pages, owners = _plan_ends(views, layer.block, ranges)
    if len(pages):
        # Keys may be taken in any order: in page order, shuffled pages and sequences side by side share runs.
        if jumps := _num_jumps(pages):
            order = np.argsort(pages, kind="stable")
            if _num_jumps(pages[order]) < jumps:
                pages, owners = pages[order], owners[order]
        _plan_pages(views, gathers, layer, pages, owners)
    made: list[int] = []  # of one query nobody asks
    for view in views if num_queries > 1 else ():
        made.extend([view.owner] if isinstance(view.owner, int) else view.owner.tolist())
    for taken, owner in gathers if num_queries > 1 else ():
        made.extend([owner] * layer.num_pieces(len(taken)))
    merges_early = num_queries > 1 or sum(view.count for view in views) > MAX_RUN_PAGES
    return Reading(tuple(views), tuple(gathers), num_queries, merges_early, torch.tensor(made))


def attend_in_place(
    layer: PagedLayer, q: Tensor, reading: Reading, *, with_lse: bool = True, slices: Slices | None = None
) -> tuple[Tensor, Tensor]:
    """Attend q [n, H, R, D] to what the reading names; `slices`: K and V of its views, where they are at hand.

    Shapes: out [n, H, R, D] and lse [n, H, R], float32; lse may be empty without `with_lse`.
    """
    # [1, H, R, D] per query; indexing a tensor costs as much as a small call
    each = q.split(1) if reading.num_queries > 1 else (q,)
    if slices is None:
        slices = [(view.of(layer.k, 2), view.of(layer.v, 2)) for view in reading.views]
    parts = [
        _attend_view(q, each, view, k, v, layer.scale, reading.merges_early)
        for view, (k, v) in zip(reading.views, slices, strict=True)
    ]
    for pages, owner in reading.gathers:
        for keys, values in layer.staged(pages):
            parts.append(attend_pages(each[owner], keys[None], values[None], scale=layer.scale))
    if len(parts) == 1:
        out, lse = parts[0]
    else:  # those that were merged early are float32
        out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    if reading.num_queries == 1 and len(out) > 1:
        return merge_pages(out, lse, with_lse=with_lse)
    out = out if out.dtype == torch.float32 else out.float()
    return (out, lse) if reading.num_queries == 1 else _merge_by_owner(out, lse, reading)


def _attend_view(
    q: Tensor, each: tuple[Tensor, ...], view: View, k: Tensor, v: Tensor, scale: float, merges_early: bool
) -> tuple[Tensor, Tensor]:
    if not isinstance(view.owner, int):
        return attend_pages(q.index_select(0, view.owner), k, v, scale=scale)
    mine = each[view.owner]
    if view.count == 1:
        return attend_pages(mine, k, v, scale=scale)
    out, lse = attend_pages(mine.expand(view.count, -1, -1, -1), k, v, scale=scale)
    return merge_pages(out, lse) if merges_early else (out, lse)


def _plan_ends(views: list[View], block: int, ranges: list[Range]) -> tuple[np.ndarray, np.ndarray]:
    """Views of the pages that ranges touch only in part; return the whole pages and which query each is for."""
    whole: list[np.ndarray] = []
    owners: list[int] = []
    for owner, pages, start, end in ranges:
        first, last = -(-start // block), end // block  # the whole blocks
        if first > last:  # both ends lie in one block
            views.append(View(int(pages[last]), 1, owner, start - last * block, end - last * block))
            continue
        if start < first * block:
            views.append(View(int(pages[first - 1]), 1, owner, start - (first - 1) * block, block))
        if end > last * block:
            views.append(View(int(pages[last]), 1, owner, 0, end - last * block))
        if first < last:
            whole.append(pages[first:last])
            owners.append(owner)
    if not whole:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(whole), np.repeat(owners, [len(pages) for pages in whole])


def _plan_pages(
    views: list[View],
    gathers: list[tuple[np.ndarray, int]],
    layer: PagedLayer,
    pages: np.ndarray,
    owners: np.ndarray,
) -> None:
    """Read whole pages in runs where they neighbour each other, and gather those in short runs where that is cheaper."""
    page_bytes = layer.heads * layer.block * (layer.key_width + layer.value_width) * layer.k.dtype.itemsize
    page_us, copy_us = PAGE_HEAD_US * layer.heads, page_bytes / GATHERED_BYTES_PER_US
    short: list[tuple[int, int]] = []
    for a, b in _runs(pages):
        if CALL_US + (b - a) * page_us <= (b - a) * copy_us:
            _plan_run(views, layer.block, pages, owners, a, b)
        else:
            short.append((a, b))
    num_short = sum(b - a for a, b in short)
    num_gathers = len(np.unique(np.concatenate([owners[a:b] for a, b in short]))) if short else 0
    gather_us = num_gathers * (GATHER_US + GATHER_HEAD_US * layer.heads) + num_short * copy_us
    if gather_us < len(short) * CALL_US + num_short * page_us:
        at = np.concatenate([np.arange(a, b) for a, b in short])
        for owner in np.unique(owners[at]).tolist():
            gathers.append((pages[at[owners[at] == owner]], owner))
    else:
        for a, b in short:
            _plan_run(views, layer.block, pages, owners, a, b)


def _plan_run(views: list[View], block: int, pages: np.ndarray, owners: np.ndarray, a: int, b: int) -> None:
    """Views of one run, cut so that their partial results stay few."""
    for start in range(a, b, MAX_RUN_PAGES):
        end = min(start + MAX_RUN_PAGES, b)
        mine = owners[start:end]
        is_one = end - start == 1 or bool((mine == mine[0]).all())
        owner = int(mine[0]) if is_one else torch.from_numpy(np.ascontiguousarray(mine))
        views.append(View(int(pages[start]), end - start, owner, 0, block))


def _num_jumps(pages: np.ndarray) -> int:
    """Places where a page does not follow the one before it."""
    return int(np.count_nonzero(pages[1:] - pages[:-1] != 1))


def _runs(pages: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut a list of pages into index ranges [a, b) of neighbours."""
    edges = [0, *(np.flatnonzero(pages[1:] - pages[:-1] != 1) + 1).tolist(), len(pages)]
    return pairwise(edges)


def _merge_by_owner(out: Tensor, lse: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """Merge partial results [p, H, R, D] of several queries; uses `out` as scratch."""
    count, owners = reading.num_queries, reading.owners
    top = torch.full((count, *lse.shape[1:]), float("-inf"))
    top.scatter_reduce_(0, owners[:, None, None].expand(lse.shape), lse, "amax")
    weights = torch.exp(lse - top[owners])
    total = torch.zeros(top.shape).index_add_(0, owners, weights)
    merged = torch.zeros(count, *out.shape[1:]).index_add_(0, owners, out.mul_(weights[..., None]))
    return merged.div_(total[..., None]), total.log_().add_(top)


def merge_pages(out: Tensor, lse: Tensor, *, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Merge partial results [p, H, R, D] of one query into one, [1, H, R, D] in float32.

    Cost: a decode step makes these calls for every layer, with caches that the weights have just swept: each one counts.
    """
    # Over the last axis: over another one torch's softmax wakes all threads, however small the tensor is.
    weights = lse.permute(1, 2, 0).softmax(-1)
    merged = weigh(out, weights)
    if not with_lse:
        return merged, lse[:0]
    # The heaviest part weighs exp(its lse - the lse of all), at least 1/p: nothing is lost in this difference.
    return merged, lse.amax(0, keepdim=True).sub_(weights.amax(-1)[None].log_())


def weigh(out: Tensor, weights: Tensor) -> Tensor:
    """Sum partial results [p, H, R, D] with weights [H, R, p] to [1, H, R, D] in float32.

    As products of matrices, from a copy in their order: a third faster than to multiply and to sum over the first axis.
    """
    parts, heads, rows, dim = out.shape
    ordered = out.permute(1, 2, 0, 3).reshape(heads * rows, parts, dim)
    return torch.bmm(weights.reshape(heads * rows, 1, parts), ordered.float()).view(1, heads, rows, dim)
