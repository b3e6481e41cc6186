"""Copies K/V between a pager's blocks and plain tensors with one token axis.

Knows nothing of where the tensors come from (a transformers cache, somebody's own model) nor of what names the blocks:
it works on a sequence of the pager, whatever made its block table. Of a packed layer group it writes to the tail, packs
what becomes whole there (packed.py), and unpacks when it reads: what comes back is what the format kept. Guards: a token is
written once, in order, and what is read is what the blocks held; a lost block is a BlockMissError and no tensor comes back.

On a CPU the copies are numpy's, in the calling thread: torch's parallel copies wait for each other's threads, and on a
machine that is busy (which serving machines are) they were 3 to 30 times slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import gather_rows, layer_views, write_kv
from ..kernels.conversion import dequantize_blocks
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from ..pager.reading import HeldBlocks
from ..tiers.errors import BlockMissError, TierFullError
from ..tiers.formats import tail_of
from ..tiers.layout import KVLayout
from ..tiers.runs import plan_runs
from ..tiers.streams import aligned_rows
from .attention import typed
from .packed import PackedPages, PackedStep

HUGE_PAGE_BYTES = (
    2 << 20
)  # tensors of at least this size are allocated in huge pages: loading into new memory is 3x faster
WRITE_SHARE = 4  # of the device tier for one write, so that a few threads can write at once
LayerKV = tuple[Tensor, Tensor]
_WORDS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


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
        self._layouts = pager.layouts
        self._num_groups = sum(not layout.is_tail for layout in self._layouts)  # as callers know them; tails come last
        self._dtypes = [getattr(torch, layout.dtype) for layout in self._layouts]
        self._views: list[list[LayerKV]] = []  # none of packed groups
        self._packed: list[list[PackedPages]] = []  # and only of those
        with torch.inference_mode(False):  # wherever this is opened, the pools can be written to from everywhere
            for i, layout in enumerate(self._layouts):
                rows, layers, is_packed = pager.device_rows(i), range(layout.num_layers), layout.is_packed
                pool = typed(rows, torch.uint8 if is_packed else self._dtypes[i])
                self._views.append([] if is_packed else [views(layout, pool, n) for n in layers])
                self._packed.append([PackedPages.of(layout, i, n, pool) for n in layers] if is_packed else [])
        fewest = min(len(pager.device_rows(i)) for i in range(len(self._layouts)))
        self._most_blocks = max(1, fewest // WRITE_SHARE)

    # ------------------------------------------------------------------ out of the blocks
    @torch.no_grad()
    def read(self, seq: int, device: torch.device, *, in_one: bool, timeout_s: float) -> list[GroupKV]:
        """K/V of the computed tokens of a sequence, per layer group; windowed groups give what the next token sees.

        `in_one`: one tensor per group instead of one per K and V and layer (not where K and V differ in width).
        Raises: BlockMissError (the sequence has been cut before the lost block); Busy after timeout_s.
        """
        end = self._pager.num_computed(seq)
        with torch.inference_mode(False):  # tensors that may go on into any mode
            return [self._read_group(i, seq, end, device, in_one, timeout_s) for i in range(self._num_groups)]

    def _read_group(
        self, index: int, seq: int, end: int, device: torch.device, in_one: bool, timeout_s: float
    ) -> GroupKV:
        layout, dtype = self._layouts[index], self._dtypes[index]
        size = layout.block_size
        first = 0 if layout.window is None else max(0, end - layout.window + 1)
        base, num_blocks = first // size, -(-end // size) - first // size
        if first == end:  # a window of one token, say: nothing before the next token is seen
            num_blocks = 0
        tokens = num_blocks * size
        heads, widths = layout.num_kv_heads, (layout.head_dim, layout.v_dim)
        whole = None
        if in_one and layout.v_dim == layout.head_dim:
            whole = _empty((layout.num_layers, 2, heads, tokens, layout.head_dim), dtype, device)
            targets = [(pair[0], pair[1]) for pair in whole]
        else:
            made = [
                [_empty((heads, tokens, width), dtype, device) for width in widths] for _ in range(layout.num_layers)
            ]
            targets = [(k, v) for k, v in made]
        for source in sorted({index, tail_of(self._layouts, index)}) if num_blocks else ():
            self._copy_blocks(source, seq, base, end, targets, timeout_s)
        kept = slice(first - base * size, end - base * size)
        layers = [(k[:, kept], v[:, kept]) for k, v in targets]
        return GroupKV(layers, end, None if whole is None else whole[:, :, :, kept])

    def _copy_blocks(self, index: int, seq: int, base: int, end: int, targets: list[LayerKV], timeout_s: float) -> None:
        """All that one group of the pager has; what is not whole yet lies in a packed group's tail."""
        layout = self._layouts[index]
        with closing(self._pager.read_blocks(seq, index, timeout_s=timeout_s)) as pieces:
            for piece in pieces:
                if layout.is_packed:
                    _unpack(layout, piece, base, end // layout.block_size, targets)
                else:
                    _copy_out(layout, self._dtypes[index], piece, base, targets)

    # ------------------------------------------------------------------ into the blocks
    @torch.no_grad()
    def write(self, seq: int, groups: Sequence[GroupKV], *, require: Callable[[int], None], timeout_s: float) -> int:
        """Write the K/V of all tokens of the sequence that have none yet; returns how many.

        `require(start)` is asked before tokens from `start` on are written, and raises where `groups` do not hold them.
        Raises: TierFullError when room cannot be made within timeout_s; UnpackableError for values that the device tier's
        format cannot hold.
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
        for index, group in enumerate(groups):
            new = tail_of(self._layouts, index)
            layers, slots = self._views[new], lease.slots[new]
            stretches = None if layers[0][0].is_cuda else _stretches(slots, self._pager.block_size)
            part = slice(span.start - group.first, span.end - group.first)
            for (pool_k, pool_v), (k, v) in zip(layers, group.layers, strict=True):
                if stretches is None:
                    new_k, new_v = (x[:, part].transpose(0, 1).to(pool_k.device) for x in (k, v))
                    write_kv(new_k, new_v, pool_k, pool_v, slots)
                else:
                    _copy_in(pool_k, k[:, part], stretches)
                    _copy_in(pool_v, v[:, part], stretches)
            if new != index:
                step = PackedStep(lease, index, new, self._pager.block_size)
                for packed, tail in zip(self._packed[index], layers, strict=True):
                    step.fill(packed, *tail)
                step.check()


def views(layout: KVLayout, rows: Tensor, layer: int) -> LayerKV:
    """K [rows, kv_heads, block, head_dim] and V of one layer in typed rows of whole blocks."""
    return layer_views(rows, layer, layout.num_kv_heads, layout.block_size, layout.head_dim, layout.value_dim)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return typed(aligned_rows(1, nbytes), dtype).view(shape)


def _words(x: Tensor) -> npt.NDArray[Any]:
    """A tensor in host memory as numpy integers of the same width; numpy has no bfloat16."""
    return x.detach().view(_WORDS[x.element_size()]).numpy()


def _copy_out(layout: KVLayout, dtype: torch.dtype, piece: HeldBlocks, base: int, targets: list[LayerKV]) -> None:
    """Copy blocks to their places on the token axis of the targets, [kv_heads, tokens, dim]; block `base` comes first."""
    rows, ids, at = typed(piece.rows, dtype), piece.row_ids, piece.logical - base
    device = targets[0][0].device
    if rows.is_cuda or device.type != "cpu":  # whole blocks to where they are needed, then apart
        rows, ids = gather_rows(rows, ids).to(device), np.arange(len(ids))
    runs = list(zip(*(part.tolist() for part in plan_runs(at, ids)), strict=True))
    for layer, pair in enumerate(targets):
        for pages, target in zip(views(layout, rows, layer), pair, strict=True):
            blocks = target.unflatten(1, (-1, layout.block_size))
            if device.type == "cpu":
                source, out = _words(pages), _words(blocks)
                for t, s, n in runs:
                    np.copyto(out[:, t : t + n], source[s : s + n].swapaxes(0, 1))
            else:
                for t, s, n in runs:
                    blocks[:, t : t + n].copy_(pages[s : s + n].transpose(0, 1))


def _unpack(layout: KVLayout, piece: HeldBlocks, base: int, num_whole: int, targets: list[LayerKV]) -> None:
    """As _copy_out, of packed blocks; of one that is not whole there is nothing to unpack."""
    whole = piece.logical < num_whole
    rows, ids, at = typed(piece.rows, torch.uint8), piece.row_ids[whole], piece.logical[whole] - base
    device = targets[0][0].device
    if rows.is_cuda or device.type != "cpu":  # packed bytes to where they are needed, then unpacked
        rows, ids = gather_rows(rows, ids).to(device), np.arange(len(ids))
    for layer, pair in enumerate(targets):
        packed = PackedPages.of(layout, 0, layer, rows)
        k, v = (target.unflatten(1, (-1, layout.block_size)).transpose(0, 1) for target in pair)
        dequantize_blocks(packed.pages, ids, k, v, at, packed.fmt)


Stretch = tuple[
    int, int, int, int
]  # page, offset in it, first new token, number of tokens: whole pages, or part of one


def _stretches(slots: npt.NDArray[np.int64], size: int) -> list[Stretch]:
    """New tokens in pieces that lie together: neighbouring whole pages, or part of one page."""
    starts, firsts, counts = (part.tolist() for part in plan_runs(slots, np.arange(len(slots))))
    found = []
    for slot, token, count in zip(starts, firsts, counts, strict=True):
        while count:
            page, offset = divmod(slot, size)
            now = count // size * size if offset == 0 and count >= size else min(count, size - offset)
            found.append((page, offset, token, now))
            slot, token, count = slot + now, token + now, count - now
    return found


def _copy_in(pool: Tensor, new: Tensor, stretches: list[Stretch]) -> None:
    """Write new tokens [kv_heads, tokens, dim] to pages [pages, kv_heads, block, dim] in host memory."""
    pages, source, size = _words(pool), _words(new.cpu()), pool.shape[2]
    for page, offset, token, count in stretches:
        part = source[:, token : token + count]
        if count < size:
            pages[page, :, offset : offset + count] = part
        else:
            pages[page : page + count // size] = _split(part, size).swapaxes(0, 1)


def _split(part: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """[kv_heads, tokens, dim] as [kv_heads, blocks, size, dim] over the same memory, whatever its strides."""
    heads, tokens, dim = part.shape
    h, t, d = part.strides
    return np.lib.stride_tricks.as_strided(
        part, (heads, tokens // size, size, dim), (h, t * size, t, d), writeable=False
    )
