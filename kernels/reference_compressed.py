"""References for compressed pages, in float64, group by group and number by number, written to be read.

They share nothing with the kernels but PageFormat: bytes are taken apart here a second time, so a wrong offset or a
swapped field cannot agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .formats import PageFormat, Part
from .reference import IntArray, dense_attention, gather_tokens


def quantize_group(x: np.ndarray, part: Part) -> tuple[np.ndarray, float, float]:
    """Return centred codes (fp8: numbers of that grid), scale and zero of the values that share a scale."""
    if part.axis == "page":
        scale = _half_up(np.abs(x).max() / 448.0)
        steps = x / scale if scale else 0.0 * x
        return torch.from_numpy(steps).clamp(-448, 448).float().to(torch.float8_e4m3fn).double().numpy(), scale, 0.0
    half = 1 << (part.bits - 1)
    if part.has_zeros:
        scale = _half_up((x.max() - x.min()) / (2 * half - 1))
        zero = float(np.float16(x.min() + half * scale))
    else:
        scale, zero = _half_up(np.abs(x).max() / (half - 1)), 0.0
    steps = (x - zero) / scale if scale else 0.0 * x
    return np.clip(np.floor(steps + 0.5), -half if part.has_zeros else 1 - half, half - 1), scale, zero


def _half_up(x: float) -> float:
    near = np.float16(x)
    return float(near if near >= x else np.nextafter(near, np.float16(np.inf)))


def groups(part: Part) -> Iterator[tuple[tuple[int, int], slice, slice]]:
    """Yield each scale's place in the table, and the tokens and channels that share it."""
    rows, columns = part.table_shape
    for row in range(rows):
        stretch = slice(row * part.group, (row + 1) * part.group)
        for column in range(columns):
            one = slice(column, column + 1)
            if part.axis == "page":
                yield (row, column), slice(0, part.block), slice(0, part.dim)
            else:
                yield (row, column), *((stretch, one) if part.axis == "channel" else (one, stretch))


def read_pages(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Take the bytes of pages [n, layer_bytes] apart: k [n, heads, block, head_dim] and v, float64."""
    raw = pages.cpu().numpy()
    start, found = 0, []
    for part in (fmt.keys, fmt.values):
        out = np.empty((len(raw), fmt.kv_heads, part.block, part.dim))
        for n in range(len(raw)):
            for h in range(fmt.kv_heads):
                out[n, h] = _read_record(raw[n, start + h * part.record_bytes :][: part.record_bytes], part)
        found.append(torch.from_numpy(out))
        start += fmt.kv_heads * part.record_bytes
    return found[0], found[1]


def _read_record(record: np.ndarray, part: Part) -> np.ndarray:
    rows = record[: part.block * part.row_bytes].reshape(part.block, part.row_bytes)
    out = np.empty((part.block, part.dim))
    for channel in range(part.dim):
        field, byte = divmod(channel, part.row_bytes)
        bits = rows[:, byte].copy()
        if part.axis == "page":
            out[:, channel] = torch.from_numpy(bits).view(torch.float8_e4m3fn).double().numpy()
        elif part.bits == 8:
            out[:, channel] = bits.view(np.int8)
        else:
            out[:, channel] = (bits >> (field * part.bits) & (2**part.bits - 1)).astype(int) - 2 ** (part.bits - 1)
    count = part.table_shape[0] * part.table_shape[1]
    scales = record[part.scales_at :][: 2 * count].view(np.float16).reshape(part.table_shape).astype(float)
    zeros = np.zeros(part.table_shape)
    if part.has_zeros:
        zeros = record[part.zeros_at :][: 2 * count].view(np.float16).reshape(part.table_shape).astype(float)
    for place, tokens, channels in groups(part):
        out[tokens, channels] = scales[place] * out[tokens, channels] + zeros[place]
    return out


def hadamard(dim: int) -> Tensor:
    """Return the matrix with entries (-1)^(ones in i & j) / sqrt(dim)."""
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]
    return torch.tensor(signs, dtype=torch.float64) / dim**0.5


def dequantize_pages(pages: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Return K and V as the model would have them: rotated back where the format rotates."""
    k, v = read_pages(pages, fmt)
    return (k @ hadamard(fmt.head_dim) if fmt.rotates else k), v


def compressed_attention(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    ahead: IntArray | None = None,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to dequantised pages, one dense float64 attention per sequence; row i sits at kv_len + ahead + i."""
    k, v = dequantize_pages(pages, fmt)
    table, bounds = torch.as_tensor(block_table), [int(x) for x in cu_q]
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    for s, kv_len in enumerate(int(x) for x in kv_lens):
        rows = slice(bounds[s], bounds[s + 1])
        first = kv_len + (int(ahead[s]) if ahead is not None else 0)
        pos_q, pos_k = torch.arange(first, first + rows.stop - rows.start)[:, None], torch.arange(kv_len)[None, :]
        visible = torch.ones(rows.stop - rows.start, kv_len, dtype=torch.bool)
        if window is not None:
            visible = (pos_q - pos_k < window) | (pos_k < sinks)
        keys, values = gather_tokens(k, table[s], kv_len), gather_tokens(v, table[s], kv_len)
        out[rows], lse[rows] = dense_attention(q[rows].cpu(), keys, values, visible, scale=scale, softcap=softcap)
    return out, lse


def homomorphic_product(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Return sum (a_scale a + a_zero) (b_scale b + b_zero) over the last axis, from sums of integers alone.

    Shapes: a [.., n], b [.., n] integers in float64; scales and zeros [..], one for all n.
    Source: HACK (arXiv 2502.03589), equation of section 4: all four terms, none known to be 0.
    """
    n, products = a.shape[-1], (a * b).sum(-1)
    return (
        a_scale * b_scale * products + a_zero * b_scale * b.sum(-1) + b_zero * a_scale * a.sum(-1) + n * a_zero * b_zero
    )
