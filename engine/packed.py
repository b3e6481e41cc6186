"""Packed pages in the device tier: which blocks of a step lie packed, and how attention reads them beside the tail.

A packed layer group has a companion, its tail: there the K/V of new tokens are written in full precision, and there the
block that is being filled stays. A block is packed once, in the step that fills it, from the tail into its page; from then
on nobody reads it elsewhere, except its own sequence: for that the newest whole blocks stay in the tail as far as `residual`
tokens back (KIVI, arXiv 2402.02750), and are read there instead of on their pages. A step attends to packed blocks as they
are and to the tail, and merges both by LSE: a prompt's chunk sees itself in full precision. Guards: only blocks that are
whole and were not packed before this step are packed, no block is read twice, and a step is not committed before it is known
that their format holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import merge_states, paged_attention
from ..kernels.compressed import compressed_attention, mixed_attention
from ..kernels.conversion import quantize_blocks
from ..kernels.formats import PageFormat
from ..kernels.plan import PagesPlan, StepPlan
from ..kernels.uploads import to_device
from ..pager.lease import Lease
from ..tiers.errors import UnpackableError
from ..tiers.formats import page_format
from ..tiers.layout import KVLayout
from ..tiers.streams import IntArray

if TYPE_CHECKING:
    from .attention import LayerPages


@dataclass(frozen=True, slots=True)
class PackedPages:
    """One layer of a packed group: uint8 [pages, layer_bytes], a view of its pool."""

    group: int
    layer: int  # its number within the group
    pages: Tensor
    fmt: PageFormat
    staged: Tensor | None = None  # and where slices of it are staged: [rows, layer_bytes]
    host: Tensor | None = None  # and host slots of it that are read in place: [slots, layer_bytes]

    @classmethod
    def of(
        cls,
        layout: KVLayout,
        group: int,
        layer: int,
        rows: Tensor,
        staged: Tensor | None = None,
        host: Tensor | None = None,
    ) -> PackedPages:
        """A layer of whole packed blocks, rows [pages, block_bytes] and host [slots, block_bytes]."""
        size = layout.layer_bytes
        here, below = (None if x is None else x.narrow(1, layer * size, size) for x in (rows, host))
        assert here is not None
        return cls(group, layer, here, page_format(layout), staged, below)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a step that attend: the last ones of some of its spans, by index, or all of all."""

    spans: list[int]
    cu_q: npt.NDArray[np.int32]


class PackedStep:
    """One packed group in one lease."""

    def __init__(self, lease: Lease, group: int, tail: int, block_size: int) -> None:
        self._held, self._tail = lease.groups[group], lease.groups[tail]
        self._spans, self._size = lease.spans, block_size
        firsts = [span.start // block_size for span in lease.spans]
        whole = [span.end // block_size - first for span, first in zip(lease.spans, firsts, strict=True)]
        self._tail_from = np.array([int(at[0]) for at in self._tail.listed])
        self._before = _count_below(self._held.listed, self._tail_from)
        self._source = _each(self._tail.tables, _count_below(self._tail.listed, firsts), whole)
        self._target = _each(self._held.tables, _count_below(self._held.listed, firsts), whole)
        begun = [first + (span.start % block_size > 0) for span, first in zip(lease.spans, firsts, strict=True)]
        known = _count_below(self._held.listed, begun)
        listed = np.array([len(at) for at in self._held.listed])
        self._new = torch.from_numpy(_each(self._held.tables, known, (listed - known).tolist()))
        self._plans: dict[tuple[int, ...], PagesPlan] = {}
        self._bad: list[tuple[PackedPages, Tensor]] = []

    def fill(self, packed: PackedPages, k: Tensor, v: Tensor) -> None:
        """Pack the blocks of one layer that this step makes whole. Their K/V are written to its tail, k and v, already.

        Pages of blocks that begin here are cleared first: what lay there was another's, and packing leaves gaps. Nothing
        here waits for a device; `check` says whether the format could hold the values.
        """
        device = packed.pages.device
        if len(self._new):
            packed.pages.index_fill_(0, to_device(self._new, device), 0)
        if not len(self._target):
            return
        bad = torch.zeros(len(self._target), dtype=torch.int32, device=device)
        quantize_blocks(k, v, self._source, packed.pages, self._target, packed.fmt, bad=bad)
        self._bad.append((packed, bad))

    def check(self) -> None:
        """Look at what `fill` found, before the step is committed: a block that nobody can read must not get a name.

        Stream: waits for the computing that was queued, in steps that packed something.
        Raises: UnpackableError for values that the format cannot hold, naming the first layer that has them.
        """
        if not self._bad:
            return
        found = torch.stack([bad for _, bad in self._bad]).cpu().numpy() != 0
        if found.any():
            packed, _ = self._bad[int(np.argmax(found.any(1)))]
            raise UnpackableError(
                self._target[found.any(0)],
                f"device={packed.fmt.name!r}: layer {packed.layer} of its group: values are not finite or too large for "
                "float16 scales",
            )

    def attend(
        self,
        pages: LayerPages,
        q: Tensor,
        rows: Rows,
        tail_plan: StepPlan,
        *,
        window: int | None,
        sinks: int,
        **kind: Any,
    ) -> tuple[Tensor, Tensor]:
        """Packed blocks and the tail, merged; what is streamed is not among them.

        Shapes: q [rows, Hq, D]; out [rows, Hq, Dv] and lse [rows, Hq].
        """
        packed = pages.packed
        assert packed is not None
        before = self._before[rows.spans] * self._size
        if sinks and window is not None:  # in the tail of who has nothing packed yet, and of nobody else
            return mixed_attention(
                q,
                packed.pages,
                packed.fmt,
                self._held.tables[rows.spans],
                before,
                pages.k,
                pages.v,
                self._tail.tables[rows.spans],
                self._tail.kv_lens[rows.spans],
                rows.cu_q,
                window=window,
                sinks=sinks,
                **kind,
            )
        state = paged_attention(q, pages.k, pages.v, (), (), (), window=window, plan=tail_plan, **kind)
        if before.any():
            plan = self._plan(rows, before, len(packed.pages))
            part = compressed_attention(q, packed.pages, packed.fmt, (), (), (), window=window, plan=plan, **kind)
            state = merge_states(*state, *part)
        return state

    def _plan(self, rows: Rows, before: IntArray, num_pages: int) -> PagesPlan:
        """Made once per step for these rows, and used by every layer."""
        key = tuple(rows.cu_q.tolist())
        if key not in self._plans:
            ends = np.array([self._spans[i].end for i in rows.spans])
            starts = ends - np.diff(rows.cu_q)  # of the first row that attends
            ahead = starts - self._tail_from[rows.spans] * self._size
            table = self._held.tables[rows.spans]
            self._plans[key] = PagesPlan(table, before, rows.cu_q, ahead, block_size=self._size, num_pages=num_pages)
        return self._plans[key]


def _count_below(listed: Sequence[IntArray], firsts: Sequence[int] | IntArray) -> IntArray:
    """Of every span, how many of these logical blocks lie before that one."""
    return np.array([np.count_nonzero(at < first) for at, first in zip(listed, firsts, strict=True)])


def attend_blocks(fmt: PageFormat, pages: Tensor, ids: IntArray, q: Tensor, **kind: Any) -> tuple[Tensor, Tensor]:
    """All rows q [rows, Hq, D] see all keys of these blocks, which lie before them; out is float32."""
    lens, kind = [len(ids) * fmt.block], kind | dict(out_dtype=torch.float32)
    return compressed_attention(q, pages, fmt, ids[None], lens, [0, len(q)], **kind)


def _each(tables: npt.NDArray[np.int32], firsts: IntArray, counts: Sequence[int]) -> IntArray:
    """Of every row of the tables so many pages from that column on."""
    parts = [row[first : first + n] for row, first, n in zip(tables, firsts.tolist(), counts, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
