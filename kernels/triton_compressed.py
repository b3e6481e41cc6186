"""A step's attention on compressed pages on a GPU: what is launched, in how many tiles and splits.

Host work on a plan that is made once per step, as in `triton_attention`; nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
from torch import Tensor

from . import triton_decode, triton_rows
from .cpu_hack import round_rows
from .formats import PageFormat
from .plan import PagesPlan
from .triton_common import needs_rounding, score_factors
from .triton_merge import merge_parts
from .triton_prefill import current_arch, cut_tiles


def compressed_attention(
    q: Tensor, pages: Tensor, fmt: PageFormat, plan: PagesPlan, *, scale: float, window: int | None, sinks: int,
    softcap: float | None, out_dtype: torch.dtype, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend packed rows to compressed blocks; q is [turns, T, Hq, D], arguments are checked by the caller."""
    tokens, query_heads, value_dim = q.shape[1], q.shape[2], fmt.values.dim
    out = torch.empty(tokens, query_heads, value_dim, dtype=out_dtype, device=q.device)
    lse = torch.empty(tokens, query_heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    group = query_heads // fmt.kv_heads
    shape = triton_rows.compressed_shape(fmt, group, int(plan.q_lens.max()) * group, current_arch())
    head_blocks = triton.cdiv(group, shape["HEADS"])
    sequence, start = cut_tiles(plan.q_lens, shape["TOKENS"])
    longest = int(plan.kv_lens.max())
    visible = longest if window is None else min(longest, window + sinks)
    splits = splits or triton_decode.choose_splits(len(start) * fmt.kv_heads * head_blocks, visible, q.device)
    parts, part_lse = out[:, :, None], lse[:, :, None]
    if splits > 1:
        parts = torch.empty(tokens, query_heads, splits, value_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(tokens, query_heads, splits, dtype=torch.float32, device=q.device)
    scale_log2, cap = score_factors(scale, softcap)

    def on(name: str, values: np.ndarray) -> Tensor:
        return plan.on(q.device, f"{name}_{shape['TOKENS']}" if name.startswith("tile") else name, values)

    q, steps = _round_queries(q, fmt) if fmt.is_hack else (q, lse[None])
    table = plan.table_on(q.device).contiguous()
    turns = table if plan.turn_ids is None else on("turn_ids", plan.turn_ids)
    triton_rows.compressed_rows[(len(start), fmt.kv_heads * head_blocks, splits)](
        q, steps, pages, pages.view(torch.float16), table, turns, on("kv_lens", plan.kv_lens), on("ahead", plan.ahead),
        on("cu_q", plan.cu_q), on("tile_sequence", sequence), on("tile_start", start), parts, part_lse, scale_log2, cap,
        q.stride(1), q.stride(2), q.stride(0), steps.stride(1), steps.stride(2), steps.stride(0),
        pages.stride(0), pages.stride(0) // 2, table.stride(0),
        *parts.stride()[:3], *part_lse.stride()[:2], group, head_blocks, **shape,
        TURNS=plan.turn_ids is not None, WINDOW=window or 0, SINKS=sinks if window else 0, SOFTCAP=softcap is not None,
        ROUND=needs_rounding(parts.dtype),
    )  # fmt: skip
    if splits > 1:
        merge_parts(parts.permute(2, 0, 1, 3), part_lse.permute(2, 0, 1), out, lse)
    return out, lse


def _round_queries(q: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Round q [turns, T, Hq, D] to int8 codes and a step per partition, [turns, T, Hq, partitions] in float32."""
    codes, step = round_rows(q.float().unflatten(-1, (-1, fmt.keys.group)))
    return codes.flatten(-2).to(torch.int8), step.squeeze(-1)
