"""Copies K/V between a pager's blocks and plain tensors with one token axis.

Knows nothing of where the tensors come from (a transformers cache, somebody's own model) nor of what names the blocks:
it works on a sequence of the pager, whatever made its block table. Guards: a token is written once, in order, and what
is read is what the blocks held; a lost block is a BlockMissError and no tensor comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import gather_rows, layer_views, plan_slots, write_kv
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from ..pager.reading import HeldBlocks
from ..tiers.errors import BlockMissError, TierFullError
from ..tiers.layout import KVLayout
from ..tiers.runs import plan_runs
from .attention import typed

SHORT_RUN = 4  # blocks: below this mean length of a run, rows are gathered first (one copy more, far fewer calls)
WRITE_SHARE = 4  # of the device tier for one write, so that a few threads can write at once
LayerKV = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class GroupKV:
    """K and V of one layer group over tokens [first, end) of a sequence.

    Shapes: layers: per layer K [kv_heads, end - first, head_dim] and V [kv_heads, end - first, value_dim]; whole: the
    tensor that all of them are views of, where they were read into one: [layers, 2, kv_heads, end - first, head_dim].
    """

    layers: list[LayerKV]
    end: int
    whole: Tensor | None = None

    @property
    def first(self) -> int:
        return self.end - int(self.layers[0][0].shape[1])


class KVCopier:
    """Of one pager."""

    def __init__(self, pager: Pager, clock: Callable[[], float] = time.monotonic) -> None:
        self._pager, self._clock = pager, clock
        self._dtypes = [getattr(torch, layout.dtype) for layout in pager.layouts]
        with torch.inference_mode(False):  # wherever this is opened, the pools can be written to from everywhere
            pools = [typed(pager.device_rows(i), dtype) for i, dtype in enumerate(self._dtypes)]
            self._views = [
                [views(layout, pool, layer) for layer in range(layout.num_layers)]
                for layout, pool in zip(pager.layouts, pools, strict=True)
            ]
        self._most_blocks = max(1, min(len(pool) for pool in pools) // WRITE_SHARE)

    # ------------------------------------------------------------------ out of the blocks
    @torch.no_grad()
    def read(self, seq: int, device: torch.device, *, in_one: bool, timeout_s: float) -> list[GroupKV]:
        """K/V of the computed tokens of a sequence, per layer group; windowed groups give what the next token sees.

        `in_one`: one tensor per group instead of one per K and V and layer (not where K and V differ in width).
        Raises: BlockMissError (the sequence has been cut before the lost block); Busy after timeout_s.
        """
        end = self._pager.num_computed(seq)
        with torch.inference_mode(False):  # tensors that may go on into any mode
            return [self._read_group(i, seq, end, device, in_one, timeout_s) for i in range(len(self._pager.layouts))]

    def _read_group(
        self, index: int, seq: int, end: int, device: torch.device, in_one: bool, timeout_s: float
    ) -> GroupKV:
        layout, dtype = self._pager.layouts[index], self._dtypes[index]
        size = layout.block_size
        first = 0 if layout.window is None else max(0, end - layout.window + 1)
        base, num_blocks = first // size, -(-end // size) - first // size
        if first == end:  # a window of one token, say: nothing before the next token is seen
            num_blocks = 0
        tokens = num_blocks * size
        heads, widths = layout.num_kv_heads, (layout.head_dim, layout.v_dim)
        whole = None
        if in_one and layout.v_dim == layout.head_dim:
            whole = torch.empty(layout.num_layers, 2, heads, tokens, layout.head_dim, dtype=dtype, device=device)
            targets = [(pair[0], pair[1]) for pair in whole]
        else:
            made = [
                [torch.empty(heads, tokens, w, dtype=dtype, device=device) for w in widths] for _ in self._views[index]
            ]
            targets = [(k, v) for k, v in made]
        if num_blocks:
            with closing(self._pager.read_blocks(seq, index, timeout_s=timeout_s)) as pieces:
                for piece in pieces:
                    _copy_out(layout, dtype, piece, base, targets)
        kept = slice(first - base * size, end - base * size)
        layers = [(k[:, kept], v[:, kept]) for k, v in targets]
        return GroupKV(layers, end, None if whole is None else whole[:, :, :, kept])

    # ------------------------------------------------------------------ into the blocks
    @torch.no_grad()
    def write(self, seq: int, groups: Sequence[GroupKV], *, require: Callable[[int], None], timeout_s: float) -> int:
        """Write the K/V of all tokens of the sequence that have none yet; returns how many.

        `require(start)` is asked before tokens from `start` on are written, and raises where `groups` do not hold them.
        Raises: TierFullError when room cannot be made within timeout_s.
        """
        end, size, written = self._pager.num_tokens(seq), self._pager.block_size, 0
        most, deadline_s = self._most_blocks, self._clock() + timeout_s
        while (start := self._pager.num_computed(seq)) < end:
            require(start)
            span = Span(seq, start, min(end, (start // size + most) * size))
            try:
                with self._pager.lease([span], timeout_s=timeout_s, write_only=True) as lease:
                    self._write_span(lease, span, groups)
                    lease.commit()
                written += span.end - span.start
            except BlockMissError:
                pass  # the tail that we were going on from is lost; the sequence has been cut before it
            except TierFullError as full:
                if self._clock() > deadline_s:
                    raise
                most = max(1, most // 2)
                time.sleep(full.retry_after_s)  # others hold pages: they let go of them soon
        return written

    def _write_span(self, lease: Lease, span: Span, groups: Sequence[GroupKV]) -> None:
        for layers, group, slots in zip(self._views, groups, lease.slots, strict=True):
            plan = plan_slots(layers[0][0], slots, span.end - span.start)
            part = slice(span.start - group.first, span.end - group.first)
            for (pool_k, pool_v), (k, v) in zip(layers, group.layers, strict=True):
                new_k, new_v = (x[:, part].transpose(0, 1).to(pool_k.device) for x in (k, v))
                write_kv(new_k, new_v, pool_k, pool_v, plan)


def views(layout: KVLayout, rows: Tensor, layer: int) -> LayerKV:
    """K [rows, kv_heads, block, head_dim] and V of one layer in typed rows of whole blocks."""
    return layer_views(rows, layer, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.value_dim)


def _copy_out(layout: KVLayout, dtype: torch.dtype, piece: HeldBlocks, base: int, targets: list[LayerKV]) -> None:
    """Copy blocks to their places on the token axis of the targets, [kv_heads, tokens, dim]; block `base` comes first."""
    rows, ids, at = typed(piece.rows, dtype), piece.row_ids, piece.logical - base
    device = targets[0][0].device
    starts, sources, lengths = plan_runs(at, ids)
    if rows.device != device or len(ids) < SHORT_RUN * len(starts):
        rows = gather_rows(rows, ids).to(device)
        starts, sources, lengths = plan_runs(at, np.arange(len(ids)))
    for layer, (target_k, target_v) in enumerate(targets):
        for pages, target in zip(views(layout, rows, layer), (target_k, target_v), strict=True):
            blocks = target.unflatten(1, (-1, layout.block_size))
            for t, s, n in zip(starts.tolist(), sources.tolist(), lengths.tolist(), strict=True):
                blocks[:, t : t + n].copy_(pages[s : s + n].transpose(0, 1))
