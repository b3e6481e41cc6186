"""One tile of attention on a CPU: dense queries against dense keys, with the LSE that lets tiles be merged.

Two ways to the same numbers. Torch's CPU flash kernel is several times faster and is taken wherever it fits; it is a
private operator, so it is tried once on a small example before it is trusted. The plain way in float32 covers softcap,
unequal widths, other dtypes and a torch without the operator. Guards: no tile is empty (the flash kernel divides by
zero on one, which ends the process), and no row of a tile is without a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Visible = Tensor | Literal["causal"] | None  # booleans [T, C] | row i sees keys 0..i | every row sees every key
FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_EXPONENT = -64.0
LOG2_E = math.log2(math.e)
SCORE_ELEMENTS = 256 << 10  # a 1 MiB tile of float32 scores stays in a core's cache


@cache
def flash_kernel() -> Callable[..., Any] | None:
    """Return torch's CPU flash operator, or None when it is missing or gives other numbers than the plain way."""
    try:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        with torch.inference_mode(False), torch.no_grad():
            q = torch.linspace(-1.0, 1.0, 2 * 3 * 5 * 8).sin().view(2, 3, 5, 8)
            k = torch.linspace(0.0, 9.0, 2 * 7 * 8).cos().view(2, 7, 8)
            mask = torch.zeros(1, 1, 5, 7)
            mask[..., 4:] = float("-inf")
            shared = k[:, None].expand(-1, 3, -1, -1)
            out, lse = flash(q, shared, shared, 0.0, False, attn_mask=mask, scale=0.5)
            expected = plain_tile(q, k, k, scale=0.5, softcap=None, visible=mask[0, 0] == 0)
            good = torch.allclose(out, expected[0], atol=1e-5) and torch.allclose(lse, expected[1], atol=1e-5)
            out, lse = flash(q, shared[:, :, :5], shared[:, :, :5], 0.0, True, scale=0.5)
            expected = plain_tile(q, k[:, :5], k[:, :5], scale=0.5, softcap=None, visible="causal")
            good &= torch.allclose(out, expected[0], atol=1e-5) and torch.allclose(lse, expected[1], atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return flash if good else None


@cache
def is_slow_with_one_row(dtype: torch.dtype) -> bool:
    """Whether the flash kernel is better given a single query row twice.

    On an x86 processor without instructions for bfloat16 one row takes five times as long as two (Cascade Lake, 32 pages of
    256 tokens and 8 heads: 22.5 ms and 4.7). Known from the processor and not timed, so that a result does not hang on load.
    """
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return dtype == torch.bfloat16 and known.get("architecture") == "x86_64" and not known.get("avx512_bf16")


def can_flash(dtype: torch.dtype, softcap: float | None) -> bool:
    """Say whether the flash kernel fits this dtype and score function."""
    return softcap is None and dtype in FLASH_DTYPES and flash_kernel() is not None


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, visible: Visible
) -> tuple[Tensor, Tensor]:
    """Attend G query heads per KV head to one dense stretch of keys; every row must see a key.

    Shapes: q [N, G, T, D]; k [N, C, D]; v [N, C, Dv]; out [N, G, T, Dv], float32 or q's dtype; lse [N, G, T], float32.
    """
    flash = flash_kernel() if can_flash(q.dtype, softcap) and k.shape[2] == v.shape[2] else None
    if flash is None:
        return plain_tile(q, k, v, scale=scale, softcap=softcap, visible=visible)
    heads, group, rows, _ = q.shape
    if visible is None:
        # The G heads of a group as further rows: one matrix product of G * T rows instead of G of T.
        out, lse = flash(q.reshape(heads, 1, group * rows, -1), k[:, None], v[:, None], 0.0, False, scale=scale)
        return out.view(heads, group, rows, -1), lse.view(heads, group, rows)
    k, v = k[:, None].expand(-1, group, -1, -1), v[:, None].expand(-1, group, -1, -1)
    if isinstance(visible, str):
        return flash(q, k, v, 0.0, True, scale=scale)
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
    return flash(q, k, v, 0.0, False, attn_mask=mask[None, None], scale=scale)


def attend_pages(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend a few rows to each of several pages in place, one partial result per page.

    Shapes: q [P, H, R, D], a row of rows per page; k, v views [P, H, tokens, D] of neighbouring pages;
            out [P, H, R, D] in q's dtype; lse [P, H, R], float32.
    """
    flash = flash_kernel()
    if flash is None:
        raise RuntimeError("attend_pages needs torch's CPU flash kernel; ask can_flash first")
    if q.shape[2] == 1 and is_slow_with_one_row(q.dtype):
        out, lse = flash(q.expand(-1, -1, 2, -1), k, v, 0.0, False, scale=scale)
        return out.narrow(2, 0, 1), lse.narrow(2, 0, 1)
    return flash(q, k, v, 0.0, False, scale=scale)


def plain_tile(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, visible: Visible
) -> tuple[Tensor, Tensor]:
    """Do what attend_tile does with float32 matrix products, a cache-sized tile of scores at a time."""
    heads, group, rows, _ = q.shape
    keys, values = k.float(), v.float()
    keys_t = keys.transpose(1, 2)
    out = torch.empty(heads, group, rows, v.shape[2])
    lse = torch.empty(heads, group, rows)
    step = max(1, SCORE_ELEMENTS // (group * k.shape[1]))
    for n in range(heads):
        for a in range(0, rows, step):
            b = min(a + step, rows)
            tile = q[n, :, a:b].float().reshape(group * (b - a), -1)
            scores = torch.mm(tile, keys_t[n]).mul_(scale)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            if visible is not None:
                seen = _seen(visible, a, b, k.shape[1])
                scores.view(group, b - a, -1).masked_fill_(~seen, float("-inf"))
            top = scores.amax(-1, keepdim=True)
            total = exp_(scores.sub_(top)).sum(-1, keepdim=True)
            out[n, :, a:b] = torch.mm(scores, values[n]).div_(total).view(group, b - a, -1)
            lse[n, :, a:b] = total.log_().add_(top).view(group, b - a)
    return out, lse


def exp_(x: Tensor) -> Tensor:
    """Take exp of float32 numbers up to 0, in place; 0 for what is less than 1e-27 of the largest.

    Next to a key that fits, others mostly underflow, and that is slow twice: torch's exp is MKL's, which takes 60 times as
    long for it (32,768 numbers: 13 us, 790 at -300), and so do products with what is denormal.
    """
    return torch.threshold_(x, LEAST_EXPONENT, float("-inf")).mul_(LOG2_E).exp2_()


def _seen(visible: Tensor | str, start: int, end: int, num_keys: int) -> Tensor:
    """Return the visibility of rows [start, end) as booleans."""
    if isinstance(visible, Tensor):
        return visible[start:end]
    return torch.arange(num_keys)[None, :] <= torch.arange(start, end)[:, None]
