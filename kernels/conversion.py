"""Conversion: blocks in full precision to compressed pages, and back.

The same rule as in `dispatch`: arguments are checked here, a CUDA tensor goes to Triton, a CPU tensor to torch. One
layer of compressed pages is a uint8 view [pages, layer_bytes] of whatever holds the blocks; PageFormat says what lies
where in a row. Guards: only whole blocks are compressed (a partial tail stays in full precision, so nothing is ever
quantised twice), and values that are not finite are refused, or, where nobody may wait for the device, marked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import cpu_quant
from .checks import IntArray, check_rows, check_unique, is_debug, to_host
from .cpu_quant import PartViews, check_tables, hadamard, part_views
from .formats import PART_ALIGNMENT, PageFormat
from .uploads import to_device


@torch.no_grad()
def quantize_blocks(
    k: Tensor,
    v: Tensor,
    source_ids: IntArray,
    pages: Tensor,
    target_ids: IntArray,
    fmt: PageFormat,
    *,
    bad: Tensor | None = None,
) -> None:
    """Write blocks of one layer to compressed pages: pages[target_ids[i]] holds what k, v[source_ids[i]] held.

    With `bad`, no block is refused for its values: bad[i] becomes 1 where block i cannot be held, what is written of it
    means nothing, and nothing here waits for the device. Entries are never set back to 0.

    Shapes: k [n, Hkv, block, D], v [n, Hkv, block, Dv], strided views in full precision; pages uint8 [m, layer_bytes];
            bad int32 [len(source_ids)] or longer, dense, beside the pages.
    Raises: ValueError for shapes that do not fit, ids out of range, and, without `bad`, values that are not finite or whose
            scale float16 cannot hold (on a GPU: only under KVTIER_DEBUG=1, since looking waits for the device).
    """
    source, target = _check_conversion(k, v, source_ids, pages, target_ids, fmt)
    if bad is not None and (bad.dtype != torch.int32 or bad.dim() != 1 or len(bad) < len(source) or bad.stride(0) != 1):
        raise ValueError(f"bad must be dense int32 [{len(source)}] or longer, got {bad.dtype} {tuple(bad.shape)}")
    if is_debug():
        check_unique(target, "target_ids")
    if not len(source):
        return
    at, to = to_device(source, k.device), to_device(target, k.device)
    for x, views, rotates in zip((k, v), part_views(pages, fmt), (fmt.rotates, False)):
        _quantize(x, at, views, to, rotates, bad)


def _quantize(x: Tensor, at: Tensor, views: PartViews, to: Tensor, rotates: bool, bad: Tensor | None) -> None:
    """Quantise K or V, rotated first where the format says so."""
    if rotates:
        x = x.index_select(0, at).float() @ hadamard(x.shape[3], x.device)
        at = torch.arange(len(at), device=at.device)
    if not x.is_cuda:
        cpu_quant.quantize_part(x.index_select(0, at), views, to, bad)
        return
    from . import triton_quant

    triton_quant.quantize_part(x, views, at, to, bad)
    if bad is None and is_debug():
        check_tables(views.scales[to], None if views.zeros is None else views.zeros[to], views.part)


@torch.no_grad()
def dequantize_blocks(
    pages: Tensor, source_ids: IntArray, k: Tensor, v: Tensor, target_ids: IntArray, fmt: PageFormat
) -> None:
    """Write compressed pages back in full precision: k, v[target_ids[i]] become what pages[source_ids[i]] hold.

    For moving a block up to a tier that keeps it in full precision; attention reads compressed pages as they are.
    """
    target, source = _check_conversion(k, v, target_ids, pages, source_ids, fmt)
    if is_debug():
        check_unique(target, "target_ids")
    if not len(source):
        return
    at, to = to_device(source, k.device), to_device(target, k.device)
    for x, views, rotates in zip((k, v), part_views(pages, fmt), (fmt.rotates, False)):
        _dequantize(views, at, x, to, rotates)


@torch.no_grad()
def read_keys(pages: Tensor, ids: IntArray, fmt: PageFormat) -> Tensor:
    """Return the keys of compressed pages, float32 [n, Hkv, block, D]. Raises ValueError for shapes and ids that do not fit."""
    check_pages(pages, fmt)
    rows = to_host(ids)
    check_rows(pages, rows, "page ids")
    keys = torch.empty(len(rows), fmt.kv_heads, fmt.block, fmt.head_dim, device=pages.device)
    at = to_device(rows, pages.device)
    _dequantize(part_views(pages, fmt)[0], at, keys, torch.arange(len(rows), device=pages.device), fmt.rotates)
    return keys


def _dequantize(views: PartViews, at: Tensor, x: Tensor, to: Tensor, rotates: bool) -> None:
    """Read K or V back, rotated back where the format rotates."""
    if x.is_cuda and not rotates:
        from . import triton_quant

        triton_quant.dequantize_part(views, x, at, to)
        return
    values = cpu_quant.dequantize_part(views, at, torch.empty(len(at), *x.shape[1:], device=x.device))
    x[to] = (values @ hadamard(x.shape[3], x.device) if rotates else values).to(x.dtype)


def check_pages(pages: Tensor, fmt: PageFormat) -> None:
    """Check that a tensor can be one layer of compressed pages of this format."""
    if pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != fmt.layer_bytes:
        raise ValueError(
            f"pages must be uint8 [n, {fmt.layer_bytes}] for {fmt.name}, got {pages.dtype} {tuple(pages.shape)}"
        )
    if pages.stride(1) != 1 or pages.stride(0) % PART_ALIGNMENT or pages.data_ptr() % PART_ALIGNMENT:
        raise ValueError(
            f"rows of pages must be dense and start at multiples of {PART_ALIGNMENT} bytes, strides are {pages.stride()}"
        )


def _check_conversion(
    k: Tensor, v: Tensor, block_ids: IntArray, pages: Tensor, page_ids: IntArray, fmt: PageFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Check blocks, pages and ids of a conversion; return both ids."""
    check_pages(pages, fmt)
    for x, part, name in ((k, fmt.keys, "k"), (v, fmt.values, "v")):
        if x.dim() != 4 or x.shape[1:] != (fmt.kv_heads, part.block, part.dim) or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be floating [n, {fmt.kv_heads}, {part.block}, {part.dim}], got {x.dtype} {tuple(x.shape)}"
            )
        if x.stride(3) != 1:
            raise ValueError(f"the last axis of {name} must be dense, strides are {x.stride()}")
    blocks, rows = to_host(block_ids), to_host(page_ids)
    if len(blocks) != len(rows):
        raise ValueError(f"{len(blocks)} blocks for {len(rows)} compressed pages")
    check_rows(k[:, 0, 0], blocks, "block ids")
    check_rows(pages, rows, "page ids")
    return blocks, rows
