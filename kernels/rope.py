"""RoPE re-positioning: a cached chunk used at another position than the one it was computed at, without touching it.

A key k at position p is R(p) k. To use it as if it were at p + d, one would rotate it by R(d); but q.(R(d) k) =
(R(-d) q).k, so q is rotated back instead, once per distinct offset. Pages stay as they are: shared, immutable and
compressed. The angles are made in float64, because an offset of 131,072 leaves float32 no digits for the fast planes.

What YaRN and its relatives do to frequencies is in `inv_freq`, which is the model's own; their factor on the score is in
q and k already and a rotation keeps it. Not for frequencies that change with the length (dynamic NTK, LongRoPE's switch).
Guards: the rotation pairs channel i with i + D/2, as Llama-style models do; rotary_dim bounds it for partial rotary models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import IntArray, to_host


@dataclass(frozen=True)
class Turns:
    """The rotations of a step: a table of distinct offsets, and for each block of the table which of them it needs.

    Shapes: cos_sin [turns, 2, rotary_dim / 2], float32; ids [n, max_blocks], shaped as the block table.
    """

    cos_sin: Tensor
    ids: IntArray


def turn_table(offsets: IntArray, inv_freq: Tensor) -> Tensor:
    """Return cosines and sines [offsets, 2, rotary_dim / 2] of so many positions; inv_freq is the model's, YaRN included.

    offsets: tokens by which cached keys move: wanted position minus the one at which they were computed.
    """
    angles = torch.from_numpy(to_host(offsets)).double()[:, None] * inv_freq.detach().cpu().double()[None, :]
    return torch.stack([angles.cos(), angles.sin()], 1).float().to(inv_freq.device)


def plan_turns(offsets: IntArray, inv_freq: Tensor) -> Turns:
    """Find the distinct offsets among those of a block table [n, max_blocks] and make their table."""
    distinct, ids = torch.from_numpy(to_host(offsets)).unique(return_inverse=True)
    return Turns(turn_table(distinct.numpy(), inv_freq), ids.numpy())


def turn_back(q: Tensor, turns: Turns) -> Tensor:
    """Rotate q [T, Hq, D] back by every offset: [turns, T, Hq, D] in q's dtype."""
    return rotate(q[None], turns.cos_sin.to(q.device)[:, None, None], -1.0)


def turn_keys(k: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate keys [n, ..., D] forward by one offset each: for export, where positions must be true."""
    shape = (len(cos_sin), *[1] * (k.dim() - 2), 2, cos_sin.shape[2])
    return rotate(k, cos_sin.to(k.device).view(shape), 1.0)


def rotate(x: Tensor, cos_sin: Tensor, sign: float) -> Tensor:
    """Rotate channel pairs (i, i + half) by angles whose cosines and sines [..., 2, half] broadcast against x."""
    half = cos_sin.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"cos_sin is for {2 * half} rotary channels, the head has {x.shape[-1]}")
    cos, sin = cos_sin[..., 0, :], cos_sin[..., 1, :] * sign
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = [low * cos - high * sin, high * cos + low * sin]
    rest = x[..., 2 * half :].float()
    if rest.shape[-1]:
        turned.append(rest.expand(*turned[0].shape[:-1], rest.shape[-1]))
    return torch.cat(turned, -1).to(x.dtype)
