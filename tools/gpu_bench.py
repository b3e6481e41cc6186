"""GPU benchmarks of gpu_check: copies between device and pinned host memory, paged decode, one beside the other, formats.

Each number stands beside a limit or a peer that was measured in the same rounds, in turns; a median is taken of each.
Work is queued far ahead of the device, so that a time is the device's and not that of Python launching.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..tiers.errors import ConfigError

ROUNDS = 7
BLOCK_BYTES = 2 << 20
NUM_BLOCKS = 512  # 1 GiB each way
SEQUENCES, CONTEXT_TOKENS, BLOCK_TOKENS = 4, 131072, 64
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
LAUNCHES = 20  # per timing: about 10 ms, against some 50 us until the host sees the end
STEP_LAYERS, STEP_REPEATS, HIDDEN = 8, 5, 8192
ATTENTION = "--device cuda --shapes GQA4 --contexts 32768,131072,1048576 --prefill-contexts 16384 --seconds 3"
MAX_ERROR = 0.05  # of the largest output: bfloat16 results of two kernels over the same keys
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One result. `ratio` is always "higher is better for us"; without a value, `reference` says why."""

    case: str
    metric: str
    value: float | None
    unit: str
    reference: str
    reference_value: float | None
    ratio: float | None
    rounds: int


def run_gpu_benchmarks() -> list[dict[str, Any]]:
    """Every row. A benchmark that fails leaves a row that says so, because machines with a GPU are few."""
    rows: list[Row] = []
    for bench in (_copies, _decode, _attention):
        try:
            rows += bench()
        except Exception as error:  # compiler, driver and torch have no common class, and the other figures count
            rows.append(_missing(bench.__name__.strip("_"), f"failed: {type(error).__name__}: {error}"))
    return [asdict(row) for row in rows]


def has_failed(rows: list[dict[str, Any]]) -> bool:
    return any(str(row["reference"]).startswith("failed") for row in rows)


def _missing(case: str, why: str) -> Row:
    return Row(case, "not measured", None, "", why, None, None, 0)


def _medians(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Call each in turn, ROUNDS times after one to warm up; the medians of what they return."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            result = call()
            if number:
                found[name].append(result)
    return {name: statistics.median(values) for name, values in found.items()}


# ---------------------------------------------------------------------- copies
class _Transfers:
    """Rows on both sides for both directions, and timed copies of them."""

    def __init__(self, backend: Any) -> None:
        self.up = backend.alloc_device(NUM_BLOCKS, BLOCK_BYTES), backend.alloc_host(NUM_BLOCKS, BLOCK_BYTES)
        self.down = backend.alloc_host(NUM_BLOCKS, BLOCK_BYTES), backend.alloc_device(NUM_BLOCKS, BLOCK_BYTES)
        random = np.random.default_rng(0)
        self.scattered = random.permutation(NUM_BLOCKS), random.permutation(NUM_BLOCKS)
        self.one = np.arange(NUM_BLOCKS), np.arange(NUM_BLOCKS)  # neighbours: a single copy

    def submit(self, backend: Any, directions: tuple[str, ...], order: tuple[Any, Any]) -> list[Any]:
        events = []
        for direction in directions:
            stream, (target, source) = (
                (backend.promote, self.up) if direction == "host_to_device" else (backend.demote, self.down)
            )
            stream.copy_rows(target, order[0], source, order[1])
            events.append(stream.record())
        return events

    def rate(self, backend: Any, directions: tuple[str, ...], order: tuple[Any, Any]) -> float:
        """Bytes per second, all directions together."""
        started_s = time.perf_counter()
        for event in self.submit(backend, directions, order):
            event.wait()
            if event.error is not None:
                raise RuntimeError(f"a copy failed: {event.error}")
        return len(directions) * NUM_BLOCKS * BLOCK_BYTES / (time.perf_counter() - started_s)


_DIRECTIONS = {
    "host to device": ("host_to_device",),
    "device to host": ("device_to_host",),
    "both at once": ("host_to_device", "device_to_host"),
}


def _copies() -> list[Row]:
    from ..tiers.cuda import COPY_PATHS, CudaBackend

    rows: list[Row] = []
    backends: dict[str, Any] = {}
    for path in COPY_PATHS:
        try:
            backends[path] = CudaBackend(copy_path=path)
        except ConfigError as error:
            rows.append(_missing(f"scattered blocks, path {path}", f"path not here: {error}"))
    if "runs" not in backends:
        raise RuntimeError("plain copies do not work, so there is nothing to compare with")
    transfers = _Transfers(backends["runs"])
    calls: dict[str, Callable[[], float]] = {}
    for name, directions in _DIRECTIONS.items():
        calls[name] = lambda d=directions: transfers.rate(backends["runs"], d, transfers.one)  # type: ignore[misc]
        for used, backend in backends.items():
            calls[f"{name}, {used}"] = lambda b=backend, d=directions: transfers.rate(b, d, transfers.scattered)  # type: ignore[misc]
    rates = _medians(calls)
    for name in _DIRECTIONS:
        for used in backends:
            value, limit = rates[f"{name}, {used}"] / _GB, rates[name] / _GB
            case = f"{NUM_BLOCKS} scattered blocks of 2 MiB, {name}, path {used}"
            rows.append(Row(case, "rate", value, "GB/s", "one large copy per direction", limit, value / limit, ROUNDS))
    for backend in backends.values():
        backend.close(10.0)
    return rows


# ---------------------------------------------------------------------- decode
class _Decode:
    """One query row per sequence over scattered pages, and over the same keys and values laid out in a row."""

    def __init__(self, device: Any, sequences: int, tokens: int) -> None:
        import torch

        from kvtier.kernels import layer_views, plan_step

        kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        blocks = tokens // BLOCK_TOKENS
        self.pool = torch.randn(sequences * blocks, 2 * KV_HEADS * BLOCK_TOKENS * HEAD_DIM, **kind)
        self.k, self.v = layer_views(self.pool, 0, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
        self.table = np.random.default_rng(0).permutation(len(self.pool)).reshape(sequences, -1).astype(np.int32)
        self.lens, self.cu_q = np.full(sequences, tokens), np.arange(sequences + 1)
        self.q = torch.randn(sequences, KV_HEADS * GROUP, HEAD_DIM, **kind)
        self.plan = plan_step(self.k, self.table, self.lens, self.cu_q)
        pages = torch.from_numpy(self.table).to(device).long()
        self.dense = [paged[pages].transpose(1, 2).flatten(2, 3).contiguous() for paged in (self.k, self.v)]

    def paged(self) -> Any:
        from kvtier.kernels import paged_attention

        tables = (self.table, self.lens, self.cu_q)
        return paged_attention(self.q, self.k, self.v, *tables, scale=HEAD_DIM**-0.5, plan=self.plan)[0]

    def contiguous(self) -> Any:
        import torch

        rows = self.q.view(len(self.q), KV_HEADS, GROUP, HEAD_DIM)
        k, v = self.dense
        return torch.nn.functional.scaled_dot_product_attention(rows, k, v, scale=HEAD_DIM**-0.5)

    def check(self) -> None:
        """Raises RuntimeError when the two differ: wrong answers are not timed."""
        ours, theirs = self.paged().float(), self.contiguous().reshape(self.q.shape).float()
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= MAX_ERROR:
            raise RuntimeError(f"paged decode differs from contiguous attention by {error:.3g} of its largest value")


def _decode() -> list[Row]:
    import torch

    from ..tiers.cuda import CudaBackend

    backend = CudaBackend()
    decode = _Decode(backend.device, SEQUENCES, CONTEXT_TOKENS)
    decode.check()
    other = torch.empty_like(decode.pool)
    work: dict[str, Callable[[], Any]] = {
        "paged": decode.paged,
        "sdpa": decode.contiguous,
        "copy": lambda: other.copy_(decode.pool),
    }
    seconds = _medians({name: lambda call=call: _seconds(backend, call, LAUNCHES) for name, call in work.items()})  # type: ignore[misc]
    nbytes = other.numel() * other.element_size()
    ours, limit = nbytes / seconds["paged"] / _GB, 2 * nbytes / seconds["copy"] / _GB
    paged_ms, sdpa_ms = seconds["paged"] * 1e3, seconds["sdpa"] * 1e3
    case = f"paged decode, {SEQUENCES} x {CONTEXT_TOKENS} tokens, {KV_HEADS} KV heads x {HEAD_DIM}, G={GROUP}, bfloat16"
    peer = f"SDPA {torch.__version__}, contiguous, G heads as query rows"
    rows = [
        Row(case, "read rate", ours, "GB/s", "device copy, read and written", limit, ours / limit, ROUNDS),
        Row(case, "time", paged_ms, "ms", peer, sdpa_ms, sdpa_ms / paged_ms, ROUNDS),
        *_beside_copies(backend, backend.copy_path, decode.paged),
    ]
    backend.close(10.0)
    return rows


def _seconds(backend: Any, work: Callable[[], Any], repeats: int) -> float:
    """Device time of one call, over several queued behind each other."""
    backend.compute.synchronize()
    started_s = time.perf_counter()
    for _ in range(repeats):
        work()
    backend.compute.record().wait()
    return (time.perf_counter() - started_s) / repeats


def _beside_copies(backend: Any, path: str, attend: Callable[[], Any]) -> list[Row]:
    """A decode step of attention and matrix products, alone and while both copy streams never rest."""
    import torch

    transfers = _Transfers(backend)
    device = attend().device
    weight = torch.randn(HIDDEN, HIDDEN, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(64, HIDDEN, device=device, dtype=torch.bfloat16)
    submissions = 4

    def step() -> None:
        for _ in range(STEP_LAYERS):
            attend()
            torch.mm(hidden, weight)

    def alone() -> float:
        return _seconds(backend, step, STEP_REPEATS)

    def beside() -> float:
        nonlocal submissions
        while submissions <= 256:
            last: list[Any] = []
            for _ in range(submissions):
                last = transfers.submit(backend, _DIRECTIONS["both at once"], transfers.scattered)
            found_s = _seconds(backend, step, STEP_REPEATS)
            lasted = not any(event.is_done() for event in last)
            for event in last:
                event.wait()
            if lasted:
                return found_s
            submissions *= 2  # the copies ended first: the step was not beside them all the time
        raise RuntimeError("copies never outlasted a decode step")

    seconds = _medians({"alone": alone, "beside": beside})
    alone_ms, beside_ms = seconds["alone"] * 1e3, seconds["beside"] * 1e3
    case = f"decode step of {STEP_LAYERS} layers while 2 MiB blocks move both ways, path {path}"
    slowed = 100 * (beside_ms / alone_ms - 1)
    reference = "the same step without copies"
    return [
        Row(case, "time", beside_ms, "ms", reference, alone_ms, alone_ms / beside_ms, ROUNDS),
        Row(case, "slowed by", slowed, "%", reference, 0.0, alone_ms / beside_ms, ROUNDS),
    ]


# ---------------------------------------------------------------------- attention
def _attention() -> list[Row]:
    """`kvtier bench attention` on one shape: every page format, decode up to a million tokens."""
    from .bench import attention

    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    found = attention.run(parser.parse_args(ATTENTION.split()))
    return [Row(**asdict(row)) for row in found]
