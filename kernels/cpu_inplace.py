"""Attention over pages where they lie, for few query rows: reading the cache is the whole cost of a decode step.

Runs of neighbouring pages, of one sequence or of several, are the batch axis of one flash call on a view of the pool;
each page gives a partial result and these merge by LSE. Pages in short runs are gathered where that is cheaper than a
call each. Guards: a page is taken whole only when the whole of it is asked for; ends of a range are sliced first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .cpu_layer import PagedLayer
from .cpu_tile import attend_pages

Range = tuple[int, np.ndarray, int, int]  # query row, its sequence's pages, positions [start, end)
MAX_RUN_PAGES = 64  # keeps the partial results of one call in the cache; longer runs gain nothing

# The cost of reading pages by one call each, and by gathering them; measured on two cores with AVX-512.
CALL_US = 13.0  # one call of the flash kernel and the slicing before it
PAGE_HEAD_US = 0.6  # what the kernel spends on starting a page and KV head
GATHER_US, GATHER_HEAD_US = 30.0, 8.0  # starting a gather
GATHERED_BYTES_PER_US = 14_000.0


def is_in_place(layer: PagedLayer, rows: int) -> bool:
    """Say whether this many query rows per KV head are better served in place; else they are worth a copy."""
    has_one_width = layer.k.shape[3] == layer.v.shape[3]
    return layer.use_flash and has_one_width and rows * 2 <= layer.block  # a page's result is smaller than the page


def attend_in_place(layer: PagedLayer, q: Tensor, ranges: list[Range]) -> tuple[Tensor, Tensor]:
    """Attend q [n, H, R, D] to ranges of positions, all visible to the rows they name; every row n needs a key.

    Shapes: out [n, H, R, D] and lse [n, H, R], float32.
    """
    parts = _Parts(layer, q)
    pages, owners = _take_ends(parts, ranges)
    if len(pages):
        # Keys may be taken in any order: in page order, shuffled pages and sequences side by side share runs.
        order = np.argsort(pages, kind="stable")
        if np.count_nonzero(np.diff(pages[order]) != 1) < np.count_nonzero(np.diff(pages) != 1):
            pages, owners = pages[order], owners[order]
        _take_pages(parts, pages, owners)
    return parts.merge()


def _take_ends(parts: _Parts, ranges: list[Range]) -> tuple[np.ndarray, np.ndarray]:
    """Attend to the pages that ranges touch only in part; return the whole pages and which query each is for."""
    block = parts.layer.block
    whole: list[np.ndarray] = []
    owners: list[int] = []
    for owner, pages, start, end in ranges:
        first, last = -(-start // block), end // block  # the whole blocks
        if first > last:  # both ends lie in one block
            parts.view(int(pages[last]), 1, owner, start - last * block, end - last * block)
            continue
        if start < first * block:
            parts.view(int(pages[first - 1]), 1, owner, start - (first - 1) * block, block)
        if end > last * block:
            parts.view(int(pages[last]), 1, owner, 0, end - last * block)
        if first < last:
            whole.append(pages[first:last])
            owners.append(owner)
    if not whole:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(whole), np.repeat(owners, [len(pages) for pages in whole])


def _take_pages(parts: _Parts, pages: np.ndarray, owners: np.ndarray) -> None:
    """Attend to whole pages, in runs where they neighbour each other."""
    layer = parts.layer
    page_bytes = layer.heads * layer.block * (layer.key_width + layer.value_width) * layer.k.dtype.itemsize
    page_us, copy_us = PAGE_HEAD_US * layer.heads, page_bytes / GATHERED_BYTES_PER_US
    short: list[tuple[int, int]] = []
    for a, b in _runs(pages):
        if CALL_US + (b - a) * page_us <= (b - a) * copy_us:
            _take_run(parts, pages, owners, a, b)
        else:
            short.append((a, b))
    num_short = sum(b - a for a, b in short)
    gathers = len(np.unique(np.concatenate([owners[a:b] for a, b in short]))) if short else 0
    gather_us = gathers * (GATHER_US + GATHER_HEAD_US * layer.heads) + num_short * copy_us
    if gather_us < len(short) * CALL_US + num_short * page_us:
        at = np.concatenate([np.arange(a, b) for a, b in short])
        for owner in np.unique(owners[at]).tolist():
            parts.gather(pages[at[owners[at] == owner]], owner)
    else:
        for a, b in short:
            _take_run(parts, pages, owners, a, b)


def _take_run(parts: _Parts, pages: np.ndarray, owners: np.ndarray, a: int, b: int) -> None:
    """Attend to one run, cut so that its partial results stay in the cache."""
    for start in range(a, b, MAX_RUN_PAGES):
        end = min(start + MAX_RUN_PAGES, b)
        mine = owners[start:end]
        owner = int(mine[0]) if end - start == 1 or (mine == mine[0]).all() else mine
        parts.view(int(pages[start]), end - start, owner, 0, parts.layer.block)


def _runs(pages: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut a list of pages into index ranges [a, b) of neighbours."""
    edges = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
    return pairwise(edges)


class _Parts:
    """Partial results of several queries: out [p, H, R, D] and lse [p, H, R], each with the query it belongs to."""

    def __init__(self, layer: PagedLayer, q: Tensor) -> None:
        self.layer, self.q = layer, q
        self.each = q.split(1)  # [1, H, R, D] per query; indexing a tensor costs as much as a small call
        self.outs: list[Tensor] = []
        self.lses: list[Tensor] = []
        self.owners: list[int] = []

    def view(self, page: int, count: int, owner: int | np.ndarray, a: int, b: int) -> None:
        """Attend to token slots [a, b) of neighbouring pages."""
        k, v = self.layer.k.narrow(0, page, count), self.layer.v.narrow(0, page, count)
        if b - a < self.layer.block:
            k, v = k.narrow(2, a, b - a), v.narrow(2, a, b - a)
        if isinstance(owner, int):
            q = self.each[owner]
            if count == 1:
                out, lse = attend_pages(q, k, v, scale=self.layer.scale)
            else:
                out, lse = _merge_pages(*attend_pages(q.expand(count, -1, -1, -1), k, v, scale=self.layer.scale))
            self.owners.append(owner)
        else:
            q = self.q.index_select(0, torch.from_numpy(owner))
            out, lse = attend_pages(q, k, v, scale=self.layer.scale)
            self.owners.extend(owner.tolist())
        self.outs.append(out)
        self.lses.append(lse)

    def gather(self, pages: np.ndarray, owner: int) -> None:
        """Attend to whole pages through the staging buffer."""
        for keys, values in self.layer.staged(pages):
            out, lse = attend_pages(self.each[owner], keys[None], values[None], scale=self.layer.scale)
            self.outs.append(out)
            self.lses.append(lse)
            self.owners.append(owner)

    def merge(self) -> tuple[Tensor, Tensor]:
        """Merge the partial results of each query."""
        out, lse, count = torch.cat(self.outs).float(), torch.cat(self.lses), len(self.each)
        if count == 1:
            return _merge_pages(out, lse) if len(out) > 1 else (out, lse)
        owners = torch.tensor(self.owners)
        top = torch.full((count, *lse.shape[1:]), float("-inf"))
        top.scatter_reduce_(0, owners[:, None, None].expand(lse.shape), lse, "amax")
        weights = torch.exp(lse - top[owners])
        total = torch.zeros(top.shape).index_add_(0, owners, weights)
        merged = torch.zeros(count, *out.shape[1:]).index_add_(0, owners, out.mul_(weights[..., None]))
        return merged.div_(total[..., None]), total.log_().add_(top)


def _merge_pages(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results [p, H, R, D] of one query into one, keeping the first axis; uses `out` as scratch."""
    top = lse.amax(0, keepdim=True)
    weights = torch.exp(lse - top)  # torch.logsumexp takes twice as long as its parts
    total = weights.sum(0, keepdim=True)
    scaled = out.float().mul_(weights[..., None])  # of one dtype: a product of two dtypes is four times slower
    return scaled.sum(0, keepdim=True).div_(total[..., None]), total.log_().add_(top)
