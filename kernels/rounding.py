"""Key summaries that stay true when their blocks are rounded: how far a format may move a key, told from the summary alone.

A summary (selection.py) is made of a block's keys as they are at that moment. A tier that keeps the block in fewer bits gives
back other keys, and their products with q could pass the bound that the summary promises. So where tiers round, summaries
are widened once, when they are written: minima go down and maxima up by the most that a key channel can move outward. Scores
then cost what they did, and the bound on what is left out holds for the blocks as any of the tiers gives them back.
Guards: no rounded key lies outside its widened summary. What rounding does to an answer is not in here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import IntArray, check_rows, to_host
from .conversion import read_keys
from .formats import PageFormat, Part
from .uploads import to_device

KEYS_AT_ONCE = 1 << 22  # numbers of K that are unpacked at a time: 16 MiB
_UP = 1.0 + 2.0**-9  # scales are rounded up to float16 (2**-10); the rest covers float32 in here
_ZERO = 2.0**-10  # of a float16 zero, relative: twice its rounding
_TINY = 2.0**-24  # the smallest float16: what rounding adds to a scale or a zero near nothing


@torch.no_grad()
def summarize_pages(
    pages: Tensor, source_ids: IntArray, fmt: PageFormat, summaries: Tensor, target_ids: IntArray
) -> None:
    """Write the minimum and maximum of each key channel of compressed blocks, of the keys as attention reads them.

    Rounded outward to the summaries' dtype, so they cover those keys, also where products of scales are rounded to it.

    Shapes: pages uint8 [m, layer_bytes]; summaries [p, Hkv, 2, D] in any floating dtype.
    Raises: ValueError for shapes and ids that do not fit, and for HACK formats, whose attention rounds q as well.
    """
    if fmt.is_hack:
        raise ValueError(f"format={fmt.name!r}: its attention rounds q, so no summary bounds its scores")
    if summaries.dim() != 4 or summaries.shape[1:] != (fmt.kv_heads, 2, fmt.head_dim):
        raise ValueError(f"summaries must be [n, {fmt.kv_heads}, 2, {fmt.head_dim}], got {tuple(summaries.shape)}")
    source, target = to_host(source_ids), to_host(target_ids)
    if len(source) != len(target):
        raise ValueError(f"{len(source)} blocks for {len(target)} summaries")
    check_rows(summaries[:, 0, 0], target, "summary ids")
    step = max(1, KEYS_AT_ONCE // (fmt.kv_heads * fmt.block * fmt.head_dim))
    for first in range(0, len(source), step):
        keys = read_keys(pages, source[first : first + step], fmt)
        low, high = keys.amin(2), keys.amax(2)
        eps = torch.finfo(summaries.dtype).eps
        found = torch.stack([low - eps * low.abs(), high + eps * high.abs()], 2).to(summaries.dtype)
        summaries[to_device(target[first : first + step], summaries.device)] = found


@torch.no_grad()
def widen_summaries(summaries: Tensor, ids: IntArray, fmt: PageFormat) -> None:
    """Move the summaries of blocks outward, in place, so that they cover the keys as `fmt` gives them back.

    Keys that are rounded twice (int8 above, int4 below) want a call for each format, in that order.

    Shapes: summaries [p, Hkv, 2, D], as summarize_blocks wrote them; ids [n].
    Raises: ValueError for a format of other heads or channels, and ids out of range.
    Source: derived from `quantize_part`; each case is tried in tests/kernels/test_rounding.py.
    """
    if summaries.dim() != 4 or summaries.shape[1:] != (fmt.kv_heads, 2, fmt.head_dim):
        raise ValueError(f"summaries must be [n, {fmt.kv_heads}, 2, {fmt.head_dim}], got {tuple(summaries.shape)}")
    rows = to_host(ids)
    check_rows(summaries[:, 0, 0], rows, "summary ids")
    at = to_device(rows, summaries.device)
    low, high = summaries.index_select(0, at).float().unbind(2)  # [n, Hkv, D]
    moved = key_movement(low, high, fmt)
    # Products and sums of `dequantize_values` are in the dtype of the cache, and so is what is stored here.
    reach = torch.maximum(low.abs(), high.abs()) + (high - low) + moved
    moved = moved + torch.finfo(summaries.dtype).eps * reach
    summaries[at] = torch.stack([low - moved, high + moved], 2).to(summaries.dtype)


def key_movement(low: Tensor, high: Tensor, fmt: PageFormat) -> Tensor:
    """Return how far outside [low, high] a format may put a key channel of a block, [n, Hkv, D]."""
    part, most = fmt.keys, torch.maximum(low.abs(), high.abs())
    if part.axis == "page":
        # e4m3 has 3 bits behind the point, and below 2**-6 steps of 2**-9 of the scale.
        scale = most.amax(-1, keepdim=True) / 448.0 * _UP + _TINY
        return most * 2.0**-4 + scale * 2.0**-10
    if part.axis == "token":
        return _of_tokens(low, high, most, part, rotates=fmt.rotates)
    if part.has_zeros:
        # Lowest and highest key have codes of their own: nothing leaves their interval but by rounded tables.
        return (high - low) * (_UP - 1.0) + most * _ZERO + _TINY * (1 << part.bits)
    return most * (_UP / 254.0) + _TINY


def _of_tokens(low: Tensor, high: Tensor, most: Tensor, part: Part, *, rotates: bool) -> Tensor:
    """Of a format whose scale is that of one token over channels: half a step of the widest token there could be."""
    steps = 2.0**part.bits - 1.0
    if rotates:
        # A rotation keeps lengths: no rotated channel is larger than the key is long, and no error longer than all of its.
        length = most.square().sum(-1, keepdim=True).sqrt() * _UP
        each = length * (_UP / steps + _ZERO) + _TINY * (1 << part.bits)
        return (each * part.dim**0.5).expand_as(most)
    groups = (*low.shape[:-1], -1, part.group)
    top, bottom = high.view(groups).amax(-1, keepdim=True), low.view(groups).amin(-1, keepdim=True)
    each = (top - bottom) * (_UP / (2 * steps)) + torch.maximum(top.abs(), bottom.abs()) * _ZERO
    return (each + _TINY * (1 << part.bits)).expand(groups).reshape(most.shape)
