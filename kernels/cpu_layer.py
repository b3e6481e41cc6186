"""One layer's pages on a CPU, gathered: staging, tiles, and the running result that tiles merge into.

Pages are gathered head by head into a small buffer that is kept, where they are one dense stretch of keys; right for
many query rows (prefill), for which the copy is small beside the arithmetic. Guards: whole pages may be copied, but
only valid token slots leave the staging buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from .cpu_tile import Visible, attend_tile, can_flash

STAGING_BYTES = 16 << 20  # pieces of 512 tokens cost a 2,048-row prefill 15 %, these nothing
MANY_ROWS = 1024  # rows of one KV head that keep all threads busy, so that heads can be staged one at a time


class Scratch(threading.local):
    """One buffer per thread, kept between calls: fresh large buffers cost page faults, not just bytes."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, rows: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Carve two tensors [rows, tokens, width] out of the buffer; the last ones taken are gone."""
        first, second = self.rooms([(rows, tokens, width) for width in widths], dtype)
        return first, second

    def rooms(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        """Carve tensors of these shapes out of the buffer; the last ones taken are gone."""
        counts = [prod(shape) for shape in shapes]
        sizes = [-(-count // 64) * 64 * dtype.itemsize for count in counts]
        if self.memory is None or self.memory.numel() < sum(sizes):
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                self.memory = torch.empty(max(sum(sizes), STAGING_BYTES), dtype=torch.uint8)
        parts = self.memory[: sum(sizes)].split(sizes)
        return [p.view(dtype)[:count].view(shape) for p, count, shape in zip(parts, counts, shapes)]


scratch = Scratch()


class Partial:
    """The running result of some rows: float32 out [H, G, T, Dv] and LSE [H, G, T], merged in place."""

    def __init__(self, heads: int, group: int, tokens: int, value_dim: int) -> None:
        self.out = torch.empty(heads, group, tokens, value_dim)
        self.lse = torch.empty(heads, group, tokens)
        self.has_result = [False] * heads

    def add(self, heads: slice, out: Tensor, lse: Tensor) -> None:
        """Merge a result [h, G, t, Dv] for the first t tokens, each of which saw a key; the first one covers all."""
        tokens = lse.shape[2]
        mine_out, mine_lse = self.out[heads, :, :tokens], self.lse[heads, :, :tokens]
        if not self.has_result[heads.start]:
            mine_out.copy_(out)
            mine_lse.copy_(lse)
            self.has_result[heads] = [True] * (heads.stop - heads.start)
            return
        mine_out.lerp_(out.to(torch.float32), torch.sigmoid(lse - mine_lse)[..., None])
        torch.logaddexp(mine_lse, lse, out=mine_lse)

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Write out [T, Hq, Dv] and lse [T, Hq]; no keys at all give zeros and -inf."""
        if not self.has_result[0]:
            out.zero_()
            lse.fill_(float("-inf"))
            return
        heads, group, tokens, value_dim = self.out.shape
        out.view(tokens, heads, group, value_dim).copy_(self.out.permute(2, 0, 1, 3))
        lse.view(tokens, heads, group).copy_(self.lse.permute(2, 0, 1))


class PagedLayer:
    """Attention over one layer's pages: the cache, the score function, and how partial results are made."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> None:
        self.k, self.v, self.scale, self.softcap = k, v, scale, softcap
        self.heads, self.block = k.shape[1], k.shape[2]
        self.use_flash = can_flash(k.dtype, softcap)
        widest = max(k.shape[3], v.shape[3])  # the flash kernel wants equal widths: pad with zero columns
        self.key_width, self.value_width = (widest, widest) if self.use_flash else (k.shape[3], v.shape[3])

    def fold(self, q: Tensor) -> Tensor:
        """Order queries [T, Hq, D] by KV head: [H, G, T, width]."""
        tokens, query_heads, dim = q.shape
        q = q.to(self.k.dtype).view(tokens, self.heads, query_heads // self.heads, dim).permute(1, 2, 0, 3)
        if self.key_width != dim:
            q = torch.nn.functional.pad(q, (0, self.key_width - dim))
        return q.contiguous()

    def attend_masked(
        self, q: Tensor, pages: np.ndarray, start: int, end: int, visible: Visible, partial: Partial
    ) -> None:
        """Add the keys at positions [start, end), of which row i of q [H, G, T, width] sees visible[i], not none."""
        first, last = start // self.block, -(-end // self.block)
        ids = torch.from_numpy(pages[first:last])
        for heads in self._head_groups(q, last - first):
            keys, values = self._stage(ids, heads, start - first * self.block, end - first * self.block)
            self._add_tile(q, heads, keys, values, visible, partial)

    def _add_tile(
        self, q: Tensor, heads: slice, keys: Tensor, values: Tensor, visible: Visible, partial: Partial
    ) -> None:
        out, lse = attend_tile(q[heads], keys, values, scale=self.scale, softcap=self.softcap, visible=visible)
        partial.add(heads, out[..., : self.v.shape[3]], lse)

    def attend(self, q: Tensor, pages: np.ndarray, start: int, end: int, partial: Partial) -> None:
        """Add the keys at positions [start, end), all visible to every row of q [H, G, T, width], piece by piece."""
        first, last = start // self.block, -(-end // self.block)
        ids = torch.from_numpy(pages[first:last])
        for heads in self._head_groups(q, last - first):
            step = self._capacity(heads)
            for a in range(first, last, step):
                b = min(a + step, last)
                from_slot, to_slot = max(start - a * self.block, 0), min(end, b * self.block) - a * self.block
                keys, values = self._stage(ids[a - first : b - first], heads, from_slot, to_slot)
                self._add_tile(q, heads, keys, values, None, partial)

    def staged(self, pages: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Gather whole pages; yield keys and values [H, tokens, width], valid until the next are taken."""
        every, step = slice(0, self.heads), self._capacity(slice(0, self.heads))
        for a in range(0, len(pages), step):
            ids = torch.from_numpy(pages[a : a + step])
            yield self._stage(ids, every, 0, len(ids) * self.block)

    def num_pieces(self, num_pages: int) -> int:
        """How many pieces `staged` yields for that many pages."""
        return -(-num_pages // self._capacity(slice(0, self.heads)))

    def _capacity(self, heads: slice) -> int:
        """Return how many blocks of these heads fit the staging buffer, at least one."""
        block_bytes = self.block * (self.key_width + self.value_width) * self.k.dtype.itemsize
        return max(1, STAGING_BYTES // (block_bytes * (heads.stop - heads.start)))

    def _head_groups(self, q: Tensor, num_blocks: int) -> Iterator[slice]:
        """Stage all heads together when they fit or when one head's rows would leave threads idle, else one by one."""
        every = slice(0, self.heads)
        if q.shape[1] * q.shape[2] < MANY_ROWS or num_blocks <= self._capacity(every):
            yield every
        else:
            yield from (slice(h, h + 1) for h in range(self.heads))

    def _stage(self, ids: Tensor, heads: slice, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Gather pages of some heads; return keys and values [heads, tokens, width] of token slots [start, end)."""
        count, widths = heads.stop - heads.start, (self.key_width, self.value_width)
        keys, values = scratch.take(count, len(ids) * self.block, widths, self.k.dtype)
        for i in range(count):
            _gather(self.k[:, heads.start + i], ids, keys[i])
            _gather(self.v[:, heads.start + i], ids, values[i])
        return keys[:, start:end], values[:, start:end]


def _gather(pages: Tensor, ids: Tensor, target: Tensor) -> None:
    """Gather one head's pages [pages, block, D] into target [tokens, width >= D]; further columns become zero."""
    block, dim = pages.shape[1:]
    target = target.view(len(ids), block, -1)
    if target.shape[2] == dim:
        torch.index_select(pages, 0, ids, out=target)
    else:
        target[..., :dim] = pages.index_select(0, ids)
        target[..., dim:] = 0
