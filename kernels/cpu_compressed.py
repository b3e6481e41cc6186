"""The CPU path of attention on compressed pages: codes become numbers a few pages at a time, in a buffer that is kept.

Few rows (decode): the codes of a piece are converted to float32, nothing else, and meet q times K's scale and p times V's
scale, as on a GPU; conversion is the cost, so a scale on every value would be half as much again. Many rows: a piece is
dequantised into the same buffer and handed to the flash kernel, whose products are then the cost. All pages are never
unpacked at once: that is a pass over memory of full-precision size. Guards: only pages of the table are read, and under
a window keys that a row does not see get no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import torch
from torch import Tensor

from .cpu_hack import hack_scores, hack_values
from .cpu_layer import Partial, Scratch, scratch
from .cpu_quant import FP8_UNIT, PartViews, decode, dequantize_values, part_views
from .cpu_tile import attend_tile, exp_
from .formats import PageFormat
from .plan import PagesPlan

STAGED_BYTES = 4 << 20  # numbers of one piece of K, then of V; smaller ones spend their time starting operators
FEW_ROWS = 64  # rows of one KV head; up to here scaling them is cheaper than scaling pages
SCORED_ROWS = 256  # rows of one KV head whose scores are held at once, under a window and for HACK's formats
MAX_QUERY_TILE = 4096  # rows of one sequence handled at once

_codes = Scratch()


def compressed_attention(
    q: Tensor, pages: Tensor, fmt: PageFormat, plan: PagesPlan, *, scale: float, window: int | None, sinks: int,
    softcap: float | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend packed rows to compressed blocks; q is [turns, T, Hq, D], arguments are checked by the caller."""
    turns, tokens, query_heads, dim = q.shape
    group, value_dim = query_heads // fmt.kv_heads, fmt.values.dim
    reader = PagesReader(pages, fmt, scale, softcap)
    out, lse = torch.empty(tokens, query_heads, value_dim, dtype=out_dtype), torch.empty(tokens, query_heads)
    grouped = q.view(turns, tokens, fmt.kv_heads, group, dim).permute(0, 2, 3, 1, 4)  # [turns, H, G, T, D]
    must_score = window is not None or fmt.is_hack
    for s in range(len(plan.kv_lens)):
        first, stop = int(plan.cu_q[s]), int(plan.cu_q[s + 1])
        step = max(1, SCORED_ROWS // group) if must_score else MAX_QUERY_TILE
        for a in range(first, stop, step):
            b = min(a + step, stop)
            position = int(plan.kv_lens[s] + plan.ahead[s]) + a - first
            pieces = _pieces(plan, s, position, window, sinks, reader.pages_per_piece)
            rows = grouped[:, :, :, a:b]
            if must_score or group * (b - a) <= FEW_ROWS:
                running = Running(fmt.kv_heads, group, b - a, value_dim)
                for turn, ids, starts in pieces:
                    reader.add(rows[turn], ids, _visible(starts, fmt.block, position, b - a, window, sinks), running)
                running.store(out[a:b], lse[a:b])
            else:
                partial = Partial(fmt.kv_heads, group, b - a, value_dim)
                for turn, ids, _ in pieces:
                    reader.add_flash(rows[turn], ids, partial)
                partial.store(out[a:b], lse[a:b])
    return out, lse


def _visible_blocks(plan: PagesPlan, s: int, position: int, window: int | None, sinks: int) -> np.ndarray:
    """Return the blocks of a sequence that hold its sinks, and those from the first row's window on."""
    block = plan.block_size
    count = int(plan.kv_lens[s]) // block
    lowest = 0 if window is None else min(max(position - window + 1, 0) // block, count)
    return np.r_[np.arange(min(-(-sinks // block), lowest)), np.arange(lowest, count)].astype(np.int64)


def _pieces(
    plan: PagesPlan, s: int, position: int, window: int | None, sinks: int, step: int
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """Yield turn, pages and first positions of a few visible blocks that share a turn; pages in their order in memory."""
    chosen = _visible_blocks(plan, s, position, window, sinks)
    turns = np.zeros(len(chosen), np.int64) if plan.turn_ids is None else plan.turn_ids[s, chosen]
    for turn in np.unique(turns).tolist():
        mine = chosen[turns == turn]
        mine = mine[np.argsort(plan.table[s, mine], kind="stable")]
        for a in range(0, len(mine), step):
            part = mine[a : a + step]
            yield turn, torch.from_numpy(plan.table[s, part].astype(np.int64)), part * plan.block_size


def _visible(starts: np.ndarray, block: int, position: int, rows: int, window: int | None, sinks: int) -> Tensor | None:
    """Say which keys [rows, blocks * block] each row sees; None where all see all."""
    if window is None:
        return None
    keys = torch.from_numpy((starts[:, None] + np.arange(block)[None, :]).reshape(-1))
    visible = (torch.arange(position, position + rows)[:, None] - keys[None, :] < window) | (keys[None, :] < sinks)
    return None if bool(visible.all()) else visible


class Running:
    """The running maximum, sum and weighted values of some rows, float32; a row may see no key of a piece."""

    def __init__(self, heads: int, group: int, tokens: int, value_dim: int) -> None:
        self.group, self.tokens = group, tokens
        self.acc = torch.zeros(heads, group * tokens, value_dim)
        self.total = torch.zeros(heads, group * tokens)
        self.top = torch.full((heads, group * tokens), float("-inf"))

    def weigh(self, scores: Tensor) -> Tensor:
        """Turn scores [n, H, R, block] into weights in place and account for them."""
        top = torch.maximum(self.top, scores.amax((0, 3)))
        base = torch.where(torch.isneginf(top), 0.0, top)
        decay = torch.exp(self.top - base)
        weights = exp_(scores.sub_(base[None, :, :, None]))
        self.total.mul_(decay).add_(weights.sum((0, 3)))
        self.acc.mul_(decay[..., None])
        self.top = top
        return weights

    def store(self, out: Tensor, lse: Tensor) -> None:
        """Write out [T, Hq, Dv] and lse [T, Hq]; a row without keys gives zeros and -inf."""
        heads, _, value_dim = self.acc.shape
        total = torch.where(self.total > 0, self.total, 1.0)
        result = (self.acc / total[..., None]).view(heads, self.group, self.tokens, value_dim)
        out.view(self.tokens, heads, self.group, value_dim).copy_(result.permute(2, 0, 1, 3))
        found = (self.top + total.log()).view(heads, self.group, self.tokens)
        lse.view(self.tokens, heads, self.group).copy_(found.permute(2, 0, 1))


class PagesReader:
    """Compressed pages of one layer, read a few at a time."""

    def __init__(self, pages: Tensor, fmt: PageFormat, scale: float, softcap: float | None) -> None:
        self.fmt, self.scale, self.softcap = fmt, scale, softcap
        self.keys, self.values = part_views(pages, fmt)
        wide = max(fmt.keys.dim, fmt.values.dim)
        self.pages_per_piece = max(1, STAGED_BYTES // (fmt.kv_heads * fmt.block * wide * 4))
        shape = (self.pages_per_piece, fmt.kv_heads, fmt.block)
        widest = max(fmt.keys.row_bytes, fmt.values.row_bytes)
        self._gathered, self._space = _codes.rooms([(*shape, widest), (*shape, 2 * widest)], torch.uint8)

    def add(self, q: Tensor, ids: Tensor, visible: Tensor | None, running: Running) -> None:
        """Take the keys of pages ids into the running result of rows q [H, G, T, D]."""
        rows = q.flatten(1, 2).float()
        score, weigh = (hack_scores, hack_values) if self.fmt.is_hack else (fold_scores, fold_values)
        (numbers,) = scratch.rooms([self._shape(self.keys, ids)], torch.float32)
        scores = score(rows, self._decode(self.keys, ids, numbers), self.keys, ids).mul_(self.scale)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if visible is not None:
            seen = visible.view(running.tokens, len(ids), -1).transpose(0, 1)[:, None, None]
            scores.unflatten(2, (running.group, running.tokens)).masked_fill_(~seen, float("-inf"))
        weights = running.weigh(scores)
        (numbers,) = scratch.rooms([self._shape(self.values, ids)], torch.float32)
        weigh(weights, self._decode(self.values, ids, numbers), self.values, ids, running.acc)

    def add_flash(self, q: Tensor, ids: Tensor, partial: Partial) -> None:
        """Take all keys of pages ids, which all rows q [H, G, T, D] see, by dequantising them for the flash kernel."""
        rooms = scratch.rooms([self._shape(views, ids) for views in (self.keys, self.values)], q.dtype)
        for views, numbers in zip((self.keys, self.values), rooms):
            dequantize_values(views, ids, self._decode(views, ids, numbers))
        tiles = (x.transpose(0, 1).reshape(self.fmt.kv_heads, -1, x.shape[3]) for x in rooms)
        out, lse = attend_tile(q, *tiles, scale=self.scale, softcap=self.softcap, visible=None)
        partial.add(slice(0, self.fmt.kv_heads), out, lse)

    def _shape(self, views: PartViews, ids: Tensor) -> tuple[int, ...]:
        return (len(ids), *views.codes.shape[1:3], views.part.dim)

    def _decode(self, views: PartViews, ids: Tensor, numbers: Tensor) -> Tensor:
        """Decode pages ids to numbers [n, H, block, dim] by way of kept memory; fresh memory costs page faults."""
        shape = (len(ids), *views.codes.shape[1:])
        first = int(ids[0])
        if int(ids[-1]) - first == len(ids) - 1:  # neighbours, since they come in order
            codes = views.codes.narrow(0, first, len(ids))
        else:
            codes = self._gathered.flatten()[: prod(shape)].view(shape)
            torch.index_select(views.codes, 0, ids, out=codes)
        bytes_per_code = 2 if views.part.axis == "page" else 1
        return decode(codes, views.part, numbers, self._space.flatten()[: prod(shape) * bytes_per_code])


def fold_scores(q: Tensor, codes: Tensor, views: PartViews, ids: Tensor) -> Tensor:
    """Return q.k [n, H, R, block] for rows q [H, R, D] and codes [n, H, block, D]: (q s).c + q.z."""
    n, heads, block, dim = codes.shape
    scales = views.scales.index_select(0, ids).float()
    if views.part.axis == "page":
        products = torch.bmm(_repeat(q, n), codes.flatten(0, 1).transpose(1, 2)).view(n, heads, -1, block)
        return products.mul_(scales * FP8_UNIT)
    scaled = q[None, :, None] * scales[:, :, :, None]  # [n, H, groups, R, D]
    groups, group = scales.shape[2], views.part.group
    keys = codes.view(n * heads * groups, group, dim)
    scores = torch.bmm(scaled.flatten(0, 2), keys.transpose(1, 2)).view(n, heads, groups, -1, group)
    if views.zeros is not None:
        zeros = views.zeros.index_select(0, ids).float()
        scores += torch.matmul(zeros, q.transpose(1, 2))[..., None]
    return scores.transpose(2, 3).reshape(n, heads, -1, block)


def fold_values(weights: Tensor, codes: Tensor, views: PartViews, ids: Tensor, acc: Tensor) -> None:
    """Add sum p v to acc [H, R, Dv] for weights [n, H, R, block] and codes [n, H, block, Dv]: (p s).c + sum p z."""
    scales, n = views.scales.index_select(0, ids).float(), len(ids)
    if views.part.axis == "page":
        scaled = weights * (scales * FP8_UNIT)
        acc += torch.bmm(scaled.flatten(0, 1), codes.flatten(0, 1)).view(n, *acc.shape).sum(0)
        return
    zeros = None if views.zeros is None else views.zeros.index_select(0, ids).float()
    for g, channels in enumerate(codes.flatten(0, 1).split(views.part.group, 2)):
        target = acc[..., g * views.part.group : g * views.part.group + channels.shape[2]]
        scaled = weights * scales[:, :, g, None]
        target += torch.bmm(scaled.flatten(0, 1), channels).view(n, *target.shape).sum(0)
        if zeros is not None:
            target += (weights * zeros[:, :, g, None]).sum((0, 3))[..., None]


def _repeat(q: Tensor, n: int) -> Tensor:
    """Repeat rows [H, R, D] for every page: [n * H, R, D]."""
    return q[None].expand(n, *q.shape).reshape(-1, *q.shape[1:])
