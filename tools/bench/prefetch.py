"""`kvtier bench prefetch`: how long requests wait for blocks with prefetch, and by demand alone, on traces with their times.

Modelled, not timed: `kvtier replay --prefetch` in fixed settings. Tight tiers hold 2, 10 and 50 % of a trace's
blocks, roomy ones 10, 30 and 100 %; a machine has the default rates, and there are as many machines as are busy for 70 % of
the trace. Each row has the mean wait of one kind of prefetch beside demand alone in the same tiers, and a row says which
share of prefetched bytes nobody read (by the end of the trace: later turns are not seen). The kinds are shown apart in the
plain cases, in the others next turns alone and both.
`parked` sessions give their device blocks back when they have been idle for 30 s, as a server's do. In `no pattern`
nobody comes back but by chance: there, prefetch has nothing to find and must cost nothing.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...pager.policies.base import IntArray
from ...tiers.errors import ConfigError
from ..replay.model import Machine
from ..replay.oracles import releases
from ..replay.timed import Mode, TimedReplay, Waits
from ..replay.trace import Recorded, Trace, read, trace_of
from .harness import Row
from .policy import TRACES

SHARES = {"tight": {"device": 0.02, "host": 0.1, "nvme": 0.5}, "roomy": {"device": 0.1, "host": 0.3, "nvme": 1.0}}
BUSY = 0.7
PARK_S = 30.0
KINDS = {"queue": Mode(queue=True), "next turn": Mode(next_turn=True), "both": Mode(queue=True, next_turn=True)}
NEXT_AND_BOTH = {kind: KINDS[kind] for kind in ("next turn", "both")}  # all that is run of the cases that are not plain
DEMAND = "demand alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=Path, action="append", metavar="FILE", help="may be given often (default: our two)"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N of each trace")
    parser.add_argument("--policy", default="auto", help="of every tier (default %(default)s)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises: ConfigError."""
    rows: list[Row] = []
    for path in arguments.trace or TRACES:
        trace = read(path, limit=arguments.requests)
        if len(trace.chains) < 2:
            raise ConfigError(f"--trace {str(path)!r} holds {len(trace.chains)} requests; give at least two")
        rows += _rows(path.name.split(".")[0], trace, arguments.policy)
    rows += _rows("no pattern", without_pattern(arguments.requests or 4000), arguments.policy)
    return rows


def without_pattern(num_requests: int, seed: int = 0) -> Trace:
    """Prompts of eight blocks, a tenth of them drawn from all that were before; arrivals as of a Poisson process."""
    pick, at_ms, lines = random.Random(seed), 0.0, list[Recorded]()
    for number in range(num_requests):
        at_ms += pick.expovariate(1 / 500.0)
        again = lines and pick.random() < 0.1
        ids = pick.choice(lines).hash_ids if again else tuple(range(8 * number, 8 * number + 8))
        lines.append(Recorded(at_ms, ids, 8 * 512, 100, False))
    return trace_of("no pattern", lines, 512)


def _rows(title: str, trace: Trace, policy: str) -> Iterator[Row]:
    freed = releases(trace)
    for room, shares in SHARES.items():
        sizes = {name: max(1, int(trace.footprint * share)) for name, share in shares.items()}
        for case, park_s, said in (("", None, None), (", ends said", None, freed), (", parked", PARK_S, None)):
            yield from _cell(
                f"{title}, {room}{case}", trace, policy, sizes, park_s, said, NEXT_AND_BOTH if case else KINDS
            )


def _cell(
    title: str,
    trace: Trace,
    policy: str,
    sizes: dict[str, int],
    park_s: float | None,
    said: list[IntArray] | None,
    kinds: dict[str, Mode],
) -> Iterator[Row]:
    def wait(mode: Mode) -> Waits:
        return TimedReplay(trace, policy, sizes, _machine(trace), replace(mode, park_s=park_s), said).run()

    alone = 1e3 * float(wait(Mode()).wait_s.mean())
    for kind, mode in kinds.items():
        found = wait(mode)
        ours, name = 1e3 * float(found.wait_s.mean()), f"{title}, {kind}"
        yield Row(name, "modelled_wait_mean", ours, "ms", DEMAND, alone, alone / ours if ours > 0 else None)
        if mode.next_turn:
            yield Row(name, "wasted_share", found.wasted_share, "of prefetched bytes", "none in vain", 0.0)
            yield Row(name, "prefetched_share", found.prefetched_share, "of bytes brought up", "all of them", 1.0)


def _machine(trace: Trace) -> Machine:
    """So many of the default machine that computing what nobody had before takes at most 70 % of the trace."""
    one = Machine()
    span_s = max(1.0, trace.requests[-1].now_s - trace.requests[0].now_s)
    new_tokens = trace.footprint * trace.block_tokens
    count = math.ceil(new_tokens / (span_s * BUSY * one.prefill_tokens_per_s))
    return replace(
        one,
        prefill_tokens_per_s=count * one.prefill_tokens_per_s,
        host_bytes_per_s=count * one.host_bytes_per_s,
        nvme_bytes_per_s=count * one.nvme_bytes_per_s,
    )
