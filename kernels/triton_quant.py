"""Quantising pages on a GPU: groups of full-precision values to codes, scales and zeros, byte for byte as `cpu_quant`.

One program per block, KV head and group of tokens. A code is made from float32 by exact division and written once; bytes
of fp8 are made and read through float16 bits, so they exist on sm_80 as well. Guards: a code never clips because its
scale was rounded down; a block with values that its format cannot hold is marked, since minima and maxima on a GPU pass
over NaN.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .cpu_quant import PartViews
from .formats import Part
from .triton_common import narrow, needs_rounding

TOKENS = 32  # tokens per program where a scale belongs to one token


@triton.jit
def round_e4m3(x):
    """Round float32 to the nearest e4m3 value, ties to even, at most 448 in size; still float32."""
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -6)
    step = ((exponent + 124) << 23).to(tl.float32, bitcast=True)
    steps = size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # both powers of two, so this is exact
    down = tl.floor(steps)
    up = (steps - down > 0.5) | ((steps - down == 0.5) & ((down.to(tl.int32) & 1) == 1))
    rounded = (down + tl.where(up, 1.0, 0.0)) * step
    return tl.where(x.to(tl.int32, bitcast=True) < 0, -rounded, rounded)  # -0.0 keeps its sign


@triton.jit
def to_e4m3(x):
    """Return the byte of an e4m3 value: e4m3 is float16 with the exponent's bias 8 less and three bits of mantissa."""
    bits = (x * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return ((bits >> 8) & 0x80) | ((bits >> 7) & 0x7F)


@triton.jit
def half_up(x):
    """Round positive float32 up to float16."""
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    return tl.where(near.to(tl.float32) < x, bits + 1, bits).to(tl.float16, bitcast=True)


@triton.jit
def encode(x, scale, zero, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Return codes of x in int32, unsigned below 8 bits, for a float32 scale and zero that broadcast against it."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    LOW: tl.constexpr = 0 - HALF if HAS_ZERO else 1 - HALF
    if HAS_ZERO:
        x = x - zero
    steps = tl.where(scale > 0, tl.math.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    code = tl.minimum(tl.maximum(tl.floor(steps + 0.5), LOW), HALF - 1).to(tl.int32)
    return code if BITS == 8 else code + HALF


@triton.jit
def fit(low, high, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Return scale and zero, float16, for groups with these extremes."""
    if HAS_ZERO:
        scale = half_up(tl.math.div_rn(high - low, (1 << BITS) - 1.0))
        return scale, (low + scale.to(tl.float32) * (1 << (BITS - 1))).to(tl.float16)
    else:
        scale = half_up(tl.math.div_rn(tl.maximum(tl.abs(low), tl.abs(high)), 127.0))
        return scale, scale


@triton.jit
def is_spoilt(x):
    """1 where a number is not finite, else 0."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1)


@triton.jit
def mark(bad, values, scale, zero):
    """Set bad[0] to 1 where a value [.., ..], or a scale or zero [..] in float16, is not finite."""
    tables = tl.max(tl.maximum(is_spoilt(scale), is_spoilt(zero)), 0)
    tl.store(bad, 1, mask=(tl.max(tl.max(is_spoilt(values), 1), 0) + tables) > 0)


@triton.jit
def quantize_channels(
    x, codes, scales, zeros, bad, source_ids, target_ids, x_page, x_head, x_slot, c_page, c_head, t_page, t_head,
    ROW: tl.constexpr, ROW_P: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Quantise GROUP tokens of one head, a scale per channel. With MARKS, bad[i] tells of block i."""
    i, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source, target = tl.load(source_ids + i).to(tl.int64), tl.load(target_ids + i).to(tl.int64)
    slot, column = group * GROUP + tl.arange(0, GROUP), tl.arange(0, ROW_P)
    ok = column < ROW
    packed = tl.zeros([GROUP, ROW_P], tl.int32)
    for field in tl.static_range(8 // BITS):
        at = x + source * x_page + head * x_head + slot[:, None] * x_slot + field * ROW + column[None, :]
        values = tl.load(at, mask=ok[None, :], other=0.0).to(tl.float32)
        scale, zero = fit(tl.min(values, 0), tl.max(values, 0), BITS, HAS_ZERO)
        if MARKS:
            mark(bad + i, values, scale, zero)
        at_table = target * t_page + head * t_head + group * DIM + field * ROW + column
        tl.store(scales + at_table, scale, mask=ok)
        if HAS_ZERO:
            tl.store(zeros + at_table, zero, mask=ok)
        code = encode(values, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], BITS, HAS_ZERO)
        packed |= code << (field * BITS)
    at_code = codes + target * c_page + head * c_head + slot[:, None] * ROW + column[None, :]
    tl.store(at_code, packed.to(tl.uint8), mask=ok[None, :])


@triton.jit
def quantize_tokens(
    x, codes, scales, zeros, bad, source_ids, target_ids, x_page, x_head, x_slot, c_page, c_head, t_page, t_head,
    ROW: tl.constexpr, PIECE: tl.constexpr, PIECE_P: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Quantise TILE tokens of one head, a scale per token and group of channels; a group is SPAN fields of a PIECE."""
    i, head = tl.program_id(0), tl.program_id(1)
    source, target = tl.load(source_ids + i).to(tl.int64), tl.load(target_ids + i).to(tl.int64)
    slot, column = tl.program_id(2) * TILE + tl.arange(0, TILE), tl.arange(0, PIECE_P)
    ok = (slot < BLOCK)[:, None] & (column < PIECE)[None, :]
    at = x + source * x_page + head * x_head + slot[:, None] * x_slot + column[None, :]
    for piece in tl.static_range(ROW // PIECE):
        packed = tl.zeros([TILE, PIECE_P], tl.int32)
        for first in tl.static_range(0, 8 // BITS, SPAN):
            low = tl.full([TILE], float("inf"), tl.float32)
            high = tl.full([TILE], float("-inf"), tl.float32)
            for field in tl.static_range(first, first + SPAN):
                values = tl.load(at + field * ROW + piece * PIECE, mask=ok, other=0.0).to(tl.float32)
                low = tl.minimum(low, tl.min(tl.where(ok, values, float("inf")), 1))
                high = tl.maximum(high, tl.max(tl.where(ok, values, float("-inf")), 1))
            scale, zero = fit(low, high, BITS, HAS_ZERO)
            at_table = target * t_page + head * t_head + (first * ROW + piece * PIECE) // GROUP * BLOCK + slot
            tl.store(scales + at_table, scale, mask=slot < BLOCK)
            if HAS_ZERO:
                tl.store(zeros + at_table, zero, mask=slot < BLOCK)
            for field in tl.static_range(first, first + SPAN):
                values = tl.load(at + field * ROW + piece * PIECE, mask=ok, other=0.0).to(tl.float32)
                if MARKS:
                    mark(bad + i, values, tl.where(slot < BLOCK, scale, 0.0), tl.where(slot < BLOCK, zero, 0.0))
                code = encode(values, scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None], BITS, HAS_ZERO)
                packed |= code << (field * BITS)
        at_code = codes + target * c_page + head * c_head + slot[:, None] * ROW + piece * PIECE + column[None, :]
        tl.store(at_code, packed.to(tl.uint8), mask=ok)


@triton.jit
def quantize_fp8(
    x, codes, scales, bad, source_ids, target_ids, x_page, x_head, x_slot, c_page, c_head, t_page, t_head,
    DIM: tl.constexpr, DIM_P: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Quantise one head of one block, one scale for all of it."""
    i, head = tl.program_id(0), tl.program_id(1)
    source, target = tl.load(source_ids + i).to(tl.int64), tl.load(target_ids + i).to(tl.int64)
    in_tile, column = tl.arange(0, TILE)[:, None], tl.arange(0, DIM_P)[None, :]
    ok = (in_tile < BLOCK) & (column < DIM)
    at = x + source * x_page + head * x_head + column
    largest = tl.zeros([TILE, DIM_P], tl.float32)
    spoilt = tl.zeros([TILE, DIM_P], tl.int32)
    for start in range(0, BLOCK, TILE):
        values = tl.load(at + (start + in_tile) * x_slot, mask=ok, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
        if MARKS:
            spoilt = tl.maximum(spoilt, is_spoilt(values))
    stored = half_up(tl.math.div_rn(tl.max(tl.max(largest, 1), 0), 448.0))
    if MARKS:
        tl.store(bad + i, 1, mask=(tl.max(tl.max(spoilt, 1), 0) + is_spoilt(stored)) > 0)
    tl.store(scales + target * t_page + head * t_head, stored)
    scale = stored.to(tl.float32)
    for start in range(0, BLOCK, TILE):
        values = tl.load(at + (start + in_tile) * x_slot, mask=ok, other=0.0).to(tl.float32)
        steps = tl.where(scale > 0, tl.math.div_rn(values, tl.where(scale > 0, scale, 1.0)), 0.0)
        byte = to_e4m3(round_e4m3(steps)).to(tl.uint8)
        tl.store(codes + target * c_page + head * c_head + (start + in_tile) * DIM + column, byte, mask=ok)


@triton.jit
def unpack(codes, FIELD: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr, COMPUTE: tl.constexpr):
    """Return one field of bytes as centred numbers of dtype COMPUTE; fp8 comes out 256 times too small.

    Source: bfloat16 0x4300 | c is 128 + c, so small codes become numbers without a conversion instruction.
    """
    HALF: tl.constexpr = 1 << (BITS - 1)
    if IS_FP8:
        bits = codes.to(tl.int16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(COMPUTE)
    elif BITS == 8:
        return codes.to(tl.int8, bitcast=True).to(COMPUTE)
    else:
        code = (codes >> (FIELD * BITS)) & ((1 << BITS) - 1)
        if tl.int8 == COMPUTE:
            return code.to(tl.int8) - HALF
        elif tl.bfloat16 == COMPUTE:
            return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + HALF)
        else:
            return code.to(tl.int8).to(COMPUTE) - HALF


@triton.jit
def dequantize(
    codes, scales, zeros, x, source_ids, target_ids, c_page, c_head, t_page, t_head, x_page, x_head, x_slot,
    ROW: tl.constexpr, ROW_P: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, AXIS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write TILE tokens of one head in full precision; for promotion, not for attention, which needs no such copy."""
    i, head = tl.program_id(0), tl.program_id(1)
    source, target = tl.load(source_ids + i).to(tl.int64), tl.load(target_ids + i).to(tl.int64)
    slot, column = tl.program_id(2) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, ROW_P)[None, :]
    ok = (slot < BLOCK) & (column < ROW)
    bytes_ = tl.load(codes + source * c_page + head * c_head + slot * ROW + column, mask=ok, other=0)
    base = source * t_page + head * t_head
    for field in tl.static_range(8 // BITS):
        channel = field * ROW + column
        if AXIS == "channel":
            place = slot // GROUP * DIM + channel
        elif AXIS == "token":
            place = channel // GROUP * BLOCK + slot
        else:
            place = slot * 0 + channel * 0
        scale = tl.load(scales + base + place, mask=ok, other=0.0).to(tl.float32)
        values = unpack(bytes_, field, BITS, AXIS == "page", tl.float32)
        values = values * (scale * 256.0 if AXIS == "page" else scale)
        if HAS_ZERO:
            values += tl.load(zeros + base + place, mask=ok, other=0.0).to(tl.float32)
        at = x + target * x_page + head * x_head + slot * x_slot + channel
        tl.store(at, narrow(values, x.dtype.element_ty, ROUND), mask=ok)


def channels_shape(part: Part) -> dict[str, Any]:
    """Choose the constants of quantize_channels; the same for the launcher and the ahead-of-time report."""
    return dict(
        ROW=part.row_bytes, ROW_P=triton.next_power_of_2(part.row_bytes), DIM=part.dim, GROUP=part.group,
        BITS=part.bits, HAS_ZERO=part.has_zeros, num_warps=8 if part.group * part.row_bytes > 8192 else 4,
    )  # fmt: skip


def tokens_shape(part: Part) -> dict[str, Any]:
    """Choose the constants of quantize_tokens."""
    return dict(
        ROW=part.row_bytes, PIECE=part.piece, PIECE_P=triton.next_power_of_2(part.piece),
        SPAN=max(1, part.group // part.row_bytes), BLOCK=part.block, TILE=min(TOKENS, part.block), GROUP=part.group,
        BITS=part.bits, HAS_ZERO=part.has_zeros, num_warps=4,
    )  # fmt: skip


def fp8_shape(part: Part) -> dict[str, Any]:
    """Choose the constants of quantize_fp8."""
    return dict(
        DIM=part.dim,
        DIM_P=triton.next_power_of_2(part.dim),
        BLOCK=part.block,
        TILE=min(TOKENS, part.block),
        num_warps=4,
    )


def dequantize_shape(part: Part) -> dict[str, Any]:
    """Choose the constants of dequantize, without ROUND."""
    return dict(
        ROW=part.row_bytes, ROW_P=triton.next_power_of_2(part.row_bytes), DIM=part.dim, BLOCK=part.block,
        TILE=min(TOKENS, part.block), GROUP=part.group, BITS=part.bits, HAS_ZERO=part.has_zeros, AXIS=part.axis,
        num_warps=4,
    )  # fmt: skip


def quantize_part(
    x: Tensor, views: PartViews, source_ids: Tensor, target_ids: Tensor, bad: Tensor | None = None
) -> None:
    """Quantise blocks source_ids of x [pages, heads, block, dim] to the parts of pages target_ids.

    bad int32 [len(source_ids), or longer]: 1 is written for blocks whose values the format cannot hold.
    """
    part, count, heads = views.part, len(source_ids), x.shape[1]
    zeros = views.scales if views.zeros is None else views.zeros
    marks = source_ids if bad is None else bad
    arguments = (marks, source_ids, target_ids, *x.stride()[:3], *views.codes.stride()[:2], *views.scales.stride()[:2])
    marking = dict(MARKS=bad is not None)
    if part.axis == "channel":
        grid = (count, heads, part.block // part.group)
        quantize_channels[grid](x, views.codes, views.scales, zeros, *arguments, **channels_shape(part), **marking)
    elif part.axis == "token":
        shape = tokens_shape(part)
        grid = (count, heads, triton.cdiv(part.block, shape["TILE"]))
        quantize_tokens[grid](x, views.codes, views.scales, zeros, *arguments, **shape, **marking)
    else:
        quantize_fp8[(count, heads)](x, views.codes, views.scales, *arguments, **fp8_shape(part), **marking)


def dequantize_part(views: PartViews, x: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """Write pages source_ids to blocks target_ids of x [pages, heads, block, dim]."""
    part, shape = views.part, dequantize_shape(views.part)
    zeros = views.scales if views.zeros is None else views.zeros
    dequantize[(len(source_ids), x.shape[1], triton.cdiv(part.block, shape["TILE"]))](
        views.codes, views.scales, zeros, x, source_ids, target_ids, *views.codes.stride()[:2],
        *views.scales.stride()[:2], *x.stride()[:3], ROUND=needs_rounding(x.dtype), **shape,
    )  # fmt: skip
