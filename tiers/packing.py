"""Packing: blocks in full precision to the formats of a tier, and back. The one file of tiers/ that computes on values.

The arithmetic is kernels/'s, which loads torch; nothing here is loaded until a tier has a format. Works on rows of
blocks where they are, on the device that they are on. Guards: only what is whole is packed, and a block whose values a
format cannot hold (not finite, or too large for its scales) is named and stays as it is. On a GPU nobody waits to find
out: its kernels mark such blocks, the marks follow to the host, and the copy's event tells.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.conversion import dequantize_blocks, quantize_blocks
from ..kernels.uploads import to_device
from ..kernels.views import layer_views
from .errors import ConfigError, UnpackableError
from .formats import BlockFormat
from .streams import IntArray, Rows, Verdict


def check_torch(fmt: BlockFormat, *, name: str) -> None:
    """Raises ConfigError for a format that this build of torch has not."""
    if any(layer is not None and layer.name == "fp8" for layer in fmt.layers) and not hasattr(torch, "float8_e4m3fn"):
        raise ConfigError(f"{name}={fmt.text!r}: torch {torch.__version__} has no float8_e4m3fn; use int8")


def pack(fmt: BlockFormat, blocks: Rows, block_ids: IntArray, packed: Rows, packed_ids: IntArray) -> Verdict | None:
    """packed[packed_ids[i]] becomes the packed form of blocks[block_ids[i]]. Raises UnpackableError, having packed the others.

    On a GPU it raises nothing of the kind and returns a verdict, which gives that error once the device is done.

    Shapes: blocks uint8 [n, block_bytes of the layout], packed uint8 [m, fmt.block_bytes], numpy or of one device.
    """
    if not isinstance(blocks, np.ndarray) and blocks.is_cuda:
        return pack_unseen(fmt, blocks, block_ids, packed, packed_ids)
    try:
        _pack(fmt, blocks, block_ids, packed, packed_ids)
    except ValueError as error:
        if len(block_ids) == 1:
            raise UnpackableError(block_ids, str(error)) from error
        bad = [i for i in range(len(block_ids)) if not _is_packed(fmt, blocks, block_ids[[i]], packed, packed_ids[[i]])]
        if bad:
            raise UnpackableError(block_ids[bad], str(error)) from error
        raise
    return None


def pack_unseen(fmt: BlockFormat, blocks: Tensor, block_ids: IntArray, packed: Tensor, packed_ids: IntArray) -> Verdict:
    """As `pack`, without looking at any value: everything is queued on the current stream, and the verdict looks."""
    bad = torch.zeros(len(block_ids), dtype=torch.int32, device=blocks.device)
    _pack(fmt, blocks, block_ids, packed, packed_ids, bad)
    told = torch.empty(bad.shape, dtype=bad.dtype, pin_memory=bad.is_cuda).copy_(bad, non_blocking=True)

    def verdict() -> UnpackableError | None:
        found = told.numpy() != 0
        why = "values are not finite or too large for float16 scales; they stay in full precision"
        return UnpackableError(block_ids[found], f"{fmt.text}: {why}") if found.any() else None

    return verdict


def unpack(fmt: BlockFormat, packed: Rows, packed_ids: IntArray, blocks: Rows, block_ids: IntArray) -> None:
    """blocks[block_ids[i]] becomes in full precision what packed[packed_ids[i]] holds."""
    size = fmt.layout.layer_bytes
    for layer, (start, end) in enumerate(pairwise(fmt.starts)):
        slices = blocks[:, layer * size : (layer + 1) * size]
        unpack_layer(fmt, layer, packed[:, start:end], packed_ids, slices, block_ids)


def unpack_layer(
    fmt: BlockFormat, layer: int, pages: Rows, page_ids: IntArray, slices: Rows, slice_ids: IntArray
) -> None:
    """slices[slice_ids[i]], uint8 [n, layer_bytes of the layout], becomes what pages[page_ids[i]] hold of that layer."""
    source, target, page = _tensor(pages), _tensor(slices), fmt.layers[layer]
    if page is None:
        target[_ids(slice_ids, target)] = source[_ids(page_ids, source)]
        return
    k, v = _values(fmt, target)
    dequantize_blocks(source, page_ids, k, v, slice_ids, page)


def _pack(
    fmt: BlockFormat, blocks: Rows, block_ids: IntArray, packed: Rows, packed_ids: IntArray, bad: Tensor | None = None
) -> None:
    source, target, size = _tensor(blocks), _tensor(packed), fmt.layout.layer_bytes
    target.index_fill_(0, _ids(packed_ids, target), 0)  # between the parts lies what was there before: another's block
    for layer, page in enumerate(fmt.layers):
        values = source[:, layer * size : (layer + 1) * size]
        pages = target[:, fmt.starts[layer] : fmt.starts[layer + 1]]
        if page is None:
            pages[_ids(packed_ids, target)] = values[_ids(block_ids, source)]
        else:
            quantize_blocks(*_values(fmt, values), block_ids, pages, packed_ids, page, bad=bad)


def _is_packed(fmt: BlockFormat, blocks: Rows, block_ids: IntArray, packed: Rows, packed_ids: IntArray) -> bool:
    try:
        _pack(fmt, blocks, block_ids, packed, packed_ids)
    except ValueError:
        return False
    return True


def _values(fmt: BlockFormat, slices: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of one layer's slices, as views."""
    layout = fmt.layout
    typed = slices.view(getattr(torch, layout.dtype))
    return layer_views(typed, 0, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.v_dim)


def _tensor(rows: Rows) -> Tensor:
    return torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows


def _ids(ids: IntArray, like: Any) -> Tensor:
    return to_device(ids, like.device)
