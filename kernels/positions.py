"""Attention over blocks that were computed at other positions than those at which they are used.

Full-precision blocks: those that move by one offset meet one rotated copy of q, and the partial results merge by LSE,
exactly. Compressed blocks take `turns` in `compressed_attention`, where the kernel picks the copy of q block by block.
Either way pages stay as they are. Guards: every listed block is whole and lies before the rows that attend to it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import dispatch
from .checks import IntArray, check_cache
from .plan import PagesPlan
from .rope import Turns, turn_back


@torch.no_grad()
def turned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    turns: Turns,
    *,
    scale: float,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend packed rows to whole blocks before them, each as if its keys had been rotated by its turn.

    Shapes: q [T, Hq, D]; k, v [pages, Hkv, block, D], strided views; block_table [n, max_blocks]; kv_lens [n], whole
            blocks; cu_q [n + 1]; out [T, Hq, Dv] in out_dtype (default: q's); lse [T, Hq], float32, nats. Merge with
            attention over the other blocks by merge_states.
    Raises: ValueError for shapes that do not fit, lengths that are not whole blocks, and ids outside pool or turns.
    Cost:   one call per sequence and distinct offset.
    """
    check_cache(q, k, v)
    plan = PagesPlan(
        block_table, kv_lens, cu_q, turn_ids=turns.ids, num_turns=len(turns.cos_sin), block_size=k.shape[2],
        num_pages=k.shape[0],
    )  # fmt: skip
    if plan.num_tokens != q.shape[0] or plan.turn_ids is None:
        raise ValueError(f"cu_q covers {plan.num_tokens} rows, q has {q.shape[0]}")
    turned = turn_back(q, turns)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[3], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    for s, blocks in enumerate((plan.kv_lens // plan.block_size).tolist()):
        rows, ids = slice(int(plan.cu_q[s]), int(plan.cu_q[s + 1])), plan.turn_ids[s, :blocks]
        for turn in np.unique(ids).tolist():
            part = dispatch.block_attention(
                turned[turn, rows], k, v, scale=scale, softcap=softcap, out_dtype=torch.float32,
                pages=plan.table[s, :blocks][ids == turn],
            )  # fmt: skip
            out[rows], lse[rows] = dispatch.merge_states(out[rows], lse[rows], *part)
    return out.to(out_dtype or q.dtype), lse
