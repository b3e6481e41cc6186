"""HACK's attention with torch: products of integer codes, and the correction terms that make them sums of numbers.

With a = m + s a' in partitions of the contraction, sum a b = s_a s_b sum a'b' + m_a s_b sum b' + m_b s_a sum a' + n m_a m_b.
Q is rounded to int8 around 0 and P from 0 up, so their m is 0 and of the terms only m_b s_a sum a' is left: the sums of
the page's own codes, which HACK stores or recomputes, are never needed. Integers are multiplied as float32: all sums
stay below 2**24, so every product is exact. Guards: a partition's sum fits that bound by construction of PageFormat.

Source: HACK (arXiv 2502.03589), section 4; here P is rounded page by page, since one scale for all rows errs ten times more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_quant import PartViews

Q_MAX = P_MAX = 127.0


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last axis to integers up to 127 in size around 0; return them and the scale, both float32."""
    scale = x.abs().amax(-1, keepdim=True) / Q_MAX
    return torch.floor(x / torch.where(scale > 0, scale, 1.0) + 0.5), scale


def hack_scores(q: Tensor, codes: Tensor, views: PartViews, ids: Tensor) -> Tensor:
    """Return q.k [n, H, R, block] for rows q [H, R, D], rounded here, and integer codes [n, H, block, D]."""
    n, heads, block, _ = codes.shape
    scales, zeros = _tables(views, ids)
    scores = codes.new_zeros(n, heads, q.shape[1], block)
    keys = codes.flatten(0, 1).split(views.part.group, 2)
    for p, (rows, channels) in enumerate(zip(q.split(views.part.group, 2), keys)):
        rounded, step = round_rows(rows)
        each = rounded[None].expand(n, *rounded.shape).reshape(-1, *rounded.shape[1:])
        products = torch.bmm(each, channels.transpose(1, 2)).view(scores.shape)
        products.mul_(scales[:, :, p, None]).add_(rounded.sum(-1)[None, :, :, None] * zeros[:, :, p, None])
        scores.add_(products.mul_(step[None]))
    return scores


def hack_values(weights: Tensor, codes: Tensor, views: PartViews, ids: Tensor, acc: Tensor) -> None:
    """Add sum p v to acc [H, R, Dv] for weights [n, H, R, block], rounded here, and integer codes [n, H, block, Dv]."""
    n, heads, rows, _ = weights.shape
    scales, zeros = _tables(views, ids)
    parts = weights.view(n, heads, rows, -1, views.part.group).transpose(2, 3)  # [n, H, partitions, R, group]
    rounded, step = round_rows(parts)
    values = codes.view(-1, views.part.group, codes.shape[3])
    products = torch.bmm(rounded.reshape(-1, rows, views.part.group), values).view(*rounded.shape[:-1], -1)
    products.mul_(scales[:, :, :, None]).add_(rounded.sum(-1, keepdim=True) * zeros[:, :, :, None])
    acc += products.mul_(step).sum((0, 2))


def _tables(views: PartViews, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zeros of these pages in float32."""
    scales = views.scales.index_select(0, ids).float()
    return scales, torch.zeros_like(scales) if views.zeros is None else views.zeros.index_select(0, ids).float()
