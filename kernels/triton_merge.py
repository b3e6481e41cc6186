"""Merging partial results on a GPU: exact softmax arithmetic over disjoint key sets, by their LSE.

One program per row of one head; parts are taken in order, so the same parts give the same bits however the batch looks.
Guards: a part with LSE -inf is not loaded, whatever lies in it. NaN is never an empty row: a part that met it makes the
result NaN, and what is merged with that later is NaN too.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import narrow, needs_rounding

PART_TILE = 16


@triton.jit
def merge_rows(
    parts, part_lse, out, lse, count, heads, part_p, part_t, part_h, plse_p, plse_t, plse_h, out_t, out_h, lse_t, lse_h,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Merge `count` partial results of one row and head."""
    t = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    in_d = tl.arange(0, DP)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DP], tl.float32)
    for start in range(0, count, TILE):
        p = (start + tl.arange(0, TILE)).to(tl.int64)
        x = tl.load(part_lse + p * plse_p + t * plse_t + h * plse_h, mask=p < count, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(x - base)
        decay = tl.exp(top - base)
        mask = (x > float("-inf"))[:, None] & (in_d[None, :] < D)
        at = parts + p[:, None] * part_p + t * part_t + h * part_h + in_d[None, :]
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        acc = acc * decay + tl.sum(values * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    has_keys = total != 0
    safe = tl.where(has_keys, total, 1.0)
    tl.store(out + t * out_t + h * out_h + in_d, narrow(acc / safe, out.dtype.element_ty, ROUND), mask=in_d < D)
    tl.store(lse + t * lse_t + h * lse_h, tl.where(has_keys, top + tl.log(safe), float("-inf")))


def merge_parts(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge parts [P, T, H, D], part_lse [P, T, H] (any strides, last axis dense) into out [T, H, D] and lse [T, H]."""
    count, tokens, heads, dim = parts.shape
    if tokens * heads == 0:
        return
    merge_rows[(tokens * heads,)](
        parts, part_lse, out, lse, count, heads, *parts.stride()[:3], *part_lse.stride(), *out.stride()[:2],
        *lse.stride(), D=dim, DP=triton.next_power_of_2(dim),
        TILE=min(PART_TILE, triton.next_power_of_2(max(1, count))), ROUND=needs_rounding(out.dtype), num_warps=2,
    )  # fmt: skip


def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge outs [P, T, H, D], lses [P, T, H]."""
    if outs.stride(3) != 1:
        outs = outs.contiguous()
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    merge_parts(outs, lses, out, lse)
    return out, lse


@triton.jit
def merge_two(
    out_a, lse_a, out_b, lse_b, out, lse, rows, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Merge two states of R dense rows."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    in_d = tl.arange(0, DP)
    ok = r < rows
    x = tl.load(lse_a + r, mask=ok, other=float("-inf"))
    y = tl.load(lse_b + r, mask=ok, other=float("-inf"))
    top = tl.maximum(x, y)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(x - base), tl.exp(y - base)
    total = weight_a + weight_b
    has_keys = total != 0
    safe = tl.where(has_keys, total, 1.0)
    at = r[:, None] * D + in_d[None, :]
    in_row = in_d[None, :] < D
    a = tl.load(out_a + at, mask=(x > float("-inf"))[:, None] & in_row, other=0.0).to(tl.float32)
    b = tl.load(out_b + at, mask=(y > float("-inf"))[:, None] & in_row, other=0.0).to(tl.float32)
    merged = a * (weight_a / safe)[:, None] + b * (weight_b / safe)[:, None]
    tl.store(out + at, narrow(merged, out.dtype.element_ty, ROUND), mask=ok[:, None] & in_row)
    tl.store(lse + r, tl.where(has_keys, top + tl.log(safe), float("-inf")), mask=ok)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two states [T, H, D], [T, H]; the result has out_a's dtype."""
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    rows, dim = lse_a.numel(), out_a.shape[-1]
    if rows:
        merge_two[(triton.cdiv(rows, 8),)](
            out_a, lse_a, out_b, lse_b, out, lse, rows, D=dim, DP=triton.next_power_of_2(dim), R=8,
            ROUND=needs_rounding(out.dtype), num_warps=4,
        )  # fmt: skip
    return out, lse
