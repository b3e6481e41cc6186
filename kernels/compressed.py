"""Attention over compressed pages: the names, for whole compressed blocks and for those with a tail in full precision.

The same rule as in `dispatch`: arguments are checked here, a CUDA tensor goes to Triton, a CPU tensor to torch, and each
function has a float64 twin in `reference_compressed`. Formats whose integers are multiplied (HACK) and formats whose
scales are folded (KIVI, fp8) are behind one interface: PageFormat decides. Guards: compressed blocks are whole and lie
before every row that attends to them, and a table names pages that exist.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cpu_compressed, dispatch
from .checks import IntArray, check_window, to_host
from .conversion import check_pages
from .cpu_quant import hadamard
from .formats import PageFormat
from .plan import PagesPlan
from .rope import Turns, turn_back
from .uploads import to_device


@torch.no_grad()
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
    turns: Turns | None = None,
    out_dtype: torch.dtype | None = None,
    plan: PagesPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend packed rows to compressed blocks, all of which lie before them; decode and prefill alike.

    Row i of sequence s sits at position kv_len + ahead + i, where ahead counts the tokens between the compressed blocks
    and the sequence's first row (0 unless given); without a window it sees every key. Nothing is unpacked to memory but a
    few pages at a time on a CPU. A HACK format rounds q and the weights to 8 bits, the others keep them whole.

    Shapes: q [T, Hq, D]; pages uint8 [m, layer_bytes]; block_table [n, max_blocks]; kv_lens [n], whole blocks;
            cu_q [n + 1]; ahead [n]; out [T, Hq, Dv] in out_dtype (default: q's); lse [T, Hq], float32, nats.
    Raises: ValueError for shapes that do not fit, lengths that are not whole blocks, and block table entries outside
            the pool (on a GPU, for tables that lie there: only under KVTIER_DEBUG=1).
    """
    check_pages(pages, fmt)
    check_window(window, sinks)
    if q.dim() != 3 or q.shape[2] != fmt.head_dim or q.shape[1] % fmt.kv_heads:
        raise ValueError(
            f"q must be [tokens, a multiple of {fmt.kv_heads} heads, {fmt.head_dim}] for {fmt}, got {tuple(q.shape)}"
        )
    plan = plan or plan_pages(pages, fmt, block_table, kv_lens, cu_q, ahead, turns=turns)
    if plan.num_tokens != q.shape[0] or plan.block_size != fmt.block or plan.num_pages > len(pages):
        raise ValueError(
            f"cu_q (or the plan) covers {plan.num_tokens} rows on {plan.num_pages} pages of {plan.block_size} tokens, "
            f"got {q.shape[0]} rows on {len(pages)} pages of {fmt.block}"
        )
    if (plan.turn_ids is None) != (turns is None):
        raise ValueError("turns must be given both to the plan and to the attention, or to neither")
    rows = q.contiguous()[None] if turns is None else turn_back(q, turns).contiguous()
    if fmt.rotates:
        rows = (rows.float() @ hadamard(fmt.head_dim, q.device)).to(q.dtype)
    kind: dict[str, Any] = dict(
        scale=scale, window=window, sinks=sinks, softcap=softcap or None, out_dtype=out_dtype or q.dtype
    )
    if q.is_cuda:
        from . import triton_compressed

        return triton_compressed.compressed_attention(rows, pages, fmt, plan, **kind)
    return cpu_compressed.compressed_attention(rows, pages, fmt, plan, **kind)


def plan_pages(
    pages: Tensor,
    fmt: PageFormat,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    ahead: IntArray | None = None,
    *,
    turns: Turns | None = None,
) -> PagesPlan:
    """Check a step's compressed tables once, to be passed as `plan` to every layer of the same group."""
    ids, count = (None, 0) if turns is None else (turns.ids, len(turns.cos_sin))
    return PagesPlan(
        block_table, kv_lens, cu_q, ahead, turn_ids=ids, num_turns=count, block_size=fmt.block, num_pages=len(pages)
    )


@torch.no_grad()
def mixed_attention(
    q: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    pages_table: IntArray,
    pages_lens: IntArray,
    k: Tensor,
    v: Tensor,
    tail_table: IntArray,
    tail_lens: IntArray,
    cu_q: IntArray,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    turns: Turns | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to compressed blocks and, behind them, blocks in full precision: the newest tokens and the partial tail.

    The two partial results are merged by LSE, exactly. Row i of sequence s sits at pages_len + tail_len - q_len + i;
    the tail holds the new tokens. turns apply to the compressed blocks only.

    Shapes: q [T, Hq, D]; pages_table [n, ..], pages_lens [n] as in compressed_attention; k, v, tail_table [n, ..],
            tail_lens [n] (new tokens included) and cu_q [n + 1] as in paged_attention.
    Raises: ValueError as both of them do, and for sinks that end inside a compressed part shorter than they are.
    """
    before, tail, bounds = to_host(pages_lens), to_host(tail_lens), to_host(cu_q)
    if before.shape != tail.shape:
        raise ValueError(f"pages_lens {before.shape} and tail_lens {tail.shape} must be of the same sequences")
    rules: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap, out_dtype=torch.float32)
    result = _tail_attention(q, k, v, tail_table, tail, bounds, before, sinks, rules)
    if before.any():
        ahead = tail - np.diff(bounds)
        part = compressed_attention(
            q, pages, fmt, pages_table, before, bounds, np.maximum(ahead, 0), sinks=sinks, turns=turns, **rules
        )
        result = dispatch.merge_states(*result, *part)
    return result[0].to(out_dtype or q.dtype), result[1]


def _tail_attention(
    q: Tensor, k: Tensor, v: Tensor, table: IntArray, lens: np.ndarray, cu_q: np.ndarray, before: np.ndarray, sinks: int,
    rules: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the tails; sinks are in the tail only where nothing is compressed before it."""
    sinks = sinks if rules["window"] is not None else 0
    if (bad := (before > 0) & (before < sinks)).any():
        s = int(np.argmax(bad))
        raise ValueError(f"sinks={sinks}: sequence {s} has {before[s]} compressed tokens; sinks must end within them")
    has_sinks = (before == 0) if sinks else np.zeros(len(before), bool)
    if has_sinks.all() or not has_sinks.any():
        return dispatch.paged_attention(q, k, v, table, lens, cu_q, sinks=sinks if has_sinks.any() else 0, **rules)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[3], dtype=torch.float32)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    sequence_of = np.repeat(np.arange(len(before)), np.diff(cu_q))
    for mine, count in ((has_sinks, sinks), (~has_sinks, 0)):
        rows = to_device(np.flatnonzero(mine[sequence_of]), q.device)
        bounds = np.cumsum([0, *np.diff(cu_q)[mine]])
        out[rows], lse[rows] = dispatch.paged_attention(
            q[rows], k, v, to_host(table)[mine], lens[mine], bounds, sinks=count, **rules
        )
    return out, lse
