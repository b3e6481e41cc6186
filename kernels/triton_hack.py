"""HACK's integer products on a GPU: int8 codes of q and p times the codes of a page, and their correction terms.

As `cpu_hack` says, q is rounded around 0 and p from 0 up, so only the term with the page's own zero is left. Sums of int8
products stay below 2**24: turning them into float32 is exact. These are the steps; the loop is in `triton_rows`.

Source: HACK (arXiv 2502.03589), section 4.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_quant import unpack


@triton.jit
def hack_keys(
    scores, q, steps, row_ok, bytes_, table, slot, FIELD: tl.constexpr, ROW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, ZEROS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Add one bit field's share of q.k: step (s sum q'c + z sum q'); `table` points at the head's scales."""
    partition: tl.constexpr = FIELD * ROW // GROUP
    products = tl.dot(q, unpack(bytes_, FIELD, BITS, False, tl.int8), out_dtype=tl.int32).to(tl.float32)
    scale = tl.load(table + partition * BLOCK + slot).to(tl.float32)
    zero = tl.load(table + ZEROS + partition * BLOCK + slot).to(tl.float32)
    step = tl.load(steps + partition, mask=row_ok, other=0.0)
    sums = tl.sum(q.to(tl.int32), 1).to(tl.float32)
    return scores + step[:, None] * (products * scale[None, :] + sums[:, None] * zero[None, :])


@triton.jit
def round_weights(weights):
    """Round a tile of weights to int8 per row; return codes, the step, and the sum of the codes."""
    step = tl.max(weights, 1) / 127.0
    codes = tl.floor(weights / tl.where(step == 0, 1.0, step)[:, None] + 0.5).to(tl.int8)
    return codes, step, tl.sum(codes.to(tl.int32), 1).to(tl.float32)


@triton.jit
def hack_values(
    acc, codes, step, sums, decay, pages, table, slot, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr,
    ROW: tl.constexpr, ZEROS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Take one bit field of V into its accumulator: acc * decay + step (s sum p'c + z sum p'); a tile is a partition."""
    column = tl.arange(0, PIECE_P)
    ok = column < PIECE
    bytes_ = tl.load(pages + slot[:, None] * ROW + column[None, :], mask=ok[None, :], other=0)
    products = tl.dot(codes, unpack(bytes_, INDEX, BITS, False, tl.int8), out_dtype=tl.int32).to(tl.float32)
    scale = tl.load(table + INDEX * PIECE + column, mask=ok, other=0.0).to(tl.float32)
    zero = tl.load(table + ZEROS + INDEX * PIECE + column, mask=ok, other=0.0).to(tl.float32)
    return acc * decay[:, None] + step[:, None] * (products * scale[None, :] + sums[:, None] * zero[None, :])
