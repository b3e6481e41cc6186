"""A step's attention on a GPU: sends single rows to the decode kernel and chunks to the prefill kernel.

Everything here is host work on a plan that is made once per step; the kernels are queued on the current stream and
nothing waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import triton_decode, triton_prefill
from .plan import StepPlan
from .uploads import to_device

FEW_ROWS = 4  # up to here, rows over the same blocks read them each for themselves: the splits fill the GPU


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, *,
    scale: float, window: int | None, sinks: int, softcap: float | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend a packed batch of decodes and chunks; arguments are checked by the caller."""
    out, lse = _outputs(q, v, out_dtype)
    is_single = plan.q_lens == 1
    _decode(q, k, v, plan, np.flatnonzero(is_single), out, lse, scale, window, sinks, softcap)
    if not is_single.all():
        _prefill(q, k, v, plan, "chunks", np.where(is_single, 0, plan.q_lens), out, lse, scale, window, sinks, softcap)
    return out, lse


def paged_prefill(
    q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, *,
    scale: float, window: int | None, sinks: int, softcap: float | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend a packed batch with the prefill kernel only."""
    out, lse = _outputs(q, v, out_dtype)
    _prefill(q, k, v, plan, "all", plan.q_lens, out, lse, scale, window, sinks, softcap)
    return out, lse


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, pages: np.ndarray, *, scale: float, softcap: float | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend every row to every token of these pages."""
    out, lse = _outputs(q, v, out_dtype)
    tokens, blocks, block = q.shape[0], len(pages), k.shape[2]
    if tokens == 0 or blocks == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    table = to_device(pages, q.device, torch.int32)[None]
    if tokens <= FEW_ROWS:
        lengths = torch.full((tokens,), blocks * block, dtype=torch.int32, device=q.device)
        triton_decode.paged_decode(
            _dense(q), k, v, table.expand(tokens, -1), lengths, out, lse,
            scale=scale, longest=blocks * block, softcap=softcap,
        )  # fmt: skip
        return out, lse
    shape = triton_prefill.shape_of(q, k, v)
    starts = torch.arange(0, tokens, shape["TOKENS"], dtype=torch.int32, device=q.device)
    triton_prefill.paged_prefill(
        _dense(q), k, v, table, torch.full((1,), blocks * block, dtype=torch.int32, device=q.device),
        torch.arange(0, 2 * tokens, tokens, dtype=torch.int32, device=q.device), (torch.zeros_like(starts), starts),
        out, lse, scale=scale, softcap=softcap, causal=False,
    )  # fmt: skip
    return out, lse


def _outputs(q: Tensor, v: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=out_dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _dense(q: Tensor) -> Tensor:
    """Make the last axis dense; other strides are the kernels' business."""
    return q if q.stride(2) == 1 else q.contiguous()


def _decode(
    q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, sequences: np.ndarray, out: Tensor, lse: Tensor,
    scale: float, window: int | None, sinks: int, softcap: float | None,
) -> None:  # fmt: skip
    """Decode the sequences that have one row."""
    if not len(sequences):
        return
    device, longest = q.device, int(plan.kv_lens[sequences].max())
    table = plan.table_on(device)
    lengths = plan.on(device, "decode_lens", plan.kv_lens[sequences])
    if len(sequences) == len(plan.kv_lens):
        triton_decode.paged_decode(
            _dense(q), k, v, table, lengths, out, lse,
            scale=scale, longest=longest, window=window, sinks=sinks, softcap=softcap,
        )  # fmt: skip
        return
    rows = plan.on(device, "decode_rows", plan.cu_q[sequences])
    picked = q.index_select(0, rows)
    some_out, some_lse = out.new_empty(len(sequences), *out.shape[1:]), lse.new_empty(len(sequences), lse.shape[1])
    triton_decode.paged_decode(
        _dense(picked), k, v, table.index_select(0, plan.on(device, "decode_sequences", sequences)), lengths,
        some_out, some_lse, scale=scale, longest=longest, window=window, sinks=sinks, softcap=softcap,
    )  # fmt: skip
    out.index_copy_(0, rows.long(), some_out)
    lse.index_copy_(0, rows.long(), some_lse)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, plan: StepPlan, name: str, q_lens: np.ndarray, out: Tensor, lse: Tensor,
    scale: float, window: int | None, sinks: int, softcap: float | None,
) -> None:  # fmt: skip
    """Run the prefill kernel over the sequences whose q_lens is not 0."""
    shape = triton_prefill.shape_of(q, k, v)
    sequence, start = triton_prefill.cut_tiles(q_lens, shape["TOKENS"])
    key = f"{name}_{shape['TOKENS']}"
    tiles = plan.on(q.device, f"{key}_sequence", sequence), plan.on(q.device, f"{key}_start", start)
    triton_prefill.paged_prefill(
        _dense(q), k, v, plan.table_on(q.device), plan.on(q.device, "kv_lens", plan.kv_lens),
        plan.on(q.device, "cu_q", plan.cu_q), tiles, out, lse,
        scale=scale, window=window, sinks=sinks, softcap=softcap,
    )  # fmt: skip
