"""A decode step on a CPU, bound to its pages: what all layers of a group share is checked and sliced once for all of them.

One row per sequence is so little arithmetic that a step pays for its calls; a layer here makes only those that compute.
Most steps follow one over the same pages, one token later: then only lengths change. Between two layers the weights sweep
the processor's caches, so that every call costs four times what it costs warm, of Python's too: views are cut where they
are used, not once per step, and the step of one sequence is one straight line. Prefill, streams, softcap and sink logits
take the way of `cpu`. Guards: it reads what `cpu.paged_attention` would read for the same plan, and
writes one token slot per sequence, which lies in a page of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu import plan_singles
from .cpu_inplace import Reading, attend_in_place, weigh
from .cpu_layer import PagedLayer
from .cpu_tile import flash_kernel, is_slow_with_one_row
from .grad import without_grad
from .plan import SlotPlan, StepPlan


def plan_decode(
    k: Tensor, v: Tensor, plan: StepPlan, slots: SlotPlan, *, group: int, window: int | None, sinks: int
) -> DecodeStep | None:
    """None where some sequence has more rows than one or writes nothing, or where pages are better copied than read."""
    if (
        plan.num_tokens != len(plan.kv_lens)
        or slots.num_tokens != plan.num_tokens
        or int(slots.slots.min(initial=0)) < 0
    ):
        return None
    singles = plan_singles(PagedLayer(k[:, 0], v[:, 0], 1.0, None), plan, group, window, sinks)
    if singles is None or not singles.is_all:
        return None
    reading, has_ends = singles.reading, window is None and bool((plan.kv_lens % plan.block_size).all())
    is_plain = has_ends and len(slots.slots) == 1 and not (reading.gathers or reading.merges_early)
    return (OneRow if is_plain else DecodeStep)(k, v, plan, reading, slots.slots, has_ends=has_ends)


class DecodeStep:
    """Over one layer group. Shapes: k, v [pages, layers, Hkv, block, D], strided views; slots [sequences].

    The ends of sequences are their last blocks, where all of these are partly filled and there is no window: then they are
    the reading's first views, one for each sequence, and kept as whole pages.
    """

    def __init__(
        self, k: Tensor, v: Tensor, plan: StepPlan, reading: Reading, slots: np.ndarray, *, has_ends: bool
    ) -> None:
        self._reading, self._table = reading, plan.table
        self._block, self._dtype = k.shape[3], k.dtype
        self._row_shape = (1, k.shape[2], len(slots), k.shape[4])
        self._q_shape = (len(slots), k.shape[2], -1, k.shape[4])
        self._pools = list(zip(k.unbind(1), v.unbind(1), strict=True))
        self._last, self._held = (plan.kv_lens // self._block).tolist(), (plan.kv_lens % self._block).tolist()
        self._num_ends = len(slots) if has_ends else 0
        self._slices = [self._of_layer(*pools) for pools in self._pools]
        self._place(slots)

    def _place(self, slots: np.ndarray) -> None:
        """Where new tokens are written."""
        at = torch.from_numpy(slots)
        self._at = at // self._block, slice(None), at % self._block

    def _of_layer(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What one layer reads, ends as whole pages."""
        views = self._reading.views
        ends = [(k.narrow(0, view.page, 1), v.narrow(0, view.page, 1)) for view in views[: self._num_ends]]
        return [*ends, *((view.of(k, 2), view.of(v, 2)) for view in views[self._num_ends :])]

    def follow(self, table: np.ndarray, kv_lens: np.ndarray, slots: np.ndarray) -> bool:
        """Become another step of the same sequences over the same pages, whose last ones hold more tokens; if it is one.

        False, and nothing has changed, for any other step; that one is planned anew. The retention rule is the same.
        """
        if not self._num_ends or table.shape != self._table.shape or not (table == self._table).all():
            return False
        held = [kv_len - last * self._block for kv_len, last in zip(kv_lens.tolist(), self._last, strict=True)]
        for view, num_held, slot in zip(self._reading.views, held, slots.tolist()):
            if not 0 < num_held <= self._block or slot != view.page * self._block + num_held - 1:
                return False
        self._held = held
        self._place(slots)
        return True

    @without_grad
    def layer(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write a layer's new K and V, and attend to all that each sequence sees.

        Shapes: query [1, Hq, n, D]; key, value [1, Hkv, n, D]; out [1, n, Hq, D] in query's dtype.
        Raises: ValueError for keys and values of another shape than the pool's.
        """
        self._check(key, value)
        for pool, new in zip(self._pools[index], (key, value), strict=True):
            pool[self._at] = new[0].transpose(0, 1).to(pool.dtype)
        ends = zip(self._slices[index], self._held[: self._num_ends])
        slices = [(k.narrow(2, 0, n), v.narrow(2, 0, n)) for (k, v), n in ends] + self._slices[index][self._num_ends :]
        q = query.transpose(1, 2).reshape(self._q_shape)
        layer = PagedLayer(*self._pools[index], scale, None)
        out, _ = attend_in_place(layer, q.to(self._dtype), self._reading, with_lse=False, slices=slices)
        return out.reshape(1, -1, query.shape[1], query.shape[3]).to(query.dtype)

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.shape != self._row_shape or value.shape != self._row_shape:
            raise ValueError(f"new tokens {tuple(key.shape)}, {tuple(value.shape)} do not fit: need {self._row_shape}")


class OneRow(DecodeStep):
    """A step of one sequence, with an end, in no more views than can be merged at once."""

    def _place(self, slots: np.ndarray) -> None:
        """Behind what the end holds."""

    @without_grad
    def layer(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As any step's. Source: attend_in_place, attend_pages, merge_pages, without their cases: calls cost more than they."""
        if key.shape != self._row_shape or value.shape != self._row_shape:
            self._check(key, value)
        (k, v), held, flash = self._slices[index][0], self._held[0], flash_kernel()
        assert flash is not None
        k.narrow(2, held - 1, 1).copy_(key)
        v.narrow(2, held - 1, 1).copy_(value)
        q = query.reshape(self._q_shape)
        if q.dtype != self._dtype:
            q = q.to(self._dtype)
        is_twice = q.shape[2] == 1 and is_slow_with_one_row(q.dtype)
        if is_twice:
            q = q.expand(-1, -1, 2, -1)
        out, lse = flash(q, k.narrow(2, 0, held), v.narrow(2, 0, held), 0.0, False, scale=scale)
        if len(self._slices[index]) > 1:
            outs, lses = [out], [lse]
            for k, v in self._slices[index][1:]:
                out, lse = flash(q.expand(k.shape[0], -1, -1, -1), k, v, 0.0, False, scale=scale)
                outs.append(out)
                lses.append(lse)
            out, lse = torch.cat(outs), torch.cat(lses)
        if is_twice:
            out, lse = out.narrow(2, 0, 1), lse.narrow(2, 0, 1)
        if len(out) > 1:
            out = weigh(out, lse.permute(1, 2, 0).softmax(-1))
        out = out.reshape(1, 1, query.shape[1], query.shape[3])
        return out if out.dtype == query.dtype else out.to(query.dtype)
