"""Scoring blocks against a query on a GPU, from the minima and maxima of their keys.

In float32 and not on tensor cores: 16-bit products would not be a bound, and the summaries are read at memory speed
anyway. Guards: summaries past a sequence's blocks are not read.
"""

# mypy: allow-untyped-defs
# (kernel arguments are values of the Triton compiler)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def score_blocks(
    q, summaries, table, counts, scores, q_row, q_head, s_page, s_head, s_side, table_row, out_row, out_head,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Score TILE blocks of one sequence for the GROUP query heads of one KV head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block, column = tl.program_id(2) * TILE + tl.arange(0, TILE), tl.arange(0, DP)
    count = tl.load(counts + row)
    ok = block < count
    page = tl.load(table + row * table_row + block, mask=ok, other=0).to(tl.int64)
    at = summaries + page[:, None] * s_page + head * s_head + column[None, :]
    mask = ok[:, None] & (column < D)[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + s_side, mask=mask, other=0.0).to(tl.float32)
    for g in range(GROUP):
        query = tl.load(q + row * q_row + (head * GROUP + g) * q_head + column, mask=column < D, other=0.0)
        query = query.to(tl.float32)[None, :]
        score = tl.sum(tl.maximum(query * low, query * high), 1)
        tl.store(scores + row * out_row + (head * GROUP + g) * out_head + block, score, mask=ok)


def score_shape(dim: int) -> dict[str, Any]:
    """Choose tile sizes; the same for the launcher and the ahead-of-time report."""
    padded = triton.next_power_of_2(dim)
    return dict(D=dim, DP=padded, TILE=max(1, min(32, 4096 // padded)), num_warps=4)


def score_pages(q: Tensor, summaries: Tensor, table: Tensor, counts: Tensor) -> Tensor:
    """Score blocks; table [n, max_blocks] and counts [n] are int32 on the device, arguments are checked by the caller."""
    heads, dim = summaries.shape[1], q.shape[2]
    scores = torch.full((*q.shape[:2], table.shape[1]), float("-inf"), device=q.device)
    if scores.numel() == 0:
        return scores
    shape = score_shape(dim)
    score_blocks[(q.shape[0], heads, triton.cdiv(table.shape[1], shape["TILE"]))](
        q, summaries, table, counts, scores, q.stride(0), q.stride(1), *summaries.stride()[:3], table.stride(0),
        *scores.stride()[:2], GROUP=q.shape[1] // heads, **shape,
    )  # fmt: skip
    return scores
