"""GPU figures for gpu_check: copies between HBM and pinned memory, and the paged decode kernel, each beside its limit.

Times are taken by CUDA events, so that they hold what the device did and not what Python did. Needs a CUDA device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .harness import Row

BLOCK_BYTES, NUM_BLOCKS = 2 << 20, 512
ROUNDS = 9
DECODE_TOKENS, DECODE_BLOCK, KV_HEADS, GROUP, HEAD_DIM = 131072, 64, 8, 4, 128
_GB = 1e-9
Call = Callable[[], object]


def rows() -> list[Row]:
    """All figures. The caller has made sure that there is a device."""
    return [*_copy_rows(), *_decode_rows()]


def _copy_rows() -> list[Row]:
    """Scattered blocks against one large copy, each direction and both at once, per way of submitting."""
    from ...tiers.cuda import COPY_PATHS

    return [row for path in COPY_PATHS for row in _rows_of_path(path)]


def _rows_of_path(path: str) -> list[Row]:
    from ...tiers.cuda import CudaBackend

    backend = CudaBackend(path)
    up = backend.alloc_host(NUM_BLOCKS, BLOCK_BYTES), backend.alloc_device(NUM_BLOCKS, BLOCK_BYTES)
    down = backend.alloc_host(NUM_BLOCKS, BLOCK_BYTES), backend.alloc_device(NUM_BLOCKS, BLOCK_BYTES)
    random, line = np.random.default_rng(0), np.arange(NUM_BLOCKS)
    t, s = random.permutation(NUM_BLOCKS), random.permutation(NUM_BLOCKS)
    promote: list[Call] = [lambda: backend.promote.copy_rows(up[1], t, up[0], s)]
    demote: list[Call] = [lambda: backend.demote.copy_rows(down[0], t, down[1], s)]
    promote_one: list[Call] = [lambda: backend.promote.copy_rows(up[1], line, up[0], line)]
    demote_one: list[Call] = [lambda: backend.demote.copy_rows(down[0], line, down[1], line)]
    upward, downward = [backend.promote.stream], [backend.demote.stream]
    seconds = _device_seconds(
        {
            "promote": (promote, upward),
            "promote limit": (promote_one, upward),
            "demote": (demote, downward),
            "demote limit": (demote_one, downward),
            "both": (promote + demote, upward + downward),
            "both limit": (promote_one + demote_one, upward + downward),
        }
    )
    backend.close(5.0)
    found = []
    for name in ("promote", "demote", "both"):
        moved = NUM_BLOCKS * BLOCK_BYTES * (2 if name == "both" else 1)
        ours, limit = moved / seconds[name] * _GB, moved / seconds[f"{name} limit"] * _GB
        case = f"{NUM_BLOCKS} scattered blocks of 2 MiB, {path}"
        found.append(Row(case, name, ours, "GB/s", "the same bytes as one copy", limit, ours / limit, ROUNDS))
    return found


def _decode_rows() -> list[Row]:
    """Paged decode at 128K tokens against a device copy of the same bytes, and against contiguous SDPA."""
    import torch

    from kvtier.kernels import layer_views, paged_decode

    pages = DECODE_TOKENS // DECODE_BLOCK
    elements = 2 * KV_HEADS * DECODE_BLOCK * HEAD_DIM
    pool = torch.randn(pages, elements, device="cuda", dtype=torch.bfloat16)
    k, v = layer_views(pool, 0, KV_HEADS, DECODE_BLOCK, HEAD_DIM)
    table = np.random.default_rng(0).permutation(pages)[None]
    q = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    lens = np.array([DECODE_TOKENS])
    target = torch.empty_like(pool)
    dense = torch.randn(2, 1, KV_HEADS, DECODE_TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    grouped = q.view(1, KV_HEADS, GROUP, HEAD_DIM)
    attend = torch.nn.functional.scaled_dot_product_attention
    slab_rows, backend = _busy_copies()
    here = torch.cuda.current_stream()

    def decode() -> None:
        paged_decode(q, k, v, table, lens, scale=HEAD_DIM**-0.5)

    def decode_beside_copies() -> None:
        slab_rows()
        decode()

    seconds = _device_seconds(
        {
            "decode": ([decode], [here]),
            "decode beside copies": ([decode_beside_copies], [here]),
            "copy": ([lambda: target.copy_(pool)], [here]),
            "sdpa": ([lambda: attend(grouped, dense[0], dense[1])], [here]),
        }
    )
    backend.close(5.0)
    read = pool.numel() * pool.element_size()
    bandwidth, limit = read / seconds["decode"] * _GB, 2 * read / seconds["copy"] * _GB
    case = f"{DECODE_TOKENS} tokens, {KV_HEADS}x{HEAD_DIM}, G={GROUP}, block {DECODE_BLOCK}, bf16, one layer"
    micros, sdpa, beside = (seconds[name] * 1e6 for name in ("decode", "sdpa", "decode beside copies"))
    return [
        Row(case, "paged decode", bandwidth, "GB/s", "device copy, read + write", limit, bandwidth / limit, ROUNDS),
        Row(case, "paged decode", micros, "us", "SDPA, contiguous, G rows per head", sdpa, sdpa / micros, ROUNDS),
        Row(case, "paged decode beside copies", beside, "us", "without copies", micros, micros / beside, ROUNDS),
    ]


def _busy_copies() -> tuple[Callable[[], None], Any]:
    """Copies of 256 MiB each way that a call starts and nobody waits for."""
    from ...tiers.cuda import CudaBackend

    backend, count = CudaBackend(), 128
    host, device = backend.alloc_host(2 * count, BLOCK_BYTES), backend.alloc_device(2 * count, BLOCK_BYTES)
    line = np.arange(count)

    def start() -> None:
        backend.promote.copy_rows(device, line, host, line)
        backend.demote.copy_rows(host, line + count, device, line + count)

    return start, backend


def _device_seconds(cases: Mapping[str, tuple[list[Call], list[Any]]]) -> dict[str, float]:
    """Median device time of each case in interleaved rounds: from the first to the last of its streams' events."""
    import torch

    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 2):
        for name, (calls, streams) in cases.items():
            torch.cuda.synchronize()
            starts = [torch.cuda.Event(enable_timing=True) for _ in streams]
            ends = [torch.cuda.Event(enable_timing=True) for _ in streams]
            for event, stream in zip(starts, streams, strict=True):
                event.record(stream)
            for call in calls:
                call()
            for event, stream in zip(ends, streams, strict=True):
                event.record(stream)
            torch.cuda.synchronize()
            if number >= 2:
                found[name].append(max(starts[0].elapsed_time(end) for end in ends) / 1e3)
    return {name: statistics.median(values) for name, values in found.items()}
