"""The attention function under Hugging Face models: writes new K/V into pages, attends over a lease, merges what streams.

One step's metadata travel in a context variable, because some decoders drop keyword arguments. The last layer's
attention feeds only logits, so it is computed for the rows whose logits are read and for no others (its K/V are always
written): exact, and for a chunk of a long prompt it saves that layer's attention altogether.
"""

from __future__ import annotations

import contextvars
import functools
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import (
    ChunkedAttention,
    DecodeStep,
    SlotPlan,
    StepPlan,
    apply_sink_logits,
    beside_copies,
    block_attention,
    layer_views,
    merge_states,
    paged_attention,
    plan_decode,
    plan_slots,
    plan_step,
    stacked_views,
    to_device,
    write_kv,
)
from ..pager.lease import Lease
from ..pager.pager import Pager
from ..pager.streaming import Staged
from ..tiers.formats import tail_of
from ..tiers.streams import IntArray
from .hf import LayerSpec, ModelSpec
from .packed import PackedPages, PackedStep, Rows, attend_blocks

if TYPE_CHECKING:
    from .mass import StepMass
    from .modes import Parts

NAME = "kvtier_paged"


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Where one layer's K and V lie in the device pool: [pages, kv_heads, block, dim] each.

    Of a packed group these are the pages of its tail, `group` is that of the tail, and `packed` says where the rest lies.
    """

    group: int
    layer: int  # its number within the group
    k: Tensor
    v: Tensor
    shape: LayerSpec
    stack: tuple[Tensor, Tensor]  # of all layers of the group: [pages, layers, kv_heads, block, dim] each
    staged_k: Tensor | None = None  # and where slices of it are staged: [rows, kv_heads, block, dim]
    staged_v: Tensor | None = None
    host_k: Tensor | None = None  # and host slots of it that are read in place: [slots, kv_heads, block, dim]
    host_v: Tensor | None = None
    packed: PackedPages | None = None
    heads: Tensor | None = None  # KV heads that are here; None: all
    query_heads: Tensor | None = None  # and those that read them

    @property
    def context_group(self) -> int:
        """The group that holds all but the newest tokens."""
        return self.group if self.packed is None else self.packed.group


@dataclass
class Step:
    """What the attention of one forward pass needs: the lease, where the layers lie, and whose logits are read."""

    lease: Lease
    spec: ModelSpec
    layers: list[list[LayerPages]]  # of each layer its parts: one, or some of its heads each
    block_size: int
    dtype: torch.dtype
    reads: list[tuple[int, int]]  # (span, how many of its last rows' logits are read)
    parts: Parts | None = None  # of a step that sees only a part of its context, or summarises it
    bound: Bound = field(default_factory=dict)  # by group: the last step that was bound to its pages
    mass: StepMass | None = None  # of a step whose attention is sampled
    reads_all: bool = field(init=False)  # the logits of all rows
    _plans: dict[tuple[int, bool], StepPlan] = field(default_factory=dict)
    _slots: dict[int, SlotPlan] = field(default_factory=dict)
    _packed: dict[int, PackedStep] = field(default_factory=dict)
    _decodes: dict[int, DecodeStep | None] = field(default_factory=dict)
    _over_host: dict[int, StepPlan] = field(default_factory=dict)
    _rows_there: Tensor | None = None

    def __post_init__(self) -> None:
        self.reads_all = sum([count for _, count in self.reads]) == int(self.lease.cu_q[-1])

    @functools.cached_property
    def rows(self) -> Tensor:
        """The packed rows whose logits are read."""
        ends = self.lease.cu_q[1:].tolist()
        rows = [np.arange(ends[span] - count, ends[span]) for span, count in self.reads]
        return torch.from_numpy(np.concatenate([*rows, np.empty(0, np.int64)]).astype(np.int64))

    def rows_on(self, device: torch.device) -> Tensor:
        """`rows` on the model's device, copied once per step."""
        if self._rows_there is None:
            self._rows_there = to_device(self.rows, device)
        return self._rows_there

    def plan(self, pages: LayerPages, *, last_rows: bool) -> StepPlan:
        """The tables of a group, for all rows or for the last rows of the spans that are read. Made once per step."""
        key = (pages.group, last_rows)
        if key not in self._plans:
            held, rows = self.lease.groups[pages.group], self.attending(last_rows=last_rows)
            self._plans[key] = plan_step(pages.k, held.tables[rows.spans], held.kv_lens[rows.spans], rows.cu_q)
        return self._plans[key]

    def attending(self, *, last_rows: bool) -> Rows:
        """The rows that attend: all, or those whose logits are read."""
        if not last_rows:
            return Rows(list(range(len(self.lease.spans))), self.lease.cu_q)
        counts = [count for _, count in self.reads]
        return Rows([span for span, _ in self.reads], np.cumsum([0, *counts], dtype=np.int32))

    def slots(self, pages: LayerPages) -> SlotPlan:
        """The slot mapping of a group. Made once per step."""
        if pages.group not in self._slots:
            slots = self.lease.slots[pages.group]
            self._slots[pages.group] = plan_slots(pages.k, slots, len(slots))
        return self._slots[pages.group]

    def over_host(self, pages: LayerPages, slots: IntArray) -> StepPlan:
        """One row over the whole blocks in these host slots, the same of every layer of a group. Made once per step."""
        if pages.group not in self._over_host:
            assert pages.host_k is not None
            num_tokens = len(slots) * self.block_size
            self._over_host[pages.group] = plan_step(pages.host_k, slots[None], [num_tokens], [0, 1])
        return self._over_host[pages.group]

    def packed(self, pages: LayerPages) -> PackedStep:
        """What is packed of a group. Made once per step."""
        if pages.group not in self._packed:
            self._packed[pages.group] = PackedStep(self.lease, pages.context_group, pages.group, self.block_size)
        return self._packed[pages.group]

    def write(self, pages: LayerPages, k: Tensor, v: Tensor) -> None:
        """New K and V [tokens, kv_heads, dim] of one layer; blocks that they make whole are packed where that is asked for."""
        write_kv(k, v, pages.k, pages.v, self.slots(pages))
        if pages.packed is not None:
            self.packed(pages).fill(pages.packed, pages.k, pages.v)

    def check(self) -> None:
        """To be called when all layers are written. Raises UnpackableError for blocks that their format cannot hold."""
        for packed in self._packed.values():
            packed.check()

    def decode(self, pages: LayerPages) -> DecodeStep | None:
        """The step bound to a group's pages, where each sequence has one row and sees all that is resident. Made once."""
        if pages.group not in self._decodes:
            self._decodes[pages.group] = self._plan_decode(pages)
        return self._decodes[pages.group]

    def _plan_decode(self, pages: LayerPages) -> DecodeStep | None:
        parts, copies = self.parts or _WHOLE, self.lease.groups[pages.group].copies
        if pages.packed is not None or copies or parts.selected is not None or parts.summarizer is not None:
            return None
        if not self.reads_all or int(self.lease.cu_q[-1]) != len(self.lease.spans):
            return None
        held, rule = self.lease.groups[pages.group], self.retention(pages)
        last = self.bound.pop(pages.group, None)
        if last is not None and last[0] == rule and last[1].follow(held.tables, held.kv_lens, held.slots):
            self.bound[pages.group] = last
            return last[1]
        plan, heads, (window, sinks) = self.plan(pages, last_rows=False), pages.shape.num_heads, rule
        step = plan_decode(*pages.stack, plan, self.slots(pages), query_heads=heads, window=window, sinks=sinks)
        if step is not None:
            self.bound[pages.group] = rule, step
        return step

    def retention(self, pages: LayerPages) -> tuple[int | None, int]:
        """Window and sinks of a group: its own, or those that the step's requests asked for."""
        shape, parts = pages.shape, self.parts or _WHOLE
        return (parts.window, parts.sinks) if shape.window is None else (shape.window, shape.sinks)


Bound = dict[int, tuple[tuple[int | None, int], DecodeStep]]  # with the retention rule that it was bound under
STEP: contextvars.ContextVar[Step | None] = contextvars.ContextVar("kvtier_step", default=None)


_INSTALLED: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()  # engines, attention before


class _Whole:
    """What a step is that sees its whole context."""

    window = selected = summarizer = None
    sinks = 0


_WHOLE = _Whole()


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
    here = step.layers[module.layer_idx]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind: dict[str, Any] = dict(scale=scale, softcap=softcap, is_last=module.layer_idx == len(step.layers) - 1)
    if len(here) == 1:
        return _over_pages(step, here[0], query, key, value, s_aux, **kind), None
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for pages in here:
        rows = pages.query_heads
        assert pages.heads is not None and rows is not None
        q, k, v = query.index_select(1, rows), key.index_select(1, pages.heads), value.index_select(1, pages.heads)
        out[:, :, rows] = _over_pages(step, pages, q, k, v, None if s_aux is None else s_aux[rows], **kind)
    return out, None


def _over_pages(
    step: Step,
    pages: LayerPages,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    s_aux: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    is_last: bool,
) -> Tensor:
    """As `paged`, of a layer, or of those of its heads whose pages these are."""
    if softcap is None and s_aux is None and (bound := step.decode(pages)) is not None:
        out = bound.layer(pages.layer, query, key, value, scale)
        if step.mass is not None:
            step.mass.note(pages, query[0].transpose(0, 1), scale, None)
        return out
    step.write(pages, key[0].transpose(0, 1), value[0].transpose(0, 1))
    q = query[0].transpose(0, 1)
    if step.mass is not None:
        step.mass.note(pages, q, scale, softcap)
    if step.parts is not None and step.parts.summarizer is not None:
        step.parts.summarizer.resident(pages)
    is_selected = step.parts is not None and step.parts.selected is not None  # its rows choose together
    if step.reads_all or is_selected or not is_last:
        out = _attend(step, pages, q, scale, softcap, s_aux, last_rows=False)
    else:
        out = q.new_zeros(*q.shape[:2], pages.v.shape[3])
        if step.reads:
            rows = step.rows_on(q.device)
            out[rows] = _attend(step, pages, q[rows], scale, softcap, s_aux, last_rows=True).to(q.dtype)
    return out[None].to(query.dtype).contiguous()


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
    held, parts = step.lease.groups[pages.context_group], step.parts or _WHOLE
    if held.selection is not None and parts.selected is not None:
        out, lse = parts.selected.attend(pages, q, scale, softcap)
        return out if s_aux is None else apply_sink_logits(out, lse, s_aux)
    plan = step.plan(pages, last_rows=last_rows)
    window, sinks = step.retention(pages)
    kind: dict[str, Any] = dict(scale=scale, softcap=softcap)
    rules: dict[str, Any] = dict(window=window, sinks=sinks, plan=plan, out_dtype=torch.float32, **kind)
    over_pages = functools.partial(paged_attention, q, pages.k, pages.v, (), (), (), **rules)
    if pages.packed is not None:
        out, lse = _attend_packed(step, pages, q, plan, last_rows=last_rows, window=window, sinks=sinks, **kind)
    elif held.stream is None:
        out, lse = over_pages(with_lse=s_aux is not None)
    else:
        with beside_copies(q) if held.stream.has_copies else nullcontext():
            running = ChunkedAttention(q, **kind)
            running.add_result(*over_pages())
            _attend_staged(step, pages, q, running, **kind)
            out, lse = running.result()
    if s_aux is not None:
        out = apply_sink_logits(out, lse, s_aux)
    return out


def _attend_packed(
    step: Step, pages: LayerPages, q: Tensor, plan: StepPlan, *, last_rows: bool, **kind: Any
) -> tuple[Tensor, Tensor]:
    """Packed blocks, the tail behind them, and packed slices that are staged."""
    assert pages.packed is not None
    held, rows = step.packed(pages), step.attending(last_rows=last_rows)
    out, lse = held.attend(pages, q, rows, plan, out_dtype=torch.float32, **kind)
    stream, fmt = step.lease.groups[pages.packed.group].stream, pages.packed.fmt
    if stream is None:
        return out, lse
    with beside_copies(q) if stream.has_copies else nullcontext():
        for source, ids, _ in _stream(step, pages, pages.packed.staged, pages.packed.host):
            part = attend_blocks(fmt, source, ids, q, scale=kind["scale"], softcap=kind["softcap"])
            out, lse = merge_states(out, lse, *part)
    return out, lse


def _attend_staged(step: Step, pages: LayerPages, q: Tensor, running: ChunkedAttention, **kind: Any) -> None:
    """Add the slices that are streamed: those in host slots at once, those that are staged chunk after chunk."""
    for k, ids, staged in _stream(step, pages, pages.staged_k, pages.host_k):
        if staged.slots is None:
            assert pages.staged_v is not None
            running.add(*(views.narrow(0, staged.start, staged.count) for views in (k, pages.staged_v)))
            continue
        assert pages.host_v is not None
        kind |= dict(out_dtype=torch.float32)
        if len(q) == 1:  # sees all of them, so it is as good as their last row
            plan = step.over_host(pages, ids)
            running.add_result(*paged_attention(q, k, pages.host_v, (), (), (), plan=plan, **kind))
        else:
            running.add_result(*block_attention(q, k, pages.host_v, pages=ids, **kind))


def _stream(
    step: Step, pages: LayerPages, ring: Tensor | None, host: Tensor | None
) -> Iterator[tuple[Tensor, IntArray, Staged]]:
    """The slices of one layer that are streamed: where they are, in the ring or in host slots, and which rows of that.

    Summarised, where that is asked for, when used.
    """
    summarizer = (step.parts or _WHOLE).summarizer
    for staged in step.lease.stream(pages.context_group, pages.layer):
        source, ids = (ring, staged.ring_rows) if staged.slots is None else (host, staged.slots)
        assert source is not None
        yield source, ids, staged
        if summarizer is not None:
            summarizer.staged(pages, staged.places, source, ids)


def slice_views(shape: LayerSpec, rows: Tensor, block_size: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """K and V of one layer in rows of typed elements: whole blocks, or (layer 0) slices of one layer each."""
    return layer_views(rows, layer, shape.num_kv_heads, block_size, shape.head_dim, shape.value_dim)


def typed(rows: Any, dtype: torch.dtype) -> Tensor:
    """Rows of bytes (numpy, or a CUDA tensor) as a typed tensor over the same memory."""
    tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
    return tensor.view(dtype)


def layers_of(pager: Pager, spec: ModelSpec, dtype: torch.dtype) -> list[list[LayerPages]]:
    """For each attention layer of the model, or its parts, views of the device pool; the pool never moves."""
    layouts, size = pager.layouts, pager.block_size
    dtypes = [torch.uint8 if layout.is_packed else dtype for layout in layouts]
    pools = [typed(pager.device_rows(group), dtypes[group]) for group in range(len(layouts))]
    rings, hosts = (
        [None if (rows := rows_of(group)) is None else typed(rows, dtypes[group]) for group in range(len(layouts))]
        for rows_of in (pager.staging_rows, pager.readable_host_rows)
    )
    news = [tail_of(layouts, group) for group in range(len(spec.groups))]
    stacks = [
        stacked_views(pools[new], layouts[new].num_layers, shape.num_kv_heads, size, shape.head_dim, shape.value_dim)
        for new, shape in zip(news, spec.groups, strict=True)
    ]

    def pages(group: int, layer: int, heads: tuple[int, ...] | None) -> LayerPages:
        shape, ring, stack, layout = spec.groups[group], rings[group], stacks[group], layouts[group]
        host = hosts[group]
        k, v = (views[:, layer] for views in stack)
        here, readers = (None, None) if heads is None else _heads_on(pools[group].device, heads, shape)
        if not layout.is_packed:
            staged_k, staged_v = (None, None) if ring is None else slice_views(shape, ring, size)
            host_k, host_v = (None, None) if host is None else slice_views(shape, host, size, layer)
            there: Any = dict(staged_k=staged_k, staged_v=staged_v, host_k=host_k, host_v=host_v)
            return LayerPages(group, layer, k, v, shape, stack, **there, heads=here, query_heads=readers)
        packed = PackedPages.of(layout, group, layer, pools[group], ring, host)
        return LayerPages(news[group], layer, k, v, shape, stack, packed=packed, heads=here, query_heads=readers)

    return [[pages(part.group, part.number, part.heads) for part in parts] for parts in spec.parts_of]


def _heads_on(device: torch.device, heads: tuple[int, ...], shape: LayerSpec) -> tuple[Tensor, Tensor]:
    """These KV heads of a layer, and the query heads that read them."""
    group = shape.num_heads // shape.num_kv_heads
    readers = [head * group + i for head in heads for i in range(group)]
    return torch.tensor(heads, device=device), torch.tensor(readers, device=device)
