"""Folding on a GPU: K's scale goes into q, V's scale into p, so that codes meet the tensor cores as they are.

With k = s c + z per channel and v = s c + z per token, q.k = (q s).c + q.z and sum p v = sum (p s) c + sum p z: scales cost
a product with a row and not with a page, and no dequantised page exists anywhere. These are the steps; the loop over
blocks is in `triton_rows`.

Source: arithmetic of KIVI's formats (arXiv 2402.02750); centred codes keep 16-bit operands as exact as unpacking first.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_quant import unpack


@triton.jit
def fold_keys(
    scores, bias, q, bytes_, table, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr, ZEROS: tl.constexpr,
    HAS_ZERO: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add one piece's share of (q s).c to scores and of q.z to bias: a bit field, or half of a wide row of bytes.

    `table` points at the tile's scales.
    """
    if IS_FP8:
        return tl.dot(q.to(COMPUTE), unpack(bytes_, 0, 8, True, COMPUTE), scores, input_precision="ieee"), bias
    else:
        channel = INDEX * PIECE + tl.arange(0, PIECE_P)
        ok = tl.arange(0, PIECE_P) < PIECE
        q = q.to(tl.float32)
        scale = tl.load(table + channel, mask=ok, other=0.0).to(tl.float32)
        codes = unpack(bytes_, INDEX, BITS, False, COMPUTE)
        scores = tl.dot((q * scale[None, :]).to(COMPUTE), codes, scores, input_precision="ieee")
        if HAS_ZERO:
            zero = tl.load(table + ZEROS + channel, mask=ok, other=0.0).to(tl.float32)
            bias += tl.sum(q * zero[None, :], 1)
        return scores, bias


@triton.jit
def fold_values(
    acc, weights, decay, pages, table, slot, INDEX: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, HAS_ZERO: tl.constexpr,
    BITS: tl.constexpr, IS_FP8: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Take one piece of V's channels into its accumulator: acc * decay + (p s).c + sum p z."""
    column = tl.arange(0, PIECE_P)
    at = pages + slot[:, None] * ROW + INDEX * PIECE % ROW + column[None, :]
    if PIECE < PIECE_P:
        bytes_ = tl.load(at, mask=(column < PIECE)[None, :], other=0)
    else:
        bytes_ = tl.load(at)
    codes = unpack(bytes_, INDEX * PIECE // ROW, BITS, IS_FP8, COMPUTE)
    acc = acc * decay[:, None]
    if IS_FP8:  # one scale for the page: after the product, where p is still small numbers of float16
        scale = tl.load(table).to(tl.float32) * 256.0
        return acc + tl.dot(weights.to(COMPUTE), codes, input_precision="ieee") * scale
    else:
        place = INDEX * PIECE // GROUP * BLOCK + slot
        scale = tl.load(table + place).to(tl.float32)
        acc = tl.dot((weights * scale[None, :]).to(COMPUTE), codes, acc, input_precision="ieee")
        if HAS_ZERO:
            zero = tl.load(table + ZEROS + place).to(tl.float32)
            acc += tl.sum(weights * zero[None, :], 1)[:, None]
        return acc
