"""Quantising pages with torch, and what the parts of a compressed page are as views.

Whole groups at a time, in float32, on any device: what the Triton kernels are compared with byte by byte. Scales are
rounded up to float16 and codes are chosen against the stored scale and zero, so reading back errs by half a step and by
the rounding of the zero, never by the rounding of a scale. Guards: a group with a number that is not finite is refused
with its place, or its block is marked, since its NaN scale would spoil every token of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .formats import PageFormat, Part

FP8_MAX = 448.0
FP8_UNIT = 256.0  # what `decode` leaves out: 2 ** (15 - 7), the difference of float16's and e4m3's exponent bias


@dataclass(frozen=True, slots=True)
class PartViews:
    """K or V of one layer's compressed pages, nothing copied.

    Shapes: codes [pages, heads, block, row_bytes], uint8; scales, zeros [pages, heads, *table_shape], float16; zeros is
            None where the format has none.
    """

    part: Part
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def part_views(pages: Tensor, fmt: PageFormat) -> tuple[PartViews, PartViews]:
    """View one layer of compressed pages, uint8 rows [pages, layer_bytes], as its parts."""
    keys, values = fmt.keys, fmt.values
    return _views(pages, keys, fmt.kv_heads, 0), _views(pages, values, fmt.kv_heads, fmt.kv_heads * keys.record_bytes)


def _views(pages: Tensor, part: Part, heads: int, start: int) -> PartViews:
    records = pages[:, start : start + heads * part.record_bytes].unflatten(1, (heads, part.record_bytes))
    rows, columns = part.table_shape
    size = rows * columns * 2

    def table(at: int) -> Tensor:
        return records[..., at : at + size].view(torch.float16).unflatten(2, (rows, columns))

    codes = records[..., : part.block * part.row_bytes].unflatten(2, (part.block, part.row_bytes))
    return PartViews(part, codes, table(part.scales_at), table(part.zeros_at) if part.has_zeros else None)


@cache
def hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """Return the orthonormal, symmetric Hadamard matrix [dim, dim] in float32; dim is a power of two.

    Stream: made on the host and there when this returns, since any stream may ask for it first and all of them share it.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * dim**-0.5).float().to(device)


def grouped(x: Tensor, part: Part) -> tuple[Tensor, int]:
    """View values [..., block, dim] so that one axis holds those which share a scale; return that axis too."""
    if part.axis == "channel":
        return x.unflatten(-2, (-1, part.group)), -2
    if part.axis == "token":
        return x.unflatten(-1, (-1, part.group)), -1
    return x.flatten(-2), -1


def as_table(statistic: Tensor, part: Part) -> Tensor:
    """Order a statistic over `grouped` (kept axis of size 1) as the format's table does."""
    if part.axis == "channel":
        return statistic.squeeze(-2)
    return statistic.squeeze(-1).transpose(-1, -2) if part.axis == "token" else statistic[..., None]


def from_table(table: Tensor, part: Part) -> Tensor:
    """Broadcast a table [..., rows, columns] against `grouped` values."""
    if part.axis == "channel":
        return table.unsqueeze(-2)
    return table.transpose(-1, -2).unsqueeze(-1) if part.axis == "token" else table.squeeze(-1)


def half_up(x: Tensor) -> Tensor:
    """Round positive float32 up to float16."""
    near = x.half()
    return torch.where(near.float() < x, (near.view(torch.int16) + 1).view(torch.float16), near)


def quantize_part(x: Tensor, views: PartViews, ids: Tensor, bad: Tensor | None = None) -> None:
    """Write values x [n, heads, block, dim] to the parts of pages ids [n].

    Raises: ValueError for values that the format cannot hold, unless bad [n, or longer] is there to be marked.
    """
    part = views.part
    rows, axis = grouped(x.float(), part)
    zero = None
    if part.has_zeros:
        low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
        scale = half_up((high - low) / (2**part.bits - 1))
        zero = (low + 2.0 ** (part.bits - 1) * scale.float()).half()
    else:
        scale = half_up(rows.abs().amax(axis, keepdim=True) / (FP8_MAX if part.axis == "page" else 127.0))
    spoilt = ~torch.isfinite(scale) if zero is None else ~(torch.isfinite(scale) & torch.isfinite(zero))
    if bad is not None:
        bad[: len(x)] |= spoilt.flatten(1).any(1)
    elif spoilt.any():
        check_tables(as_table(scale, part), None if zero is None else as_table(zero, part), part)
    views.scales[ids] = as_table(scale, part)
    if zero is not None and views.zeros is not None:
        views.zeros[ids] = as_table(zero, part)
        rows = rows - zero.float()
    step = scale.float()
    steps = torch.where(step > 0, rows / torch.where(step > 0, step, 1.0), 0.0).view(x.shape)
    views.codes[ids] = encode(steps, part)


def encode(steps: Tensor, part: Part) -> Tensor:
    """Round multiples of the scale [..., block, dim] to codes [..., block, row_bytes]."""
    if part.axis == "page":
        return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    half = 1 << (part.bits - 1)
    low = -half if part.has_zeros else 1 - half
    codes = torch.floor(steps + 0.5).clamp_(low, half - 1)
    if part.bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    fields = (codes + half).to(torch.uint8).unflatten(-1, (part.fields, part.row_bytes)).unbind(-2)
    packed = fields[0].clone()
    for j, field in enumerate(fields[1:], 1):
        packed |= field << (j * part.bits)
    return packed


def decode(codes: Tensor, part: Part, out: Tensor, space: Tensor | None = None) -> Tensor:
    """Write dense codes [..., block, row_bytes] as centred numbers, in units of the scale, to out [..., block, dim].

    e4m3 comes out FP8_UNIT times too small: its bits, moved up, are a float16 with another exponent bias, and torch's
    own conversion takes ten times as long. space, as large as codes (twice for fp8), saves fresh memory on every call.
    """
    if part.axis == "page":
        bits = (
            torch.empty(codes.shape, dtype=torch.int16) if space is None else space.view(torch.int16).view(codes.shape)
        )
        bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        return out.copy_(bits.view(torch.float16))
    if part.bits == 8:
        return out.copy_(codes.view(torch.int8))
    field = torch.empty_like(codes) if space is None else space.view(codes.shape)
    fields = out.unflatten(-1, (part.fields, part.row_bytes))
    for j in range(part.fields):
        take_field(codes, j, part.bits, field)
        fields[..., j, :] = field.view(torch.int8).sub_(1 << (part.bits - 1))
    return out


def take_field(codes: Tensor, index: int, bits: int, out: Tensor) -> None:
    """Write one bit field of every byte to out, eight bytes at a time where rows are that long."""
    mask = (1 << bits) - 1
    if codes.shape[-1] % 8 == 0:
        codes, out, mask = codes.view(torch.int64), out.view(torch.int64), int.from_bytes(bytes([mask] * 8), "little")
    if index:
        torch.bitwise_right_shift(codes, index * bits, out=out)
        out.bitwise_and_(mask)
    else:
        torch.bitwise_and(codes, mask, out=out)


def dequantize_values(views: PartViews, ids: Tensor, out: Tensor) -> None:
    """Turn decoded codes [n, heads, block, dim] of pages ids into the values that they stand for, in place."""
    rows, _ = grouped(out, views.part)
    unit = FP8_UNIT if views.part.axis == "page" else 1.0
    rows.mul_(from_table(views.scales.index_select(0, ids).float() * unit, views.part).to(out.dtype))
    if views.zeros is not None:  # not addcmul: with a scale per token it leaves torch's fast path
        rows.add_(from_table(views.zeros.index_select(0, ids), views.part).to(out.dtype))


def dequantize_part(views: PartViews, ids: Tensor, out: Tensor) -> Tensor:
    """Write what pages ids [n] hold to out [n, heads, block, dim], in out's dtype."""
    decode(views.codes[ids], views.part, out)
    dequantize_values(views, ids, out)
    return out


def check_tables(scales: Tensor, zeros: Tensor | None, part: Part) -> None:
    """Refuse numbers that are not finite, or too large for float16, by the scale that they spoil."""
    bad = ~torch.isfinite(scales)
    if zeros is not None:
        bad |= ~torch.isfinite(zeros)
    if bad.any():
        page, head, row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"block {page} of those given, KV head {head}, scale [{row}, {column}] of {part.table_shape} per {part.axis}: "
            f"values are not finite or too large for float16 scales; keep this block in full precision"
        )
