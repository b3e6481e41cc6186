"""The CPU path: attention over pages without copying the cache where that can be helped.

Reading the cache is the cost on a CPU, so few query rows (decode, short turns) attend to whole pages in place: a run
of neighbouring pages is the batch axis of one flash call, and the partial results merge by LSE. Many rows (prefill) pay
for a copy: pages are gathered head by head into a small buffer that is kept, where they are one dense stretch of keys.
Guards: only valid token slots are read; whole pages are taken whole, ends of a range are sliced first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .cpu_tile import Visible, attend_pages, attend_tile, can_flash

STAGING_BYTES = 16 << 20  # long pieces keep the merges below 3 % of a 2,048-row prefill
MIN_VIEW_TOKENS = 64  # smaller pages are gathered: the flash kernel on 16-token pages runs at a third of its speed
MIN_VIEW_BYTES = 256 << 10  # shorter runs are gathered: a call costs about 14 us, the time to copy this much
MANY_ROWS = 1024  # rows of one KV head that keep all threads busy, so that heads can be staged one at a time
MAX_QUERY_TILE = 4096  # rows of one sequence handled at once; bounds the float32 accumulators
WINDOW_QUERY_TILE = 512  # likewise under a window, where a tile masks as many keys at the window's edge as it has rows


class _Scratch(threading.local):
    """One buffer per thread, kept between calls: fresh large buffers cost page faults, not just bytes."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def take(self, rows: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Carve two tensors [rows, tokens, width] out of the buffer; the last pair taken is gone."""
        sizes = [-(-rows * tokens * width // 64) * 64 * dtype.itemsize for width in widths]
        if self.memory is None or self.memory.numel() < sum(sizes):
            with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
                self.memory = torch.empty(max(sum(sizes), STAGING_BYTES), dtype=torch.uint8)
        parts = self.memory[: sum(sizes)].split(sizes)
        first, second = (p.view(dtype)[: rows * tokens * w].view(rows, tokens, w) for p, w in zip(parts, widths))
        return first, second


_scratch = _Scratch()


class _Partial:
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
        total = torch.logaddexp(mine_lse, lse)
        mine_out.lerp_(out.to(torch.float32), torch.exp(lse - total)[..., None])
        mine_lse.copy_(total)

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Write out [T, Hq, Dv] and lse [T, Hq]; no keys at all give zeros and -inf."""
        if not self.has_result[0]:
            out.zero_()
            lse.fill_(float("-inf"))
            return
        heads, group, tokens, value_dim = self.out.shape
        out.view(tokens, heads, group, value_dim).copy_(self.out.permute(2, 0, 1, 3))
        lse.view(tokens, heads, group).copy_(self.lse.permute(2, 0, 1))


class _Attention:
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

    def attend(self, q: Tensor, pages: np.ndarray, start: int, end: int, partial: _Partial) -> None:
        """Add the keys at positions [start, end), all visible to every row of q [H, G, T, width]."""
        if end <= start:
            return
        is_small = q.shape[1] * q.shape[2] * 2 <= self.block  # a page's partial result is smaller than the page
        can_view = self.use_flash and self.block >= MIN_VIEW_TOKENS and self.k.shape[3] == self.v.shape[3]
        if is_small and can_view:
            self._attend_in_place(q, pages, start, end, partial)
        else:
            self._attend_gathered(q, pages, start, end, partial)

    def attend_masked(
        self, q: Tensor, pages: np.ndarray, start: int, end: int, visible: Visible, partial: _Partial
    ) -> None:
        """Add the keys at positions [start, end), of which row i of q [H, G, T, width] sees visible[i], not none."""
        first, last = start // self.block, -(-end // self.block)
        ids = torch.from_numpy(pages[first:last])
        for heads in self._head_groups(q, last - first):
            keys, values = self._stage(ids, heads, start - first * self.block, end - first * self.block)
            self._add_tile(q, heads, keys, values, visible, partial)

    def _add_tile(
        self, q: Tensor, heads: slice, keys: Tensor, values: Tensor, visible: Visible, partial: _Partial
    ) -> None:
        out, lse = attend_tile(q[heads], keys, values, scale=self.scale, softcap=self.softcap, visible=visible)
        partial.add(heads, out[..., : self.v.shape[3]], lse)

    def _attend_in_place(self, q: Tensor, pages: np.ndarray, start: int, end: int, partial: _Partial) -> None:
        """Take runs of neighbouring whole pages as they lie; gather the pages of short runs."""
        rows = q.flatten(1, 2)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        short: list[np.ndarray] = []
        page_bytes = self.heads * self.block * (self.key_width + self.value_width) * self.k.dtype.itemsize
        for run, a, b in _runs(pages, start, end, self.block):
            if len(run) * page_bytes >= MIN_VIEW_BYTES or b - a < self.block:
                view = slice(int(run[0]), int(run[-1]) + 1)
                out, lse = attend_pages(rows, self.k[view, :, a:b], self.v[view, :, a:b], scale=self.scale)
                outs.append(out)
                lses.append(lse)
            else:
                short.append(run)
        if outs:
            out, lse = _combine(outs, lses)
            partial.add(slice(0, self.heads), out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3]))
        if short:
            ids = np.concatenate(short)
            self._attend_gathered(q, ids, 0, len(ids) * self.block, partial)

    def _attend_gathered(self, q: Tensor, pages: np.ndarray, start: int, end: int, partial: _Partial) -> None:
        """Gather pages into the staging buffer piece by piece."""
        block = self.block
        first, last = start // block, -(-end // block)
        ids = torch.from_numpy(pages[first:last])
        for heads in self._head_groups(q, last - first):
            step = self._capacity(heads)
            for a in range(first, last, step):
                b = min(a + step, last)
                keys, values = self._stage(
                    ids[a - first : b - first], heads, max(start - a * block, 0), min(end, b * block) - a * block
                )
                self._add_tile(q, heads, keys, values, None, partial)

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
        keys, values = _scratch.take(count, len(ids) * self.block, widths, self.k.dtype)
        for i in range(count):
            _gather(self.k[:, heads.start + i], ids, keys[i])
            _gather(self.v[:, heads.start + i], ids, values[i])
        return keys[:, start:end], values[:, start:end]


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: np.ndarray,
    kv_lens: np.ndarray,
    cu_q: np.ndarray,
    *,
    scale: float,
    window: int | None,
    sinks: int,
    softcap: float | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attend a packed batch; arguments are checked by the caller."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype)
    lse = torch.empty(q.shape[:2])
    attention = _Attention(k, v, scale, softcap)
    tile = MAX_QUERY_TILE if window is None else min(WINDOW_QUERY_TILE, window)
    for s, kv_len in enumerate(kv_lens.tolist()):
        start, stop = int(cu_q[s]), int(cu_q[s + 1])
        for a in range(start, stop, tile):
            b = min(a + tile, stop)
            partial = _Partial(k.shape[1], q.shape[1] // k.shape[1], b - a, v.shape[3])
            if kv_len:
                position = kv_len - (stop - a)
                _attend_span(attention, attention.fold(q[a:b]), table[s], position, window, sinks, partial)
            partial.store(out[a:b], lse[a:b])
    return out, lse


def _attend_span(
    attention: _Attention,
    q: Tensor,
    pages: np.ndarray,
    position: int,
    window: int | None,
    sinks: int,
    partial: _Partial,
) -> None:
    """Attend queries at positions [position, end) to everything they may see; no more of them than the window is long.

    keys   0 ... sinks ... end - rows - window ... end - window ... position ... end
           [for all )      [   by mask          )[   for all     )[  causal    )
    """
    rows = q.shape[2]
    end = position + rows
    sinks_end = 0 if window is None else min(sinks, position)
    full = sinks_end if window is None else max(sinks_end, end - window)  # from here on all rows see all older keys
    if rows == 1:
        attention.attend(q, pages, full, end, partial)
    else:
        attention.attend(q, pages, full, position, partial)
        attention.attend_masked(q, pages, position, end, "causal", partial)
    attention.attend(q, pages, 0, min(sinks_end, full), partial)
    edge = 0 if window is None else max(sinks_end, position - window + 1)
    if window is not None and edge < end - window:  # the last row sees none of these
        rows_at, keys_at = torch.arange(position, end - 1), torch.arange(edge, end - window)
        visible = rows_at[:, None] - keys_at[None, :] < window
        attention.attend_masked(q[:, :, :-1], pages, edge, end - window, visible, partial)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend every row to every token of whole blocks; arguments are checked by the caller."""
    attention = _Attention(k, v, scale, softcap)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype)
    lse = torch.empty(q.shape[:2])
    pages = np.arange(k.shape[0])
    for a in range(0, q.shape[0], MAX_QUERY_TILE):
        b = min(a + MAX_QUERY_TILE, q.shape[0])
        partial = _Partial(k.shape[1], q.shape[1] // k.shape[1], b - a, v.shape[3])
        attention.attend(attention.fold(q[a:b]), pages, 0, len(pages) * k.shape[2], partial)
        partial.store(out[a:b], lse[a:b])
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial results; either may have rows without keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.exp(lse_b - lse)
    if bool(torch.isneginf(lse_a).any()) or bool(torch.isneginf(lse_b).any()):
        has_a, has_b = ~torch.isneginf(lse_a), ~torch.isneginf(lse_b)
        out_a = torch.where(has_a[..., None], out_a, 0.0)
        out_b = torch.where(has_b[..., None], out_b, 0.0)
        weight = torch.where(has_b, weight, 0.0)
    return out_a.float().lerp(out_b.float(), weight[..., None]).to(out_a.dtype), lse


def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partial results outs [P, T, H, D], lses [P, T, H]."""
    lse = torch.logsumexp(lses, 0) if len(lses) else lses.new_full(lses.shape[1:], float("-inf"))
    weights = torch.exp(lses - torch.where(torch.isneginf(lse), 0.0, lse))
    total = torch.zeros(outs.shape[1:])
    for out, weight in zip(outs, weights):
        total += torch.where(weight[..., None] > 0, out, 0.0) * weight[..., None]
    return total.to(outs.dtype), lse


def write_kv(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, slots: np.ndarray) -> None:
    """Write tokens to their slots, one copy per stretch of neighbouring slots in a page."""
    block = k.shape[2]
    if not len(slots):
        return
    # A stretch ends where the slot does not follow its neighbour or where a page begins.
    starts = np.flatnonzero(np.r_[True, (np.diff(slots) != 1) | (slots[1:] % block == 0)])
    if len(starts) * 4 > len(slots):  # mostly single tokens (decodes): one scatter
        kept = torch.from_numpy(np.flatnonzero(slots >= 0))
        at = torch.from_numpy(slots)[kept]
        pages, offsets = at // block, at % block
        k[pages, :, offsets] = k_new[kept].to(k.dtype)
        v[pages, :, offsets] = v_new[kept].to(v.dtype)
        return
    for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(slots)]):
        slot = int(slots[a])
        if slot >= 0:
            page, offset = divmod(slot, block)
            k[page, :, offset : offset + b - a] = k_new[a:b].transpose(0, 1)
            v[page, :, offset : offset + b - a] = v_new[a:b].transpose(0, 1)


def copy_rows(source: Tensor, target: Tensor, source_ids: np.ndarray | None, target_ids: np.ndarray | None) -> None:
    """Copy rows; ids None means rows 0, 1, 2, ... All sources are read before any target is written."""
    picked = source if source_ids is None else source.index_select(0, torch.from_numpy(source_ids))
    if target_ids is None:
        target[: len(picked)] = picked
    else:
        target.index_copy_(0, torch.from_numpy(target_ids), picked)


def _runs(pages: np.ndarray, start: int, end: int, block: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Cut positions [start, end) into runs of neighbouring pages; yield each with its token slots [a, b) in a page.

    Pages taken only in part (the ends of the range) stand alone; the others are taken whole.
    """
    first, last = -(-start // block), end // block  # the whole blocks
    if first > last:  # both ends lie in one block
        yield pages[last : last + 1], start - last * block, end - last * block
        return
    if start < first * block:
        yield pages[first - 1 : first], start - (first - 1) * block, block
    if first < last:
        whole = pages[first:last]
        for run in np.split(whole, np.flatnonzero(np.diff(whole) != 1) + 1):
            yield run, 0, block
    if end > last * block:
        yield pages[last : last + 1], 0, end - last * block


def _combine(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge per-page results out [P, R, H, D], lse [P, R, H] into out [H, R, D], lse [H, R]."""
    lse = torch.cat(lses)
    count, rows, heads = lse.shape
    total = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - total).view(count, rows * heads).t()[:, None]  # [R * H, 1, P]
    parts = torch.cat(outs).float().view(count, rows * heads, -1).transpose(0, 1)  # [R * H, P, D], in place
    return torch.bmm(weights, parts).view(rows, heads, -1).transpose(0, 1), total.t()


def _gather(pages: Tensor, ids: Tensor, target: Tensor) -> None:
    """Gather one head's pages [pages, block, D] into target [tokens, width >= D]; further columns become zero."""
    block, dim = pages.shape[1:]
    target = target.view(len(ids), block, -1)
    if target.shape[2] == dim:
        torch.index_select(pages, 0, ids, out=target)
    else:
        target[..., :dim] = pages.index_select(0, ids)
        target[..., dim:] = 0
