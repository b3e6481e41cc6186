"""The CPU path: the package's functions on CPU tensors, arguments already checked.

Reading the cache is the cost on a CPU, so few query rows (decode, short turns) attend to pages in place
(`cpu_inplace`), and many rows (prefill) pay for a copy into a staging buffer (`cpu_layer`). Guards: only valid token
slots are read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_inplace import attend_in_place, is_in_place
from .cpu_layer import PagedLayer, Partial

MAX_QUERY_TILE = 4096  # rows of one sequence handled at once; bounds the float32 accumulators
WINDOW_QUERY_TILE = 512  # likewise under a window, where a tile masks as many keys at the window's edge as it has rows


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
    layer, group = PagedLayer(k, v, scale, softcap), q.shape[1] // k.shape[1]
    starts, q_lens = cu_q[:-1].tolist(), np.diff(cu_q)
    tile = MAX_QUERY_TILE if window is None else min(WINDOW_QUERY_TILE, window)
    singles = np.flatnonzero(q_lens == 1) if is_in_place(layer, group) else np.empty(0, np.int64)
    if len(singles):
        _decode(layer, q, table, kv_lens, cu_q[:-1][singles], singles, window, sinks, out, lse)
        q_lens[singles] = 0
    for s in np.flatnonzero(q_lens).tolist():
        stop = starts[s] + int(q_lens[s])
        for a in range(starts[s], stop, tile):
            b = min(a + tile, stop)
            partial = Partial(k.shape[1], group, b - a, v.shape[3])
            _attend_span(layer, layer.fold(q[a:b]), table[s], int(kv_lens[s]) - (stop - a), window, sinks, partial)
            partial.store(out[a:b], lse[a:b])
    return out, lse


def _decode(
    layer: PagedLayer,
    q: Tensor,
    table: np.ndarray,
    kv_lens: np.ndarray,
    rows: np.ndarray,
    sequences: np.ndarray,
    window: int | None,
    sinks: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attend the single rows of several sequences in place, and write them to out and lse."""
    ranges = []
    for i, s in enumerate(sequences.tolist()):
        end = int(kv_lens[s])
        lowest = 0 if window is None else max(0, end - window)
        if min(sinks, lowest):
            ranges.append((i, table[s], 0, min(sinks, lowest)))
        ranges.append((i, table[s], lowest, end))
    is_all = len(rows) == len(q)
    at = torch.from_numpy(rows)
    picked = (q if is_all else q.index_select(0, at)).to(layer.k.dtype)
    heads, group = layer.heads, q.shape[1] // layer.heads
    parts, part_lse = attend_in_place(layer, picked.reshape(len(rows), heads, group, -1), ranges)
    if is_all:
        out.view(parts.shape).copy_(parts)
        lse.view(part_lse.shape).copy_(part_lse)
    else:
        out.index_copy_(0, at, parts.flatten(1, 2).to(out.dtype))
        lse.index_copy_(0, at, part_lse.flatten(1, 2))


def _attend_span(
    layer: PagedLayer,
    q: Tensor,
    pages: np.ndarray,
    position: int,
    window: int | None,
    sinks: int,
    partial: Partial,
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
        _attend_all(layer, q, pages, [(0, sinks_end), (full, end)], partial)
    else:
        layer.attend_masked(q, pages, position, end, "causal", partial)
        _attend_all(layer, q, pages, [(0, sinks_end), (full, position)], partial)
    edge = 0 if window is None else max(sinks_end, position - window + 1)
    if window is not None and edge < end - window:  # the last row sees none of these
        rows_at, keys_at = torch.arange(position, end - 1), torch.arange(edge, end - window)
        visible = rows_at[:, None] - keys_at[None, :] < window
        layer.attend_masked(q[:, :, :-1], pages, edge, end - window, visible, partial)


def _attend_all(
    layer: PagedLayer, q: Tensor, pages: np.ndarray, spans: list[tuple[int, int]], partial: Partial
) -> None:
    """Add ranges of positions that every row of q [H, G, T, width] sees."""
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        return
    if is_in_place(layer, q.shape[1] * q.shape[2]):
        out, lse = attend_in_place(layer, q.flatten(1, 2)[None], [(0, pages, start, end) for start, end in spans])
        partial.add(slice(0, layer.heads), out[0].unflatten(1, q.shape[1:3]), lse[0].unflatten(1, q.shape[1:3]))
        return
    for start, end in spans:
        layer.attend(q, pages, start, end, partial)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend every row to every token of whole blocks; arguments are checked by the caller."""
    layer = PagedLayer(k, v, scale, softcap)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype)
    lse = torch.empty(q.shape[:2])
    pages = np.arange(k.shape[0])
    for a in range(0, q.shape[0], MAX_QUERY_TILE):
        b = min(a + MAX_QUERY_TILE, q.shape[0])
        partial = Partial(k.shape[1], q.shape[1] // k.shape[1], b - a, v.shape[3])
        _attend_all(layer, layer.fold(q[a:b]), pages, [(0, len(pages) * k.shape[2])], partial)
        partial.store(out[a:b], lse[a:b])
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial results; either may have rows without keys."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight = torch.sigmoid(lse_b - lse_a)  # closer than exp(lse_b - lse), whose lse is rounded
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
