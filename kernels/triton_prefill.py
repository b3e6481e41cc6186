"""Paged prefill on a GPU: packed chunks of several sequences, causal over pages, at tensor-core speed.

One program per tile of query rows (tokens times the query heads of one KV head) and KV head. The keys of a tile are
taken in up to four stretches, and only the edges pay for masks:

    0 .. sinks      first .. full_start       full_start .. full_end      full_end .. end
    [by mask)       [window's edge, by mask)  [all rows see all keys)     [diagonal, by mask)

Guards: only token slots below the last visible position are loaded, and under a window only those some row sees.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    IS_INTERPRETED,
    attend_tile,
    compute_dtype,
    cut_widths,
    finish,
    load_rows,
    narrow,
    needs_rounding,
    score_factors,
)


@triton.jit
def attend_stretch(
    q_a, q_b, k, v, table, head, start, stop, end, lowest, pos_q, scale_log2, softcap, top, total, acc,
    k_page, k_head, k_slot, v_page, v_head, v_slot,
    TILE: tl.constexpr, PAGE: tl.constexpr, ONE_PAGE: tl.constexpr,
    DK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Take the tiles that start in [start, stop); unless MASKED, every row sees every key of them."""
    in_tile = tl.arange(0, TILE)
    for first in range(start, stop, TILE):
        pos = first + in_tile
        ok = pos < end
        live = ok[None, :]
        if MASKED:
            if CAUSAL:
                live = live & (pos[None, :] <= pos_q[:, None])
            if WINDOW > 0:
                ok = ok & ((pos >= lowest) | (pos < SINKS))
                live = live & ((pos_q[:, None] - pos[None, :] < WINDOW) | (pos[None, :] < SINKS))
        if ONE_PAGE:
            page = tl.load(table + first // PAGE).to(tl.int64)
            slot = first % PAGE + in_tile
        else:
            page = tl.load(table + pos // PAGE, mask=ok, other=0).to(tl.int64)
            slot = pos % PAGE
        at_k = page * k_page + head * k_head + slot * k_slot
        at_v = page * v_page + head * v_head + slot * v_slot
        top, total, acc = attend_tile(
            q_a, q_b, k, v, at_k, at_v, ok, live, scale_log2, softcap, top, total, acc,
            DK, A, B, DV, DVP, MASKED, SOFTCAP, COMPUTE,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def prefill_tile(
    q, k, v, table, cu_q, kv_lens, tile_sequence, tile_start, out, lse, scale_log2, softcap,
    q_row, q_head, k_page, k_head, k_slot, v_page, v_head, v_slot, table_row, out_row, out_head, lse_row, lse_head,
    group, head_blocks,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, ONE_PAGE: tl.constexpr,
    DK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Attend TOKENS query tokens times HEADS query heads of one KV head to the pages of their sequence."""
    tile = tl.program_id(0)
    head = tl.program_id(1) // head_blocks
    sequence = tl.load(tile_sequence + tile).to(tl.int64)
    first_token = tl.load(tile_start + tile)
    begin = tl.load(cu_q + sequence)
    rows = tl.load(cu_q + sequence + 1) - begin
    length = tl.load(kv_lens + sequence)
    past = length - rows
    row = tl.arange(0, M)
    token = first_token + row // HEADS
    in_group = tl.program_id(1) % head_blocks * HEADS + row % HEADS
    row_ok = (row // HEADS < TOKENS) & (token < rows) & (in_group < group)
    heads = head * group + in_group
    at_row = (begin + token).to(tl.int64)
    q_a, q_b = load_rows(q, at_row * q_row + heads * q_head, row_ok, DK, A, B, COMPUTE)
    pos_q = past + token
    low_q = past + first_token
    high_q = past + tl.minimum(first_token + TOKENS, rows) - 1
    end = length
    full_end = length // TILE * TILE
    if CAUSAL:
        end = high_q + 1
        full_end = (low_q + 1) // TILE * TILE
    lowest = 0
    first = 0
    full_start = 0
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DVP], tl.float32)
    table += sequence * table_row
    if WINDOW > 0:
        lowest = tl.maximum(low_q - WINDOW + 1, 0)
        first = lowest // TILE * TILE
        full_start = tl.cdiv(tl.maximum(high_q - WINDOW + 1, 0), TILE) * TILE
        if SINKS > 0:
            top, total, acc = attend_stretch(
                q_a, q_b, k, v, table, head, 0, tl.minimum(SINKS, first), end, lowest, pos_q, scale_log2, softcap,
                top, total, acc, k_page, k_head, k_slot, v_page, v_head, v_slot, TILE, PAGE, ONE_PAGE, DK, A, B, DV,
                DVP, CAUSAL, WINDOW, SINKS, True, SOFTCAP, COMPUTE,
            )  # fmt: skip
        full_start = tl.minimum(full_start, tl.cdiv(end, TILE) * TILE)
        top, total, acc = attend_stretch(
            q_a, q_b, k, v, table, head, first, full_start, end, lowest, pos_q, scale_log2, softcap,
            top, total, acc, k_page, k_head, k_slot, v_page, v_head, v_slot, TILE, PAGE, ONE_PAGE, DK, A, B, DV,
            DVP, CAUSAL, WINDOW, SINKS, True, SOFTCAP, COMPUTE,
        )  # fmt: skip
    top, total, acc = attend_stretch(
        q_a, q_b, k, v, table, head, full_start, full_end, end, lowest, pos_q, scale_log2, softcap,
        top, total, acc, k_page, k_head, k_slot, v_page, v_head, v_slot, TILE, PAGE, ONE_PAGE, DK, A, B, DV,
        DVP, CAUSAL, WINDOW, SINKS, False, SOFTCAP, COMPUTE,
    )  # fmt: skip
    top, total, acc = attend_stretch(
        q_a, q_b, k, v, table, head, tl.maximum(full_start, full_end), end, end, lowest, pos_q, scale_log2, softcap,
        top, total, acc, k_page, k_head, k_slot, v_page, v_head, v_slot, TILE, PAGE, ONE_PAGE, DK, A, B, DV,
        DVP, CAUSAL, WINDOW, SINKS, True, SOFTCAP, COMPUTE,
    )  # fmt: skip
    result, result_lse = finish(top, total, acc)
    in_v = tl.arange(0, DVP)
    at = out + at_row[:, None] * out_row + heads[:, None] * out_head + in_v[None, :]
    tl.store(at, narrow(result, out.dtype.element_ty, ROUND), mask=row_ok[:, None] & (in_v[None, :] < DV))
    tl.store(lse + at_row * lse_row + heads * lse_head, result_lse, mask=row_ok)


def prefill_shape(
    group: int, block: int, key_dim: int, value_dim: int, dtype: torch.dtype, arch: int
) -> dict[str, Any]:
    """Choose tile sizes; the same for the launcher and the ahead-of-time report, which says whether they spill.

    Source: the ahead-of-time report. From sm_90 on the accumulator of a warp group's product leaves room for 128 rows;
            before, 64 rows are what 255 registers hold. float32 products run on the plain units.
    """
    widest = max(key_dim, value_dim)
    if dtype == torch.float32:
        rows, tile, warps, stages = 16, 16, 4, 2
    elif widest <= 128:
        rows, tile, warps, stages = (128, 64, 8, 3) if arch >= 90 else (64, 64, 8, 3)
    elif widest <= 256:
        rows, tile, warps, stages = (128, 32, 8, 2) if arch >= 90 else (32, 32, 4, 2)
    else:
        rows, tile, warps, stages = 16, 16, 4, 2
    heads = min(group, rows)
    widths = cut_widths(key_dim, value_dim)
    return dict(
        HEADS=heads, TOKENS=rows // heads, M=rows, TILE=tile, PAGE=block, ONE_PAGE=block % tile == 0,
        DK=widths.DK, A=widths.A, B=widths.B, DV=widths.DV, DVP=widths.DVP, num_warps=warps, num_stages=stages,
    )  # fmt: skip


@cache
def current_arch() -> int:
    """Return the GPU's compute capability as 90 for 9.0; the interpreter counts as 90."""
    return 90 if IS_INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def shape_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Choose tile sizes for these tensors."""
    group = q.shape[1] // k.shape[1]
    return prefill_shape(group, k.shape[2], q.shape[2], v.shape[3], k.dtype, current_arch())


def cut_tiles(q_lens: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut each sequence's rows into tiles of so many tokens; return each tile's sequence and first token in it."""
    counts = -(-q_lens // tokens)
    sequence = np.repeat(np.arange(len(q_lens)), counts)
    start = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)) * tokens
    return sequence, start


def paged_prefill(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, kv_lens: Tensor, cu_q: Tensor, tiles: tuple[Tensor, Tensor],
    out: Tensor, lse: Tensor, *, scale: float, window: int | None = None, sinks: int = 0,
    softcap: float | None = None, causal: bool = True,
) -> None:  # fmt: skip
    """Attend packed rows and write to out [T, Hq, Dv] and lse [T, Hq]; everything on one device.

    Shapes: as in dispatch; table, kv_lens, cu_q and the two tensors of `tiles` (see cut_tiles) int32.
    """
    if len(tiles[0]) == 0:
        return
    group = q.shape[1] // k.shape[1]
    shape = shape_of(q, k, v)
    head_blocks = triton.cdiv(group, shape["HEADS"])
    scale_log2, cap = score_factors(scale, softcap)
    prefill_tile[(len(tiles[0]), k.shape[1] * head_blocks)](
        q, k, v, table, cu_q, kv_lens, *tiles, out, lse, scale_log2, cap,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], table.stride(0), *out.stride()[:2],
        *lse.stride(), group, head_blocks, **shape, CAUSAL=causal, WINDOW=window or 0, SINKS=sinks if window else 0,
        SOFTCAP=softcap is not None, COMPUTE=compute_dtype(k.dtype), ROUND=needs_rounding(out.dtype),
    )  # fmt: skip
