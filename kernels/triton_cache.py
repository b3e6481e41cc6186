"""Moving KV on a GPU: writing new tokens to their slots, copying rows of blocks.

Bytes only, no arithmetic, so these run at memory speed: rows are copied as the widest words that their width, strides
and address allow. Guards: slot -1 writes nothing, and no word past a row is touched.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import narrow, needs_rounding
from .uploads import to_device

COPY_WORDS = 1024  # words per program: 8 KiB


@triton.jit
def write_tokens(
    k_new, v_new, k, v, slots, kn_token, kn_head, vn_token, vn_head, k_page, k_head, k_slot, v_page, v_head, v_slot,
    heads, PAGE: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Write K and V of one token, HEADS heads of it, to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        page, offset = slot // PAGE, slot % PAGE
        head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        in_k, in_v = tl.arange(0, DKP)[None, :], tl.arange(0, DVP)[None, :]
        ok = head < heads
        key = tl.load(k_new + token * kn_token + head * kn_head + in_k, mask=ok & (in_k < DK), other=0.0)
        value = tl.load(v_new + token * vn_token + head * vn_head + in_v, mask=ok & (in_v < DV), other=0.0)
        if key.dtype != k.dtype.element_ty:
            key = narrow(key.to(tl.float32), k.dtype.element_ty, ROUND)
            value = narrow(value.to(tl.float32), v.dtype.element_ty, ROUND)
        tl.store(k + page * k_page + head * k_head + offset * k_slot + in_k, key, mask=ok & (in_k < DK))
        tl.store(v + page * v_page + head * v_head + offset * v_slot + in_v, value, mask=ok & (in_v < DV))


def write_kv(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write new tokens k_new [T, Hkv, D], v_new [T, Hkv, Dv] to slots int64 [T] of k, v."""
    tokens, heads, dim = k_new.shape
    if tokens == 0:
        return
    k_new, v_new = (x if x.stride(2) == 1 else x.contiguous() for x in (k_new, v_new))
    if k_new.dtype != v_new.dtype:
        v_new = v_new.to(k_new.dtype)
    per_program = min(8, triton.next_power_of_2(heads))
    write_tokens[(tokens, triton.cdiv(heads, per_program))](
        k_new, v_new, k, v, slots, *k_new.stride()[:2], *v_new.stride()[:2], *k.stride()[:3], *v.stride()[:3], heads,
        PAGE=k.shape[2], HEADS=per_program, DK=dim, DKP=triton.next_power_of_2(dim), DV=v.shape[3],
        DVP=triton.next_power_of_2(v.shape[3]), ROUND=needs_rounding(k.dtype), num_warps=4,
    )  # fmt: skip


@triton.jit
def copy_words(
    source, target, source_ids, target_ids, words, source_row, target_row,
    HAS_SOURCE: tl.constexpr, HAS_TARGET: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Copy one stretch of one row; without ids, rows stand in order."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    row_s = i
    row_t = i
    if HAS_SOURCE:
        row_s = tl.load(source_ids + i)
    if HAS_TARGET:
        row_t = tl.load(target_ids + i)
    ok = at < words
    tl.store(target + row_t * target_row + at, tl.load(source + row_s * source_row + at, mask=ok), mask=ok)


def as_words(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """View two 2-D tensors of rows as the widest integers that fit both."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(_fits(rows, dtype.itemsize) for rows in (source, target)):
            return source.view(dtype), target.view(dtype)
    return source.view(torch.uint8), target.view(torch.uint8)


def _fits(rows: Tensor, word_bytes: int) -> bool:
    """Say whether rows can be seen as words of so many bytes."""
    size = rows.element_size()
    numbers = (rows.shape[1] * size, rows.stride(0) * size, rows.storage_offset() * size, rows.data_ptr())
    return rows.stride(1) == 1 and size <= word_bytes and all(n % word_bytes == 0 for n in numbers)


def copy_rows(
    source: Tensor, target: Tensor, source_ids: np.ndarray | None, target_ids: np.ndarray | None, count: int
) -> None:
    """Copy `count` rows; ids None means rows 0, 1, 2, ... A row that is written must not be read by the same call."""
    source, target = as_words(source, target)
    words = source.shape[1]

    def ids(values: np.ndarray | None) -> Tensor:
        return target if values is None else to_device(values, target.device)

    copy_words[(count, triton.cdiv(words, COPY_WORDS))](
        source, target, ids(source_ids), ids(target_ids), words, source.stride(0), target.stride(0),
        HAS_SOURCE=source_ids is not None, HAS_TARGET=target_ids is not None, WORDS=COPY_WORDS, num_warps=4,
    )  # fmt: skip
