"""`kvtier bench stream`: decode over a context of which a tenth is in the device tier, against the memory's speed.

Every step streams the other nine tenths, layer by layer: on a CPU from host slots where they lie, and in turn with that
through the staging ring, as where the device has memory of its own. Three references, all of the same run: the same slices
copied and nothing computed (the bandwidth model: bytes over the measured copy rate); the slower of that and the attention
alone, over a device tier that holds everything (what perfect overlap would take); and that engine's answers, from which the
merged partial results must not differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvtier import Engine, PagerConfig, SamplingParams

from ...tiers.cpu import CpuBackend
from ...tiers.errors import ConfigError
from .harness import Row

TOKEN_BYTES = 2048  # of the needle model in float32
STAGING_BYTES = 24 << 20  # beside the resident share: three chunks of 8 MiB; a chunk costs some 0.3 ms beside its bytes
WARMUP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens (default 131072)")
    parser.add_argument("--block-size", type=int, default=256, metavar="N", help="tokens per block (default 256)")
    parser.add_argument("--resident", type=int, default=10, metavar="PERCENT", help="of the KV (default 10)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in milliseconds per token, and nats. Raises ConfigError for numbers that cannot be."""
    context, block = arguments.context, arguments.block_size
    if context < 8 * block or block < 16 or not 1 <= arguments.resident <= 90 or arguments.rounds < 1:
        raise ConfigError(
            f"--context {context}, --block-size {block}, --resident {arguments.resident}, --rounds {arguments.rounds}: need "
            "blocks of 16 tokens or more, at least 8 of them, 1 to 90 per cent, 1 round"
        )
    from ...engine.needle import NeedleSpec, build_needle_model, needle_prompt
    from ...engine.needle_check import build_needle_cache

    spec = NeedleSpec()
    ids, needles = needle_prompt(spec, context)
    cache = build_needle_cache(build_needle_model(spec), ids)
    size = context * TOKEN_BYTES
    resident = size * arguments.resident // 100
    staging = min(STAGING_BYTES, resident)
    streamed = PagerConfig(resident + staging, 2 * size, staging_bytes=staging, backend="auto")
    whole = PagerConfig(size * 3 // 2, 0, staging_bytes=0, backend="auto")
    with (
        Engine.from_model(build_needle_model(spec), streamed, block_size=block) as ours,
        Engine.from_model(build_needle_model(spec), whole, block_size=block) as peer,
    ):
        for engine in (ours, peer):
            engine.session("bench").inject(ids, cache)
        return _rows(
            ours, peer, needles[0].key, arguments.rounds, f"{context:,} tokens, {arguments.resident} % resident"
        )


def _rows(ours: Engine, peer: Engine, key: int, rounds: int, case: str) -> list[Row]:
    """Our step, one way and the other, the peer's and the bare copies take turns, token by token."""
    backend = ours.pager.backend
    ways = {"time per token, read in place": True} if backend.reads_host else {}
    ways |= {"time per token, through the ring": False}
    copies: list[float] = []
    whole: list[float] = []
    steps: dict[str, list[float]] = {way: [] for way in ways}
    copy_all: Callable[[], None] | None = None
    wanted: list[tuple[int, list[float]]] = []
    seen: list[tuple[int, list[float]]] = []
    for number in range(WARMUP + rounds):
        for way, in_place in ways.items():
            if isinstance(backend, CpuBackend):
                backend.reads_host = in_place
            before = _streamed_bytes(ours)
            spent_s, logprobs = _step(ours, seen[-1][0] if seen else key)
            nbytes = _streamed_bytes(ours) - before
            seen.append(logprobs)
            copy_all = copy_all or _copier(ours, nbytes)
            peer_s, found = _step(peer, wanted[-1][0] if wanted else key)
            wanted.append(found)
            started_s = time.perf_counter()
            copy_all()
            if number >= WARMUP:
                steps[way].append(spent_s)
                whole.append(peer_s)
                copies.append(time.perf_counter() - started_s)
    whole_s, copy_s = statistics.median(whole), statistics.median(copies)
    apart = max(abs(a - b) for (_, mine), (_, theirs) in zip(seen, wanted) for a, b in zip(mine, theirs))
    references = {
        f"its {nbytes / 2**20:,.0f} MiB copied, nothing computed": copy_s,
        "the slower of copying and a resident step": max(copy_s, whole_s),
        "everything resident": whole_s,
    }
    return [
        *(
            Row.of_times(case, way, "ms", statistics.median(spent), reference, reference_s, 1e3, rounds)
            for way, spent in steps.items()
            for reference, reference_s in references.items()
        ),
        Row(
            case,
            "largest difference of a log probability",
            apart,
            "nats",
            "one pass over resident pages",
            rounds=rounds,
        ),
    ]


def _step(engine: Engine, token: int) -> tuple[float, tuple[int, list[float]]]:
    """One token in, one token out: seconds of the step, the token, and the log probabilities of the best ones."""
    session = engine.session("bench")
    length = session.num_computed
    started_s = time.perf_counter()
    out = session.send([token] if session.num_computed == len(session.token_ids) else [], _PARAMS)
    spent_s = time.perf_counter() - started_s
    assert session.num_computed == length + 1
    (said,) = out.logprobs
    return spent_s, (said.token, [logprob for _, logprob in said.top])


_PARAMS = SamplingParams(max_tokens=1, logprobs=3)


def _streamed_bytes(engine: Engine) -> int:
    """Copied or read in place."""
    counters = engine.pager.counters
    moved = counters.get("moved_bytes", direction="host_to_device", reason="stream")
    return int(moved + counters.get("attended_bytes", reason="stream"))


def _copier(engine: Engine, nbytes: int) -> Callable[[], None]:
    """So many bytes of layer slices, scattered over memory of its own, copied as the ring does it and not looked at."""
    layout, stream = engine.pager.layouts[0], engine.pager.backend.promote
    count = -(-nbytes // layout.layer_bytes)
    per_layer = -(-count // layout.num_layers)
    source = engine.pager.backend.alloc_host(per_layer, layout.block_bytes)
    source[:] = 1  # touched: memory that nobody wrote to is one page of zeros
    chunk = max(1, STAGING_BYTES // 3 // layout.layer_bytes)
    target: Any = engine.pager.backend.alloc_device(3 * chunk, layout.layer_bytes)
    order = np.random.default_rng(0).permutation(per_layer)

    def copy_all() -> None:
        for layer in range(layout.num_layers):
            low = layer * layout.layer_bytes
            view = source[:, low : low + layout.layer_bytes]
            for number, start in enumerate(range(0, per_layer, chunk)):
                rows = order[start : start + chunk]
                stream.copy_rows(target, (number % 3) * chunk + np.arange(len(rows)), view, rows)
        stream.record().wait()

    return copy_all
