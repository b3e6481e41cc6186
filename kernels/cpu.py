"""The CPU path: the package's functions on CPU tensors, arguments already checked.

Reading the cache is the cost on a CPU, so few query rows (decode, short turns) attend to pages in place
(`cpu_inplace`), and many rows (prefill) pay for a copy into a staging buffer (`cpu_layer`). Guards: only valid token
slots are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cpu_inplace import Reading, attend_in_place, is_in_place, plan_reading
from .cpu_layer import PagedLayer, Partial
from .plan import SlotPlan, StepPlan

MAX_QUERY_TILE = 4096  # rows of one sequence handled at once; bounds the float32 accumulators
WINDOW_QUERY_TILE = 512  # likewise under a window, where a tile masks as many keys at the window's edge as it has rows


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: StepPlan,
    *,
    scale: float,
    window: int | None,
    sinks: int,
    softcap: float | None,
    out_dtype: torch.dtype,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend a packed batch; arguments are checked by the caller."""
    layer, group = PagedLayer(k, v, scale, softcap), q.shape[1] // k.shape[1]
    key = ("cpu", k.shape[1:], v.shape[3], k.dtype, group, window, sinks, layer.use_flash)
    singles = plan.remember(key, lambda: plan_singles(layer, plan, group, window, sinks))
    if singles is not None and singles.is_all:
        return _decode(layer, q, singles, out_dtype, with_lse=with_lse)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype)
    lse = torch.empty(q.shape[:2])
    if singles is not None:
        parts, part_lse = _decode(layer, q.index_select(0, singles.rows), singles, out_dtype)
        out.index_copy_(0, singles.rows, parts)
        lse.index_copy_(0, singles.rows, part_lse)
    starts, q_lens = plan.cu_q[:-1].tolist(), plan.q_lens.tolist()
    tile = MAX_QUERY_TILE if window is None else min(WINDOW_QUERY_TILE, window)
    for s, rows in enumerate(q_lens):
        if rows == 0 or (rows == 1 and singles is not None):
            continue
        stop = starts[s] + rows
        for a in range(starts[s], stop, tile):
            b = min(a + tile, stop)
            partial = Partial(k.shape[1], group, b - a, v.shape[3])
            position = int(plan.kv_lens[s]) - (stop - a)
            _attend_span(layer, layer.fold(q[a:b]), plan.table[s], position, window, sinks, partial)
            partial.store(out[a:b], lse[a:b])
    return out, lse


@dataclass(frozen=True, slots=True)
class Singles:
    """The sequences of a step with one query row each, and how their pages are read."""

    rows: Tensor
    is_all: bool
    reading: Reading


def plan_singles(layer: PagedLayer, plan: StepPlan, group: int, window: int | None, sinks: int) -> Singles | None:
    """None when there are no single rows, or when they are better served by a copy."""
    sequences = np.flatnonzero(plan.q_lens == 1)
    if not len(sequences) or not is_in_place(layer, group):
        return None
    ranges = []
    for i, s in enumerate(sequences.tolist()):
        end = int(plan.kv_lens[s])
        lowest = 0 if window is None else max(0, end - window)
        if min(sinks, lowest):
            ranges.append((i, plan.table[s], 0, min(sinks, lowest)))
        ranges.append((i, plan.table[s], lowest, end))
    rows = torch.from_numpy(plan.cu_q[sequences])
    return Singles(rows, len(rows) == plan.num_tokens, plan_reading(layer, len(rows), ranges))


def _decode(
    layer: PagedLayer, q: Tensor, singles: Singles, out_dtype: torch.dtype, *, with_lse: bool = True
) -> tuple[Tensor, Tensor]:
    """Attend one row [n, Hq, D] of each of these sequences in place."""
    rows, query_heads, _ = q.shape
    grouped = q.to(layer.k.dtype).reshape(rows, layer.heads, query_heads // layer.heads, -1)
    out, lse = attend_in_place(layer, grouped, singles.reading, with_lse=with_lse)
    return out.to(out_dtype).reshape(rows, query_heads, -1), lse.reshape(rows, query_heads) if with_lse else lse[:0]


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
        reading = plan_reading(layer, 1, [(0, pages, start, end) for start, end in spans])
        out, lse = attend_in_place(layer, q.flatten(1, 2)[None], reading)
        partial.add(slice(0, layer.heads), out[0].unflatten(1, q.shape[1:3]), lse[0].unflatten(1, q.shape[1:3]))
        return
    for start, end in spans:
        layer.attend(q, pages, start, end, partial)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: np.ndarray, *, scale: float, softcap: float | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend every row to every token of these pages; arguments are checked by the caller."""
    layer = PagedLayer(k, v, scale, softcap)
    # A decode step streams its context in many such chunks: one row needs no tiles and no running result.
    if len(q) == 1 and len(pages) and is_in_place(layer, q.shape[1] // k.shape[1]):
        reading = plan_reading(layer, 1, [(0, pages, 0, len(pages) * k.shape[2])])
        one, its_lse = attend_in_place(layer, layer.fold(q).flatten(1, 2)[None], reading)
        return one.reshape(1, q.shape[1], v.shape[3]).to(out_dtype), its_lse.reshape(1, q.shape[1])
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype)
    lse = torch.empty(q.shape[:2])
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
    if not len(lses):
        return outs.new_zeros(outs.shape[1:]), lses.new_full(lses.shape[1:], float("-inf"))
    top = lses.amax(0)
    weights = torch.exp(lses - torch.where(torch.isneginf(top), 0.0, top))
    sums = weights.sum(0)
    weights /= torch.where(sums > 0, sums, 1.0)  # not exp(lse - total lse): large ones have lost their last digits
    total = torch.zeros(outs.shape[1:])
    for out, weight in zip(outs, weights):
        total += torch.where(weight[..., None] > 0, out, 0.0) * weight[..., None]
    return total.to(outs.dtype), sums.log() + top


def write_kv(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, plan: SlotPlan) -> None:
    """Write tokens to their slots, one copy per stretch of neighbouring slots in a page."""
    stretches = plan.remember("stretches", lambda: _plan_stretches(plan.slots, k.shape[2]))
    if stretches is None:  # mostly single tokens (decodes): one scatter
        kept, pages, offsets = plan.remember("scatter", lambda: _plan_scatter(plan.slots, k.shape[2]))
        k[pages, :, offsets] = k_new[kept].to(k.dtype)
        v[pages, :, offsets] = v_new[kept].to(v.dtype)
        return
    for page, offset, start, count in stretches:
        is_all = count == len(plan.slots)
        for new, target in ((k_new, k), (v_new, v)):
            place = target.select(0, page).narrow(1, offset, count)
            place.copy_((new if is_all else new.narrow(0, start, count)).transpose(0, 1))


def _plan_stretches(slots: np.ndarray, block: int) -> list[tuple[int, int, int, int]] | None:
    """Page, offset, first token and count of each stretch; None when a scatter is cheaper."""
    if len(slots) < 2:
        return [(*divmod(slot, block), 0, 1) for slot in slots.tolist() if slot >= 0]
    # A stretch ends where the slot does not follow its neighbour or where a page begins.
    starts = np.flatnonzero(np.r_[True, (np.diff(slots) != 1) | (slots[1:] % block == 0)])
    if len(starts) > 4 and len(starts) * 4 > len(slots):
        return None
    ends = [*starts[1:].tolist(), len(slots)]
    stretches = [(int(slots[a]), a, b - a) for a, b in zip(starts.tolist(), ends)]
    return [(*divmod(slot, block), a, count) for slot, a, count in stretches if slot >= 0]


def _plan_scatter(slots: np.ndarray, block: int) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.from_numpy(np.flatnonzero(slots >= 0))
    at = torch.from_numpy(slots)[kept]
    return kept, at // block, at % block


def copy_rows(source: Tensor, target: Tensor, source_ids: np.ndarray | None, target_ids: np.ndarray | None) -> None:
    """Copy rows; ids None means rows 0, 1, 2, ... All sources are read before any target is written."""
    picked = source if source_ids is None else source.index_select(0, torch.from_numpy(source_ids))
    if target_ids is None:
        target[: len(picked)] = picked
    else:
        target.index_copy_(0, torch.from_numpy(target_ids), picked)
