"""Page selection: which blocks a decode step must read, from a summary of each block's keys, and what the rest could weigh.

A summary is the minimum and the maximum of every key channel, per block and KV head, kept for a block wherever it lives.
sum_d max(q_d min_d, q_d max_d) is then no less than q.k for any key of the block, so blocks with small bounds can be left
where they are. Guards: sinks and newest blocks are always chosen, and the share of weight left out has a bound that is
told, never assumed (up to float32 rounding of the scores).

Source: Quest (arXiv 2406.10774), sections 3.2 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checks import IntArray, check_rows, check_table, is_debug, to_host
from .uploads import to_device


@dataclass(frozen=True)
class Selection:
    """The blocks chosen for each sequence, for all heads of a layer together.

    Shapes: indices [n, most], int64, ascending logical block numbers, -1 past counts; counts [n]; chosen [n, max_blocks].
    """

    indices: Tensor
    counts: Tensor
    chosen: Tensor

    def table(self, block_table: IntArray) -> np.ndarray:
        """Return the compact block table of what was chosen, to be handed to attention; -1 past the counts."""
        indices = to_host(self.indices)
        return np.where(indices >= 0, np.take_along_axis(to_host(block_table), np.maximum(indices, 0), 1), -1)

    def lengths(self, kv_lens: IntArray, block: int) -> np.ndarray:
        """Return the tokens in the chosen blocks, the newest of which may be partial."""
        lens = to_host(kv_lens)
        last = -(-lens // block) - 1
        has_last = (to_host(self.indices) == last[:, None]).any(1)
        return to_host(self.counts) * block - np.where(has_last, (last + 1) * block - lens, 0)


@torch.no_grad()
def summarize_blocks(
    k: Tensor, source_ids: IntArray, summaries: Tensor, target_ids: IntArray, valid_lengths: IntArray | None = None
) -> None:
    """Write the minimum and maximum of each key channel of blocks of k to their summaries.

    Shapes: k [m, Hkv, block, D], a strided view; summaries [p, Hkv, 2, D] in k's dtype or float32, so that nothing is
            rounded; valid_lengths: tokens of each block that count (all unless given), at least 1.
    Raises: ValueError for shapes, dtypes and ids that do not fit.
    """
    source, target = to_host(source_ids), to_host(target_ids)
    if summaries.dim() != 4 or summaries.shape[1:] != (k.shape[1], 2, k.shape[3]):
        raise ValueError(f"summaries must be [n, {k.shape[1]}, 2, {k.shape[3]}], got {tuple(summaries.shape)}")
    if summaries.dtype not in (k.dtype, torch.float32):
        raise ValueError(f"summaries in {summaries.dtype} would round keys in {k.dtype}; use that dtype or float32")
    if len(source) != len(target):
        raise ValueError(f"{len(source)} blocks for {len(target)} summaries")
    check_rows(k[:, 0, 0], source, "block ids")
    check_rows(summaries[:, 0, 0], target, "summary ids")
    keys = k.index_select(0, to_device(source, k.device))
    low, high = keys, keys
    if valid_lengths is not None:
        lengths = to_host(valid_lengths)
        if lengths.shape != source.shape or (lengths < 1).any() or (lengths > k.shape[2]).any():
            raise ValueError(f"valid_lengths must be [{len(source)}] numbers from 1 to {k.shape[2]}")
        unused = torch.arange(k.shape[2], device=k.device) >= to_device(lengths, k.device)[:, None]
        low = keys.masked_fill(unused[:, None, :, None], float("inf"))
        high = keys.masked_fill(unused[:, None, :, None], float("-inf"))
    at = to_device(target, summaries.device)
    summaries[at] = torch.stack([low.amin(2), high.amax(2)], 2).to(summaries.dtype)


@torch.no_grad()
def score_pages(q: Tensor, summaries: Tensor, block_table: IntArray, num_blocks: IntArray) -> Tensor:
    """Return for every query head a bound on q.k over the keys of each block; -inf past a sequence's blocks.

    Shapes: q [n, Hq, D], one row per sequence; summaries [p, Hkv, 2, D]; block_table [n, max_blocks], which names
            summaries; num_blocks [n]; scores [n, Hq, max_blocks], float32, without the attention's scale.
    Raises: ValueError for shapes that do not fit and block table entries outside the summaries (on a GPU, for tables
            that lie there: only under KVTIER_DEBUG=1).
    """
    if (
        q.dim() != 3
        or summaries.dim() != 4
        or summaries.shape[2:] != (2, q.shape[2])
        or q.shape[1] % summaries.shape[1]
    ):
        raise ValueError(f"q {tuple(q.shape)} and summaries {tuple(summaries.shape)} do not belong together")
    if len(num_blocks) != q.shape[0]:
        raise ValueError(f"num_blocks must be [{q.shape[0]}], one per row of q, got {len(num_blocks)}")
    is_remote = isinstance(block_table, Tensor) and block_table.is_cuda
    if not is_remote or is_debug():
        check_table(to_host(block_table), to_host(num_blocks), 1, summaries.shape[0])
    table = to_device(block_table, q.device, torch.int32).contiguous()
    counts = to_device(num_blocks, q.device, torch.int32)
    if q.is_cuda:
        from . import triton_select

        return triton_select.score_pages(q, summaries, table, counts)
    return _score_on_cpu(q, summaries, table, counts)


def _score_on_cpu(q: Tensor, summaries: Tensor, table: Tensor, counts: Tensor) -> Tensor:
    """Score as two matrix products: the positive part of q with the maxima, the negative part with the minima."""
    heads, group = summaries.shape[1], q.shape[1] // summaries.shape[1]
    scores = torch.full((*q.shape[:2], table.shape[1]), float("-inf"))
    for s, count in enumerate(counts.tolist()):
        if count:
            kept = summaries.index_select(0, table[s, :count]).float().permute(1, 2, 3, 0)  # [H, 2, D, blocks]
            rows = q[s].float().view(heads, group, -1)
            found = torch.bmm(rows.clamp(min=0), kept[:, 1]) + torch.bmm(rows.clamp(max=0), kept[:, 0])
            scores[s, :, :count] = found.flatten(0, 1)
    return scores


@torch.no_grad()
def select_pages(
    scores: Tensor, num_blocks: IntArray, k: int, *, scale: float, keep_first: int = 1, keep_last: int = 1
) -> Selection:
    """Choose k blocks of each sequence for all heads of a layer: sinks, newest, and the best of the rest.

    Heads are compared by how far a block's bound lies below the head's best: what counts is its share of that head's
    weight. k counts the kept blocks; a sequence with fewer blocks is chosen whole.

    Raises: ValueError when k leaves no room for what is always kept.
    """
    if k < keep_first + keep_last or min(keep_first, keep_last) < 0 or k < 1:
        raise ValueError(f"k={k} must be at least keep_first={keep_first} + keep_last={keep_last}, and 1")
    counts = to_device(num_blocks, scores.device)
    best = scores.amax(2, keepdim=True)
    rank = ((scores - torch.where(torch.isneginf(best), 0.0, best)) * scale).amax(1)  # [n, max_blocks]
    block = torch.arange(scores.shape[2], device=scores.device)[None, :]
    exists = block < counts[:, None]
    is_kept = exists & ((block < keep_first) | (block >= counts[:, None] - keep_last))
    rank = rank.masked_fill(is_kept, float("inf")).masked_fill(~exists, float("-inf"))
    taken = min(k, scores.shape[2])
    picks = rank.topk(taken, 1).indices
    chosen = torch.zeros_like(exists).scatter_(1, picks, True) & exists
    found = chosen.sum(1)
    indices = torch.where(chosen, block, scores.shape[2]).sort(1).values[:, :taken]
    return Selection(torch.where(indices == scores.shape[2], -1, indices), found, chosen)


@torch.no_grad()
def omitted_share(scores: Tensor, selection: Selection, lse: Tensor, *, scale: float, block: int) -> Tensor:
    """Return a bound on the share of attention weight that was left out, per query head, [n, Hq].

    lse [n, Hq] is that of attention over what was chosen. A block left out weighs block * exp(scale * score) at most, so
    the answer differs from full attention's by this share times the spread of the values at most.
    """
    left_out = scores.masked_fill(selection.chosen[:, None], float("-inf")) * scale
    weight = torch.logsumexp(left_out.double(), 2) + np.log(block)
    share = torch.sigmoid(weight - lse.double())
    return torch.where(torch.isneginf(weight), 0.0, share).float()
