"""Dispatch: the names of this package; checks what is handed in and takes the CPU path or the Triton kernels.

A CUDA tensor goes to Triton, a CPU tensor to torch's CPU kernels; nothing else decides. Outputs never share memory with
inputs. Each function has a float64 twin of the same name in `reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import cpu
from .checks import (
    IntArray,
    check_cache,
    check_rows,
    check_states,
    check_unique,
    check_window,
    is_debug,
    to_host,
)
from .grad import without_grad
from .plan import SlotPlan, StepPlan
from .uploads import to_device

if TYPE_CHECKING:
    from .cpu_step import DecodeStep

__all__ = [
    "SlotPlan",
    "StepPlan",
    "apply_sink_logits",
    "block_attention",
    "copy_blocks",
    "gather_rows",
    "merge_many",
    "merge_states",
    "paged_attention",
    "paged_decode",
    "paged_prefill",
    "plan_decode",
    "plan_slots",
    "plan_step",
    "scatter_rows",
    "write_kv",
]


def plan_step(k: Tensor, block_table: IntArray, kv_lens: IntArray, cu_q: IntArray) -> StepPlan:
    """Check a step's tables once, to be passed as `plan` to the attention of every layer of the same group.

    Cost: on a GPU without a plan, each layer checks and copies the tables again.
    """
    return StepPlan(block_table, kv_lens, cu_q, block_size=k.shape[2], num_pages=k.shape[0])


def plan_slots(k: Tensor, slots: IntArray, num_tokens: int) -> SlotPlan:
    """Check a step's slot mapping once, to be passed to write_kv of every layer of the same group."""
    return SlotPlan(slots, num_tokens=num_tokens, num_slots=k.shape[0] * k.shape[2])


def plan_decode(
    k: Tensor,
    v: Tensor,
    plan: StepPlan,
    slots: SlotPlan,
    *,
    query_heads: int,
    window: int | None = None,
    sinks: int = 0,
) -> DecodeStep | None:
    """Bind a step of one row per sequence to the pages of a whole layer group: its layers then make fewer calls.

    None where paged_attention and write_kv are the way, layer by layer: on a GPU, for longer spans, for widths or dtypes
    that torch's CPU flash kernel does not take.

    Shapes: k [pages, layers, Hkv, block, D], v likewise, as stacked_views gives them.
    Raises: ValueError for a plan of other pages.
    """
    check_window(window, sinks)
    if k.is_cuda:
        return None
    _check_plan(plan, plan.num_tokens, k[:, 0])
    if slots.num_slots > k.shape[0] * k.shape[3]:
        raise ValueError(f"the plan covers {slots.num_slots} slots, the pool has {k.shape[0] * k.shape[3]}")
    from .cpu_step import plan_decode as plan_on_cpu

    return plan_on_cpu(k, v, plan, slots, group=query_heads // k.shape[2], window=window, sinks=sinks)


@without_grad
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    plan: StepPlan | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend a packed batch of decodes and prefill chunks to the pages of their sequences, causally.

    Row i of sequence s sits at position kv_len - q_len + i and sees the keys up to its own; under a window W also only
    keys less than W behind it, and the first `sinks` ones.

    Shapes: q [T, Hq, D]; k [pages, Hkv, block, D], v [pages, Hkv, block, Dv], strided views; block_table
            [n, max_blocks], compact; kv_lens [n], new tokens included; cu_q [n + 1]; out [T, Hq, Dv] in out_dtype
            (default: q's); lse [T, Hq], float32, nats. Host arrays for the integers are best everywhere. Without
            `with_lse` nobody looks at lse: it may be empty, which saves a CPU's decode step some calls per layer.
    Raises: ValueError for shapes that do not fit and for block table entries outside the pool (on a GPU, for
            tables that lie there: only under KVTIER_DEBUG=1).
    """
    check_cache(q, k, v)
    check_window(window, sinks)
    plan = plan or plan_step(k, block_table, kv_lens, cu_q)
    _check_plan(plan, q.shape[0], k)
    kind: dict[str, Any] = dict(
        scale=scale, window=window, sinks=sinks, softcap=softcap or None, out_dtype=out_dtype or q.dtype
    )
    if q.is_cuda:
        from . import triton_attention

        return triton_attention.paged_attention(q, k, v, plan, **kind)
    return cpu.paged_attention(q, k, v, plan, **kind, with_lse=with_lse)


@without_grad
def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: IntArray,
    kv_lens: IntArray,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend one query row per sequence to its pages; a kv_len of 0 gives zeros and -inf.

    Shapes: q [n, Hq, D]; otherwise as paged_attention.
    """
    check_cache(q, k, v)
    check_window(window, sinks)
    lengths = to_host(kv_lens)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"kv_lens must be [{q.shape[0]}], one per row of q, got {lengths.shape}")
    has_keys = lengths > 0
    if not has_keys.all():
        return _decode_with_gaps(
            q, k, v, to_host(block_table), lengths, has_keys,
            scale=scale, window=window, sinks=sinks, softcap=softcap, out_dtype=out_dtype,
        )  # fmt: skip
    return paged_attention(
        q, k, v, block_table, lengths, np.arange(len(lengths) + 1),
        scale=scale, window=window, sinks=sinks, softcap=softcap, out_dtype=out_dtype,
    )  # fmt: skip


def _decode_with_gaps(
    q: Tensor, k: Tensor, v: Tensor, table: np.ndarray, lengths: np.ndarray, has_keys: np.ndarray, **kind: Any
) -> tuple[Tensor, Tensor]:
    """Decode only the sequences that have keys."""
    kept = to_device(np.flatnonzero(has_keys), q.device)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[3], dtype=kind["out_dtype"] or q.dtype)
    lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
    if len(kept):
        out[kept], lse[kept] = paged_decode(q[kept], k, v, table[has_keys], lengths[has_keys], **kind)
    return out, lse


@without_grad
def paged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: IntArray,
    kv_lens: IntArray,
    cu_q: IntArray,
    *,
    scale: float,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend prefill chunks to the pages of their sequences; as paged_attention, which sends single rows elsewhere."""
    check_cache(q, k, v)
    check_window(window, sinks)
    plan = plan_step(k, block_table, kv_lens, cu_q)
    _check_plan(plan, q.shape[0], k)
    kind: dict[str, Any] = dict(
        scale=scale, window=window, sinks=sinks, softcap=softcap or None, out_dtype=out_dtype or q.dtype
    )
    if q.is_cuda:
        from . import triton_attention

        return triton_attention.paged_prefill(q, k, v, plan, **kind)
    return cpu.paged_attention(q, k, v, plan, **kind)


@without_grad
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    pages: IntArray | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend every query row to every token of whole blocks: the staged blocks of a streamed context.

    Shapes: q [T, Hq, D]; k [m, Hkv, block, D], v [m, Hkv, block, Dv], strided views; pages names those to read, each
            once, all unless given; none gives zeros and -inf; out [T, Hq, Dv] in out_dtype (default: q's);
            lse [T, Hq], float32, nats.
    """
    check_cache(q, k, v)
    ids = np.arange(k.shape[0]) if pages is None else to_host(pages)
    check_rows(k[:, 0, 0], ids, "pages")
    kind: dict[str, Any] = dict(scale=scale, softcap=softcap or None, out_dtype=out_dtype or q.dtype)
    if q.is_cuda:
        from . import triton_attention

        return triton_attention.block_attention(q, k, v, ids, **kind)
    return cpu.block_attention(q, k, v, ids, **kind)


@without_grad
def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint key sets as if computed at once.

    Shapes: out_* [tokens, heads, head_dim]; lse_* [tokens, heads], float32. The result has out_a's dtype.
    Units:  lse in nats. A side with no keys has lse = -inf and is ignored; two such sides give zeros, -inf.
    Raises: ValueError when the two sides differ in shape.
    Source: FlashAttention (arXiv 2205.14135), block-wise softmax.
    """
    check_states(out_a, lse_a, "first state")
    check_states(out_b, lse_b, "second state")
    if out_a.shape != out_b.shape:
        raise ValueError(f"states differ in shape: {tuple(out_a.shape)} and {tuple(out_b.shape)}")
    if out_a.is_cuda:
        from . import triton_merge

        return triton_merge.merge_states(out_a, lse_a, out_b, lse_b)
    return cpu.merge_states(out_a, lse_a, out_b, lse_b)


@without_grad
def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over P disjoint key sets as if computed at once.

    Shapes: outs [P, T, H, D]; lses [P, T, H], float32; out [T, H, D] in outs' dtype; lse [T, H].
    """
    check_states(outs, lses, "states")
    if outs.dim() != 4:
        raise ValueError(f"outs must be [parts, tokens, heads, dim], got {tuple(outs.shape)}")
    if outs.is_cuda:
        from . import triton_merge

        return triton_merge.merge_many(outs, lses)
    return cpu.merge_many(outs, lses)


@without_grad
def apply_sink_logits(out: Tensor, lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Add one learned score per head that has no value (GPT-OSS), after all partial results are merged.

    Shapes: out [T, Hq, Dv]; lse [T, Hq]; sink_logits [Hq]. Returns a new out; a row without keys stays 0.
    """
    check_states(out, lse, "state")
    if sink_logits.shape != lse.shape[1:]:
        raise ValueError(f"sink_logits must be [{lse.shape[1]}], got {tuple(sink_logits.shape)}")
    return (out * torch.sigmoid(lse - sink_logits.float())[..., None]).to(out.dtype)


@without_grad
def write_kv(k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, slots: IntArray | SlotPlan) -> None:
    """Write the K and V of new tokens to their slots, where slot = page * block + offset and -1 writes nothing.

    Shapes: k_new [T, Hkv, D]; v_new [T, Hkv, Dv]; k, v as paged_attention; slots [T], or what plan_slots made of them.
    Raises: ValueError for shapes that do not fit and slots outside the pool; under KVTIER_DEBUG=1 also for a slot
            named twice. (On a GPU, slots that lie there are looked at only under KVTIER_DEBUG=1.)
    """
    if k_new.shape[1:] != (k.shape[1], k.shape[3]) or v_new.shape[1:] != (v.shape[1], v.shape[3]):
        raise ValueError(
            f"new tokens {tuple(k_new.shape)}, {tuple(v_new.shape)} do not fit pages {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len(k_new) != len(v_new):
        raise ValueError(f"{len(k_new)} keys but {len(v_new)} values")
    if not isinstance(slots, SlotPlan):
        slots = plan_slots(k, slots, len(k_new))
    elif slots.num_tokens != len(k_new) or slots.num_slots > k.shape[0] * k.shape[2]:
        raise ValueError(
            f"the plan covers {slots.num_tokens} tokens and {slots.num_slots} slots, got {len(k_new)} tokens and "
            f"{k.shape[0] * k.shape[2]} slots"
        )
    if k.is_cuda:
        from . import triton_cache

        triton_cache.write_kv(k_new, v_new, k, v, slots.on(k.device))
    else:
        cpu.write_kv(k_new, v_new, k, v, slots)


@without_grad
def copy_blocks(source_rows: Tensor, target_rows: Tensor, source_ids: IntArray, target_ids: IntArray) -> None:
    """Copy rows: target_rows[target_ids[i]] = source_rows[source_ids[i]] for all i, in one submission.

    Rows are whole blocks or, as column slices of a pool, one layer of each. Source and target may be one tensor as
    long as no row is both read and written (copy-on-write takes a fresh page).

    Shapes: rows [count, elements] of one dtype and width, last axis dense.
    Raises: ValueError for shapes that do not fit or rows out of range; under KVTIER_DEBUG=1 also for a target named
            twice.
    """
    _copy_rows(source_rows, target_rows, source_ids, target_ids)


@without_grad
def gather_rows(source_rows: Tensor, source_ids: IntArray, out: Tensor | None = None) -> Tensor:
    """Collect rows (whole blocks, or one layer's slice of each) side by side into `out`, made here unless given."""
    if out is None:
        out = source_rows.new_empty(len(source_ids), source_rows.shape[1])
    _copy_rows(source_rows, out, source_ids, None)
    return out


@without_grad
def scatter_rows(source_rows: Tensor, target_rows: Tensor, target_ids: IntArray) -> None:
    """Spread rows that lie side by side to target_rows[target_ids]."""
    _copy_rows(source_rows, target_rows, None, target_ids)


def _copy_rows(
    source_rows: Tensor, target_rows: Tensor, source_ids: IntArray | None, target_ids: IntArray | None
) -> None:
    """Check a copy of rows and send it off; ids None means rows 0, 1, 2, ..."""
    if source_rows.dim() != 2 or target_rows.dim() != 2 or source_rows.shape[1] != target_rows.shape[1]:
        raise ValueError(f"rows of different width: {tuple(source_rows.shape)}, {tuple(target_rows.shape)}")
    if source_rows.dtype != target_rows.dtype:
        raise ValueError(f"rows of different dtype: {source_rows.dtype}, {target_rows.dtype}")
    source = None if source_ids is None else to_host(source_ids)
    target = None if target_ids is None else to_host(target_ids)
    count = len(source if source is not None else target if target is not None else ())
    if source is not None and target is not None and len(source) != len(target):
        raise ValueError(f"{len(source)} source rows for {len(target)} target rows")
    for rows, ids, what in ((source_rows, source, "source_ids"), (target_rows, target, "target_ids")):
        if ids is not None:
            check_rows(rows, ids, what)
        elif len(rows) < count:
            raise ValueError(f"{count} rows named, {len(rows)} given to go with {what}")
    if is_debug() and target is not None:
        check_unique(target, "target_ids")
    if count == 0 or source_rows.shape[1] == 0:
        return
    if source_rows.is_cuda:
        from . import triton_cache

        triton_cache.copy_rows(source_rows, target_rows, source, target, count)
    else:
        cpu.copy_rows(source_rows[:count] if source is None else source_rows, target_rows, source, target)


def _check_plan(plan: StepPlan, num_tokens: int, k: Tensor) -> None:
    """Check that a plan was made for this step and this pool."""
    if plan.num_tokens != num_tokens or plan.block_size != k.shape[2] or plan.num_pages > k.shape[0]:
        raise ValueError(
            f"cu_q (or the plan) covers {plan.num_tokens} rows on {plan.num_pages} pages of {plan.block_size} tokens, "
            f"got {num_tokens} rows on {k.shape[0]} pages of {k.shape[2]}"
        )
