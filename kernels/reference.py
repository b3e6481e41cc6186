"""References: every kernel once more in float64, dense and slow, written to be read.

These are the meaning of the kernels; the CPU path and the Triton kernels are compared with them and with nothing else.
They select valid token slots before any arithmetic, so whatever lies in unused slots (NaN in the tests) cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IntArray = Tensor | np.ndarray | Sequence[int]


def visible_keys(
    q_len: int, kv_len: int, window: int | None = None, sinks: int = 0, device: torch.device | None = None
) -> Tensor:
    """Say which keys each query row sees, as booleans [q_len, kv_len]; row i sits at position kv_len - q_len + i."""
    pos_q = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    pos_k = torch.arange(kv_len, device=device)[None, :]
    visible = pos_k <= pos_q
    if window is not None:
        visible &= (pos_q - pos_k < window) | (pos_k < sinks)
    return visible


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend q [T, Hq, D] to k [n, Hkv, D], v [n, Hkv, Dv] where visible [T, n]; a row without keys gives 0, -inf."""
    group = q.shape[1] // k.shape[1]
    q64, k64, v64 = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = torch.einsum("thd,nhd->htn", q64, k64) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    return torch.einsum("htn,nhd->thd", weights, v64), lse.transpose(0, 1)


def gather_tokens(cache: Tensor, pages: Tensor, num_tokens: int) -> Tensor:
    """Lay the first tokens of a sequence out in order: cache [pages, Hkv, block, D] -> [num_tokens, Hkv, D]."""
    block = cache.shape[2]
    pages = pages[: -(-num_tokens // block)].to(cache.device, torch.int64)
    return cache[pages].transpose(1, 2).flatten(0, 1)[:num_tokens]


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each sequence's packed rows to its pages, one dense float64 attention per sequence."""
    table, bounds = torch.as_tensor(block_table), [int(x) for x in cu_q]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[3], dtype=torch.float64)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float64)
    for s, kv_len in enumerate(int(x) for x in kv_lens):
        rows = slice(bounds[s], bounds[s + 1])
        visible = visible_keys(rows.stop - rows.start, kv_len, window, sinks, q.device)
        keys, values = gather_tokens(k, table[s], kv_len), gather_tokens(v, table[s], kv_len)
        out[rows], lse[rows] = dense_attention(q[rows], keys, values, visible, scale=scale, softcap=softcap)
    return out, lse


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend every row to every token of whole blocks k [m, Hkv, block, D], v [m, Hkv, block, Dv]."""
    keys, values = k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1)
    visible = torch.ones(q.shape[0], keys.shape[0], dtype=torch.bool, device=q.device)
    return dense_attention(q, keys, values, visible, scale=scale, softcap=softcap)


def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partial results outs [P, T, H, D], lses [P, T, H] over disjoint key sets."""
    if outs.shape[0] == 0:
        return outs.new_zeros(outs.shape[1:], dtype=torch.float64), lses.new_full(
            lses.shape[1:], float("-inf"), dtype=torch.float64
        )
    parts = torch.where(torch.isneginf(lses)[..., None], 0.0, outs.double())
    lse = torch.logsumexp(lses.double(), 0)
    weights = torch.exp(lses.double() - torch.where(torch.isneginf(lse), 0.0, lse))
    return (parts * weights[..., None]).sum(0), lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial results over disjoint key sets."""
    return merge_many(torch.stack([out_a.double(), out_b.double()]), torch.stack([lse_a.double(), lse_b.double()]))


def apply_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Add one key per head with the given score and a zero value: only the denominator grows."""
    total = torch.logaddexp(lse.double(), sink_logits.double().expand(lse.shape))
    return out.double() * torch.exp(lse.double() - total)[..., None]


def write_kv(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, slots: IntArray) -> None:
    """Write each token's K and V to its slot (page * block + offset); -1 writes nothing."""
    block = k.shape[2]
    for token, slot in enumerate(int(x) for x in slots):
        if slot >= 0:
            k[slot // block, :, slot % block] = k_new[token]
            v[slot // block, :, slot % block] = v_new[token]


def copy_blocks(source_rows: Tensor, target_rows: Tensor, source_ids: IntArray, target_ids: IntArray) -> None:
    """Copy rows one by one: target[target_ids[i]] = source[source_ids[i]], all sources read before any is written."""
    picked = [source_rows[int(i)].clone() for i in source_ids]
    for row, target in zip(picked, target_ids, strict=True):
        target_rows[int(target)] = row
