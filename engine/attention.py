"""The attention function under Hugging Face models: writes new K/V into pages, attends over a lease, merges what streams.

One step's metadata travel in a context variable, because some decoders drop keyword arguments. The last layer's
attention feeds only logits, so it is computed for the rows whose logits are read and for no others (its K/V are always
written): exact, and for a chunk of a long prompt it saves that layer's attention altogether.
"""

from __future__ import annotations

import contextvars
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import (
    SlotPlan,
    StepPlan,
    apply_sink_logits,
    block_attention,
    layer_views,
    merge_states,
    paged_attention,
    plan_slots,
    plan_step,
    write_kv,
)
from ..pager.lease import Lease
from ..pager.pager import Pager
from .hf import LayerSpec, ModelSpec

NAME = "kvtier_paged"


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Where one layer's K and V lie in the device pool: [pages, kv_heads, block, dim] each."""

    group: int
    layer: int  # its number within the group
    k: Tensor
    v: Tensor


@dataclass(slots=True)
class Step:
    """What the attention of one forward pass needs: the lease, where the layers lie, and whose logits are read."""

    lease: Lease
    spec: ModelSpec
    layers: list[LayerPages]
    block_size: int
    dtype: torch.dtype
    reads: list[tuple[int, int]]  # (span, how many of its last rows' logits are read)
    rows: Tensor = field(init=False)  # packed rows whose logits are read
    reads_all: bool = field(init=False)
    _plans: dict[tuple[int, bool], StepPlan] = field(default_factory=dict)
    _slots: dict[int, SlotPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = self.lease.cu_q[1:].tolist()
        rows = [np.arange(ends[span] - count, ends[span]) for span, count in self.reads]
        self.rows = torch.from_numpy(np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64))
        self.reads_all = len(self.rows) == int(self.lease.cu_q[-1])

    def plan(self, pages: LayerPages, *, last_rows: bool) -> StepPlan:
        """The tables of a group, for all rows or for the last rows of the spans that are read. Made once per step."""
        key = (pages.group, last_rows)
        if key not in self._plans:
            held, cu_q = self.lease.groups[pages.group], self.lease.cu_q
            tables, lens = held.tables, held.kv_lens
            if last_rows:
                spans = [span for span, _ in self.reads]
                tables, lens = tables[spans], lens[spans]
                cu_q = np.cumsum([0, *(count for _, count in self.reads)], dtype=np.int32)
            self._plans[key] = plan_step(pages.k, tables, lens, cu_q)
        return self._plans[key]

    def slots(self, pages: LayerPages) -> SlotPlan:
        """The slot mapping of a group. Made once per step."""
        if pages.group not in self._slots:
            slots = self.lease.slots[pages.group]
            self._slots[pages.group] = plan_slots(pages.k, slots, len(slots))
        return self._slots[pages.group]


STEP: contextvars.ContextVar[Step | None] = contextvars.ContextVar("kvtier_step", default=None)


_INSTALLED: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()  # engines, attention before


def install(model: Any) -> None:
    """Switch a model to paged attention. No mask function is registered under our name: masks stay None."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged)
    engines, before = _INSTALLED.get(model, (0, model.config._attn_implementation))
    _INSTALLED[model] = engines + 1, before
    model.set_attn_implementation(NAME)


def uninstall(model: Any) -> None:
    """Give a model the attention back that it had before its first engine, when its last one ends."""
    engines, before = _INSTALLED[model]
    if engines > 1:
        _INSTALLED[model] = engines - 1, before
    else:
        del _INSTALLED[model]
        model.set_attn_implementation(before)


def paged(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Shapes: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv], new tokens only; out [1, T, Hq, Dv]."""
    step = STEP.get()
    if step is None or attention_mask is not None:
        raise RuntimeError("kvtier attention runs only inside an Engine step, without a mask")
    pages = step.layers[module.layer_idx]
    write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), pages.k, pages.v, step.slots(pages))
    q = query[0].transpose(0, 1)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    if step.reads_all or module.layer_idx < len(step.layers) - 1:
        out = _attend(step, pages, q, scale, softcap, s_aux, last_rows=False)
    else:
        out = q.new_zeros(*q.shape[:2], pages.v.shape[3])
        if step.reads:
            rows = step.rows.to(q.device)
            out[rows] = _attend(step, pages, q[rows], scale, softcap, s_aux, last_rows=True).to(q.dtype)
    return out[None].to(query.dtype).contiguous(), None


def _attend(
    step: Step,
    pages: LayerPages,
    q: Tensor,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
    *,
    last_rows: bool,
) -> Tensor:
    """Resident pages in one pass, staged slices one by one, merged by LSE; sink logits at the very end."""
    held, shape = step.lease.groups[pages.group], step.spec.groups[pages.group]
    plan = step.plan(pages, last_rows=last_rows)
    kind: dict[str, Any] = dict(scale=scale, softcap=softcap, out_dtype=torch.float32)
    out, lse = paged_attention(
        q, pages.k, pages.v, (), (), (), window=shape.window, sinks=shape.sinks, plan=plan, **kind
    )
    if held.stream is not None:
        for staged in step.lease.stream(pages.group, pages.layer):
            k, v = slice_views(shape, typed(staged.rows, step.dtype), step.block_size)
            out, lse = merge_states(out, lse, *block_attention(q, k, v, **kind))
    if s_aux is not None:
        out = apply_sink_logits(out, lse, s_aux)
    return out


def slice_views(shape: LayerSpec, rows: Tensor, block_size: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """K and V of one layer in rows of typed elements: whole blocks, or (layer 0) slices of one layer each."""
    return layer_views(rows, layer, shape.num_kv_heads, block_size, shape.head_dim, shape.value_dim)


def typed(rows: Any, dtype: torch.dtype) -> Tensor:
    """Rows of bytes (numpy, or a CUDA tensor) as a typed tensor over the same memory."""
    tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
    return tensor.view(dtype)


def layers_of(pager: Pager, spec: ModelSpec, dtype: torch.dtype) -> list[LayerPages]:
    """For each attention layer of the model its views of the device pool; the pool never moves."""
    pools = [typed(pager.device_rows(group), dtype) for group in range(len(pager.layouts))]
    return [
        LayerPages(group, layer, *slice_views(spec.groups[group], pools[group], pager.block_size, layer))
        for group, layer in spec.group_of
    ]
