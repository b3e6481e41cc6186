"""What `kvtier doctor --tune` measures: one decode over 32,768 tokens of a model with eight KV heads, in bf16."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels.tuning import Tuning

TOKENS, HEADS, QUERY_HEADS, DIM = 32768, 8, 32, 128
ROUNDS, LAUNCHES = 7, {"cpu": 1, "cuda": 20}


def decode_seconds(row: Tuning, kind: str, *, tokens: int = TOKENS, rounds: int = ROUNDS) -> float:
    """Median seconds of a decode over pages of this row's block size, in random order; cut as tuning says now."""
    import torch

    from ..kernels import paged_decode

    generator = torch.Generator().manual_seed(0)
    count = tokens // row.block
    k, v = (torch.randn(count, HEADS, row.block, DIM, generator=generator).bfloat16().to(kind) for _ in range(2))
    q = torch.randn(1, QUERY_HEADS, DIM, generator=generator).bfloat16().to(kind)
    table = torch.randperm(count, generator=generator)[None].numpy()
    seconds = []
    for _ in range(1 + rounds):
        started_s = time.perf_counter()
        for _ in range(LAUNCHES[kind]):
            out, _ = paged_decode(q, k, v, table, [tokens], scale=DIM**-0.5)
        float(out.flatten()[0])  # waits for the device
        seconds.append((time.perf_counter() - started_s) / LAUNCHES[kind])
    return statistics.median(seconds[1:])
