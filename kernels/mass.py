"""How much of a row's attention falls on each page: what a policy weighs that keeps what is attended to (H2O).

A second look at the keys that attention has just read, so it is for a few rows now and then, not for every step. Plain torch
on any device. Guards: the shares of a row are those of its softmax over the tokens listed, and add up to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grad import without_grad
from .uploads import to_device

Integers = npt.NDArray[np.signedinteger[Any]]
_CHUNK_TOKENS = 8192  # of keys gathered at once, in float32


@without_grad
def page_mass(
    q: Tensor, k: Tensor, block_table: Integers, kv_lens: Integers, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Mean over heads of the attention weight that one row per sequence gives to each page that its table lists.

    Shapes: q [n, Hq, D]; k [pages, Hkv, block, D], a strided view; block_table [n, width], compact; kv_lens [n];
            out [n, width] float32, each row sums to 1 (0 for a sequence of length 0), 0 past its length.
    Cost:   the scores again, in float32: about half of what the attention itself took.
    """
    block, num_heads = k.shape[2], k.shape[1]
    out = q.new_zeros(block_table.shape, dtype=torch.float32)
    per_chunk = max(1, _CHUNK_TOKENS // block)
    for i, length in enumerate(kv_lens.tolist()):
        used = -(-length // block)
        if not used:
            continue
        pages = to_device(block_table[i, :used], k.device)
        rows = q[i].view(num_heads, -1, q.shape[2]).float() * scale  # [Hkv, G, D]
        scores = torch.cat(
            [torch.einsum("hgd,phbd->hgpb", rows, k[some].float()) for some in pages.split(per_chunk)], 2
        ).flatten(2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores[..., length:] = float("-inf")
        out[i, :used] = scores.softmax(-1).unflatten(2, (used, block)).sum(3).mean((0, 1))
    return out
