"""`kvtier bench policy`: `auto` against every other policy and Belady on recorded traces, whole, in halves and shuffled.

Nothing is timed. Of each cell: the token hit rate beside the best other policy's and beside Belady's, how much of the
way from the one to the other `auto` goes; beside LRU that is told, in hindsight, the best rule for what a pager sees of a
chain when it ends; and, with hints of what is never used again, beside LRU with the same hints.
Where sessions start is drawn anew in the shuffled parts; the second half is replayed by itself, from empty tiers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ...pager.policies.registry import Setting, make_policy
from ...tiers.errors import ConfigError
from ..replay.cells import WITHOUT_WINDOW, capacities_of
from ..replay.hindsight import best_release_rule, shares_of
from ..replay.oracles import belady, next_uses, releases
from ..replay.simulate import Outcome, simulate
from ..replay.trace import Trace, part, read, shuffled_starts
from .harness import Row

_TRACES = Path(__file__).resolve().parents[2] / "benchmarks" / "traces"
TRACES = (_TRACES / "mooncake-conversation-hour.jsonl.gz", _TRACES / "coding-agent.jsonl.gz")
PARTS = ("whole", "first", "second", "shuffled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=Path, action="append", metavar="FILE", help="may be given often (default: our two)"
    )
    parser.add_argument(
        "--capacity", default="1%,5%,10%,20%,50%", metavar="C,..", help="as 5%% or blocks (default %(default)s)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,..", help="of %(default)s")
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N of each trace")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises: ConfigError."""
    parts = [name.strip() for name in arguments.parts.split(",")]
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"--parts {name!r}: choose of {', '.join(PARTS)}")
    rows: list[Row] = []
    for path in arguments.trace or TRACES:
        trace = read(path, limit=arguments.requests)
        if len(trace.chains) < 2:
            raise ConfigError(f"--trace {str(path)!r} holds {len(trace.chains)} requests; give at least two")
        for name in parts:
            rows += _rows(_part(trace, name), f"{path.name.split('.')[0]}, {name}", arguments.capacity)
    return rows


def _part(trace: Trace, name: str) -> Trace:
    half = len(trace.chains) // 2
    if name == "first":
        return part(trace, 0, half)
    if name == "second":
        return part(trace, half, len(trace.chains))
    return shuffled_starts(trace, seed=1) if name == "shuffled" else trace


def _rows(trace: Trace, title: str, capacities: str) -> Iterator[Row]:
    uses = next_uses(trace)
    freed, goes_on = releases(trace, uses), shares_of(trace, uses)
    for capacity in capacities_of(capacities, trace):
        case, blocks = f"{title}, {capacity.text}", capacity.blocks
        rates = {}
        for name in WITHOUT_WINDOW:
            policy = make_policy(name, Setting(blocks, trace.block_tokens))
            rates[name] = simulate(trace, policy, blocks).token_hit_rate(trace)
        ours = rates.pop("auto")
        best = max(rates, key=lambda name: rates[name])
        bound = Outcome(belady(trace, blocks, uses), 0, 0).token_hit_rate(trace)
        yield _row(case, "token_hit_rate", ours, f"best other policy: {best}", rates[best])
        yield _row(case, "token_hit_rate", ours, "limit: Belady", bound)
        way = (ours - rates[best]) / (bound - rates[best]) if bound > rates[best] else 1.0
        yield Row(case, "way_to_belady", way, "share", f"from {best} to Belady")
        rule = best_release_rule(trace, blocks, goes_on)
        yield _row(
            case, "token_hit_rate", ours, "LRU and the best release rule on what a pager sees, in hindsight", rule
        )
        hinted = {}
        for name in ("auto", "lru"):
            policy = make_policy(name, Setting(blocks, trace.block_tokens))
            hinted[name] = simulate(trace, policy, blocks, releases=freed).token_hit_rate(trace)
        yield _row(
            case, "token_hit_rate_with_releases", hinted["auto"], "limit: LRU with the same hints", hinted["lru"]
        )


def _row(case: str, metric: str, value: float, reference: str, its: float) -> Row:
    return Row(case, metric, value, "share of tokens", reference, its, value / its if its > 0 and value > 0 else None)
