"""Paged decode on a GPU: one query row per sequence, the keys of a sequence cut into splits that run side by side.

One program per sequence, KV head (with up to 64 of its query heads) and split; the partial results merge by LSE in
`triton_merge`. A tile lies in one page when it can, so that its addresses are affine. Guards: a split reads only token
slots below the sequence's length, and under a window only those the query sees.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    attend_tile,
    compute_dtype,
    cut_widths,
    finish,
    load_rows,
    narrow,
    needs_rounding,
    score_factors,
)
from .triton_merge import merge_parts
from .tuning import TABLE, Tuning, current

MOST_TILE = 64  # as in the table; twice that spills for heads of 576, and float32 passes the shared memory


@triton.jit
def decode_split(
    q, k, v, table, kv_lens, out, lse, scale_log2, softcap,
    q_row, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, table_row, out_row, out_head, out_split, lse_row,
    lse_head, group, head_blocks,
    HEADS: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, ONE_PAGE: tl.constexpr,
    DK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Attend HEADS query heads of one KV head to one split of one sequence's keys; write partial out and LSE.

    Tiles are numbered [0, sink_tiles) for the sinks and on from there for the window, which is everything without one.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) // head_blocks
    split = tl.program_id(2)
    in_group = tl.program_id(1) % head_blocks * HEADS + tl.arange(0, M)
    row_ok = (tl.arange(0, M) < HEADS) & (in_group < group)
    heads = head * group + in_group
    q_a, q_b = load_rows(q + row * q_row, heads * q_head, row_ok, DK, A, B, COMPUTE)
    length = tl.load(kv_lens + row)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first = lowest // TILE * TILE
    sink_tiles = tl.minimum(tl.cdiv(SINKS, TILE), first // TILE)
    tiles = sink_tiles + tl.cdiv(length - first, TILE)
    per_split = tl.cdiv(tiles, tl.num_programs(2))
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    in_tile = tl.arange(0, TILE)
    for i in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        start = i * TILE
        if WINDOW > 0:
            start = tl.where(i < sink_tiles, start, first + (i - sink_tiles) * TILE)
        pos = start + in_tile
        ok = pos < length
        if WINDOW > 0:
            ok = ok & ((pos >= lowest) | (pos < SINKS))
        if ONE_PAGE:
            page = tl.load(table + row * table_row + start // PAGE).to(tl.int64)
            slot = start % PAGE + in_tile
        else:
            page = tl.load(table + row * table_row + pos // PAGE, mask=ok, other=0).to(tl.int64)
            slot = pos % PAGE
        at_k = page * k_page + head * k_head + slot * k_slot
        at_v = page * v_page + head * v_head + slot * v_slot
        top, total, acc = attend_tile(
            q_a, q_b, k, v, at_k, at_v, ok, ok[None, :], scale_log2, softcap, top, total, acc,
            DK, A, B, DV, DVP, True, SOFTCAP, COMPUTE,
        )  # fmt: skip
    result, result_lse = finish(top, total, acc)
    in_v = tl.arange(0, DVP)
    at = out + row * out_row + heads[:, None] * out_head + split * out_split + in_v[None, :]
    tl.store(at, narrow(result, out.dtype.element_ty, ROUND), mask=row_ok[:, None] & (in_v[None, :] < DV))
    tl.store(lse + row * lse_row + heads * lse_head + split, result_lse, mask=row_ok)


def decode_shape(
    group: int, block: int, key_dim: int, value_dim: int, dtype: torch.dtype, cut: Tuning = TABLE["H200"]
) -> dict[str, Any]:
    """Choose tile sizes; the same for the launcher and the ahead-of-time report.

    Wide heads never take a larger tile than the table's: what `tune` measured were narrow ones.
    """
    widest = max(key_dim, value_dim) * (2 if dtype == torch.float32 else 1)
    tile = cut.tile if widest <= 128 else max(16, min(cut.tile, MOST_TILE) // 2)
    rows = min(64 if widest <= 256 else 16, max(16, triton.next_power_of_2(group)))
    widths = cut_widths(key_dim, value_dim)
    return dict(
        HEADS=min(group, rows), M=rows, TILE=tile, PAGE=block, ONE_PAGE=block % tile == 0,
        DK=widths.DK, A=widths.A, B=widths.B, DV=widths.DV, DVP=widths.DVP, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


@cache
def _num_processors(device_index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(device_index)
    return int(properties["multiprocessor_count"])


def choose_splits(programs: int, longest: int, device: torch.device) -> int:
    """Choose how many splits fill the GPU, none shorter than is worth starting (tuning.py)."""
    if device.type != "cuda":
        return 1
    cut = current("cuda")
    wanted = triton.cdiv(cut.programs_per_sm * _num_processors(device.index or 0), max(1, programs))
    return max(1, min(wanted, triton.cdiv(longest, cut.min_split_tokens), 128))


def paged_decode(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, kv_lens: Tensor, out: Tensor, lse: Tensor, *,
    scale: float, longest: int, window: int | None = None, sinks: int = 0, softcap: float | None = None,
    splits: int | None = None,
) -> None:  # fmt: skip
    """Attend one row per sequence and write to out [n, Hq, Dv] and lse [n, Hq]; everything on one device.

    Shapes: as in dispatch; table int32 [n, max_blocks], kv_lens int32 [n]; longest bounds the lengths, for the splits.
    """
    count, query_heads, dim = q.shape
    if count == 0:
        return
    heads, block = k.shape[1], k.shape[2]
    group = query_heads // heads
    shape = decode_shape(group, block, dim, v.shape[3], k.dtype, current("cuda") if q.is_cuda else TABLE["H200"])
    head_blocks = triton.cdiv(group, shape["HEADS"])
    visible = longest if window is None else min(longest, window + sinks)
    splits = splits or choose_splits(count * heads * head_blocks, visible, q.device)
    if splits == 1:
        parts, part_lse = out[:, :, None], lse[:, :, None]
    else:
        parts = torch.empty(count, query_heads, splits, v.shape[3], dtype=torch.float32, device=q.device)
        part_lse = torch.empty(count, query_heads, splits, dtype=torch.float32, device=q.device)
    scale_log2, cap = score_factors(scale, softcap)
    decode_split[(count, heads * head_blocks, splits)](
        q, k, v, table, kv_lens, parts, part_lse, scale_log2, cap,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], table.stride(0),
        *parts.stride()[:3], *part_lse.stride()[:2], group, head_blocks, **shape,
        WINDOW=window or 0, SINKS=sinks if window else 0, SOFTCAP=softcap is not None,
        COMPUTE=compute_dtype(k.dtype), ROUND=needs_rounding(parts.dtype),
    )  # fmt: skip
    if splits > 1:
        merge_parts(parts.permute(2, 0, 1, 3), part_lse.permute(2, 0, 1), out, lse)
