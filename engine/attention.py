"""The attention function under Hugging Face models: writes new K/V into pages, attends over a lease, merges what streams.

One step's metadata travel in a context variable, because some decoders drop keyword arguments. The last layer's
attention feeds only logits, so it is computed for the rows whose logits are read and for no others (its K/V are always
written): exact, and for a chunk of a long prompt it saves that layer's attention altogether.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import apply_sink_logits, block_attention, layer_views, merge_states, paged_attention, write_kv
from ..pager.lease import Lease
from ..pager.pager import Pager
from .hf import ModelSpec

NAME = "kvtier_paged"


@dataclass(slots=True)
class Step:
    """What the attention of one forward pass needs: the lease, the pools, and whose logits are read."""

    lease: Lease
    spec: ModelSpec
    pools: list[Tensor]  # per group, typed [pages, block elements]
    block_size: int
    read_spans: list[int]  # spans whose last row's logits are read
    row_views: Any  # (group, staged rows) -> typed tensor
    cu_q: np.ndarray[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.cu_q = self.lease.cu_q

    @property
    def rows(self) -> Tensor:
        """Packed rows whose logits are read."""
        return torch.tensor([int(self.cu_q[i + 1]) - 1 for i in self.read_spans], dtype=torch.long)


STEP: contextvars.ContextVar[Step | None] = contextvars.ContextVar("kvtier_step", default=None)


def register() -> None:
    """Make the function known to transformers. No mask function is registered under its name: masks stay None."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged)


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
    group, layer = step.spec.group_of[module.layer_idx]
    shape = step.spec.groups[group]
    k, v = layer_views(step.pools[group], layer, shape.num_kv_heads, step.block_size, shape.head_dim, shape.value_dim)
    write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k, v, step.lease.slots[group])
    q = query[0].transpose(0, 1)
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    if module.layer_idx < len(step.spec.layers) - 1:
        out = _attend(step, group, layer, q, k, v, None, scale, softcap, s_aux)
    else:
        out = q.new_zeros(*q.shape[:2], shape.value_dim)
        if step.read_spans:
            rows = step.rows.to(q.device)
            out[rows] = _attend(step, group, layer, q[rows], k, v, step.read_spans, scale, softcap, s_aux)
    return out[None].to(query.dtype).contiguous(), None


def _attend(
    step: Step,
    group: int,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    last_rows_of: list[int] | None,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Resident pages in one pass, staged slices one by one, merged by LSE; sink logits at the very end."""
    held, shape = step.lease.groups[group], step.spec.groups[group]
    tables, lens, cu_q = held.tables, held.kv_lens, step.cu_q
    if last_rows_of is not None:  # one row each, the last of its span
        tables, lens = tables[last_rows_of], lens[last_rows_of]
        cu_q = np.arange(len(last_rows_of) + 1, dtype=np.int32)
    kind: dict[str, Any] = dict(scale=scale, softcap=softcap, out_dtype=torch.float32)
    out, lse = paged_attention(q, k, v, tables, lens, cu_q, window=shape.window, **kind)
    if held.stream is not None:
        for staged in step.lease.stream(group, layer):
            rows = step.row_views(group, staged.rows)
            sk, sv = layer_views(rows, 0, shape.num_kv_heads, step.block_size, shape.head_dim, shape.value_dim)
            out, lse = merge_states(out, lse, *block_attention(q, sk, sv, **kind))
    if s_aux is not None:
        out = apply_sink_logits(out, lse, s_aux)
    return out


def typed(rows: Any, dtype: torch.dtype) -> Tensor:
    """Rows of bytes (numpy, or a CUDA tensor) as a typed tensor over the same memory."""
    tensor = rows if isinstance(rows, Tensor) else torch.from_numpy(rows)
    return tensor.view(dtype)


def pools_of(pager: Pager, dtype: torch.dtype) -> list[Tensor]:
    return [typed(pager.device_rows(group), dtype) for group in range(len(pager.layouts))]
