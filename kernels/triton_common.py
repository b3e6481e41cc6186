"""What the Triton kernels share: one online-softmax step over a tile of keys, exact rounding, and how widths are cut.

Scores are kept in base 2 inside a kernel; LSE leaves it in nats. Matrix operands have the dtype COMPUTE: the cache's on
a GPU, float32 in the interpreter, whose 16-bit matrix products are wrong. Guards: loads that may leave a sequence are
masked, page numbers are 64-bit before they meet a stride, and keys that no row may see are never loaded (0 * NaN would
reach the output).
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
MIN_DOT = 16  # the narrowest matrix product of 16-bit operands


@triton.jit
def round_bf16(x):
    """Round float32 to the nearest bfloat16 value, ties to even, still float32; the cast after it is exact."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Cast float32 to DTYPE; ROUND says that the cast itself would truncate (bfloat16 in the interpreter)."""
    if ROUND:
        x = round_bf16(x)
    return x.to(DTYPE)


@triton.jit
def load_rows(
    base, offsets, ok, DIM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Load query rows [M, DIM] as columns [0, A) and [A, A + B); the second part is the first again when B is 0."""
    at_a = tl.arange(0, A)
    if A > DIM:
        first = tl.load(base + offsets[:, None] + at_a[None, :], mask=ok[:, None] & (at_a[None, :] < DIM), other=0.0)
    else:
        first = tl.load(base + offsets[:, None] + at_a[None, :], mask=ok[:, None], other=0.0)
    first = first.to(COMPUTE)
    if B > 0:
        at_b = A + tl.arange(0, B)
        second = tl.load(base + offsets[:, None] + at_b[None, :], mask=ok[:, None] & (at_b[None, :] < DIM), other=0.0)
        return first, second.to(COMPUTE)
    else:
        return first, first


@triton.jit
def soften(scores, live, softcap, top, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """Turn a tile of scores in base 2 into weights against the new maximum; return them, the old sums' decay, the maximum.

    With SOFTCAP the scores hold 2 * log2(e) * scale / softcap * q.k, so that what follows is softcap * tanh(x / softcap).
    """
    if SOFTCAP:
        scores = (1.0 - 2.0 / (tl.exp2(scores) + 1.0)) * softcap
    if MASKED:
        scores = tl.where(live, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without a key yet: no inf - inf
    return tl.exp2(scores - base[:, None]), tl.exp2(top - base), new_top


@triton.jit
def attend_tile(
    q_a, q_b, k, v, at_k, at_v, ok, live, scale_log2, softcap, top, total, acc,
    DK: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running max, sum and accumulator.

    at_k, at_v [N] point at token slots; ok [N] may be loaded, live [M, N] may be seen, both used only if MASKED.
    """
    in_a, in_v = tl.arange(0, A), tl.arange(0, DVP)
    if MASKED:
        mask_a = ok[None, :]
        mask_v = ok[:, None]
        if A > DK:
            mask_a = mask_a & (in_a[:, None] < DK)
        if DVP > DV:
            mask_v = mask_v & (in_v[None, :] < DV)
        keys = tl.load(k + at_k[None, :] + in_a[:, None], mask=mask_a, other=0.0)
        values = tl.load(v + at_v[:, None] + in_v[None, :], mask=mask_v, other=0.0)
    else:
        if A > DK:
            keys = tl.load(k + at_k[None, :] + in_a[:, None], mask=in_a[:, None] < DK, other=0.0)
        else:
            keys = tl.load(k + at_k[None, :] + in_a[:, None])
        if DVP > DV:
            values = tl.load(v + at_v[:, None] + in_v[None, :], mask=in_v[None, :] < DV, other=0.0)
        else:
            values = tl.load(v + at_v[:, None] + in_v[None, :])
    scores = tl.dot(q_a, keys.to(COMPUTE), input_precision="ieee")
    if B > 0:
        in_b = A + tl.arange(0, B)
        mask_b = in_b[:, None] < DK
        if MASKED:
            mask_b = mask_b & ok[None, :]
        keys_b = tl.load(k + at_k[None, :] + in_b[:, None], mask=mask_b, other=0.0)
        scores = tl.dot(q_b, keys_b.to(COMPUTE), scores, input_precision="ieee")
    scores *= scale_log2
    weights, decay, new_top = soften(scores, live, softcap, top, MASKED, SOFTCAP)
    acc = tl.dot(weights.to(COMPUTE), values.to(COMPUTE), acc * decay[:, None], input_precision="ieee")
    return new_top, total * decay + tl.sum(weights, 1), acc


@triton.jit
def finish_lse(top, total):
    """Return the LSE in nats of a running maximum and sum; a row without keys gives -inf, one that met NaN gives NaN."""
    return tl.where(total == 0, float("-inf"), (top + tl.log2(tl.where(total == 0, 1.0, total))) * LN2)


@triton.jit
def finish(top, total, acc):
    """Return the normalised accumulator and the LSE in nats; a row without keys gives 0 and -inf."""
    is_empty = total == 0
    result = tl.where(is_empty[:, None], 0.0, acc / tl.where(is_empty, 1.0, total)[:, None])
    return result, finish_lse(top, total)


IS_INTERPRETED = not isinstance(round_bf16, triton.JITFunction)  # decided once, when triton.jit ran
_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Widths:
    """How a kernel cuts head dims that are not powers of two: keys [0, A) and [A, A + B), values padded to DVP."""

    DK: int
    A: int
    B: int
    DV: int
    DVP: int


def cut_widths(key_dim: int, value_dim: int) -> Widths:
    """Cut 96 into 64 + 32 and 576 into 512 + 64; pad where that is not longer than the pieces."""
    padded = max(MIN_DOT, triton.next_power_of_2(key_dim))
    first, rest = padded // 2, key_dim - padded // 2
    second = max(MIN_DOT, triton.next_power_of_2(rest)) if rest > 0 else 0
    if key_dim == padded or first < MIN_DOT or first + second >= padded:
        first, second = padded, 0
    return Widths(key_dim, first, second, value_dim, max(MIN_DOT, triton.next_power_of_2(value_dim)))


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of matrix operands for a cache of this dtype."""
    if dtype not in _TRITON_DTYPE:
        raise ValueError(f"kernels take float32, bfloat16 and float16 caches, got {dtype}")
    return tl.float32 if IS_INTERPRETED else _TRITON_DTYPE[dtype]


def needs_rounding(dtype: torch.dtype) -> bool:
    """Say whether a cast to this dtype must be rounded by hand."""
    return IS_INTERPRETED and dtype == torch.bfloat16


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return the factor on q.k and the cap, both so that scores come out in base 2."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2.0 * LOG2E * scale / softcap, softcap * LOG2E
