"""Cells of a replay: every policy at every capacity, as rows of plain values, beside what Belady would have had."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...pager.policies.base import IntArray
from ...pager.policies.registry import NAMES, Setting, check_policy, make_policy
from ...tiers.errors import ConfigError
from .model import TIERS, Machine, estimate
from .oracles import belady, next_uses, releases
from .simulate import Outcome, simulate
from .timed import Mode, TimedReplay
from .trace import Trace

WITHOUT_WINDOW = tuple(name for name in NAMES if name != "sliding_window")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of all tiers together: what the user wrote, and blocks."""

    text: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `shares` are the tiers' parts of a capacity."""

    policies: Sequence[str]
    capacities: Sequence[Capacity]
    shares: dict[str, float]
    machine: Machine
    has_bound: bool = True
    has_releases: bool = False
    window: int | None = None
    sinks: int = 4
    case: str = "as is"
    has_prefetch: bool = False

    def __post_init__(self) -> None:
        if self.has_prefetch and not self.shares.get("device"):
            raise ConfigError(
                "--prefetch plays copies into the device tier: give it a share, as --tiers device=10%,host=40%"
            )


def capacities_of(text: str, trace: Trace) -> list[Capacity]:
    """`5%` of the footprint (the trace's distinct blocks), or a plain number of blocks; at least one block."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            number = float(part.removesuffix("%"))
        except ValueError as error:
            raise ConfigError(f"--capacity {part!r}: say a share as 5% or a number of blocks") from error
        if not 0 < number < float("inf"):
            raise ConfigError(f"--capacity {part!r}: must be more than 0")
        blocks = trace.footprint * number / 100 if part.endswith("%") else number
        found.append(Capacity(part, max(1, int(blocks + 1e-9))))
    if not found:
        raise ConfigError(f"--capacity {text!r}: say at least one, as 5% or a number of blocks")
    return found


def policies_of(text: str, window: int | None) -> list[str]:
    """Names with commas between them; `all` is all that need no setting."""
    names = (
        list(WITHOUT_WINDOW) if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
    )
    if not names:
        raise ConfigError(f"--policy {text!r}: say at least one of {', '.join(NAMES)}, or all")
    for name in names:
        check_policy(name, window)
    return list(dict.fromkeys(names))


def run(trace: Trace, plan: Plan, on_progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
    """Rows, cell by cell. `on_progress` gets requests done and in all."""
    uses = next_uses(trace) if plan.has_bound or plan.has_releases else None
    freed = releases(trace, uses) if plan.has_releases else _said_releases(trace)
    done, total = 0, len(trace.chains) * len(plan.capacities) * len(plan.policies)
    for capacity in plan.capacities:
        largest = max(_sizes(plan, capacity).values())
        bound = _bound(trace, largest, uses) if plan.has_bound else None
        for name in plan.policies:
            started, before = time.perf_counter(), done

            def step(number: int, before: int = before) -> None:
                on_progress(before + number, total)

            outcomes = _simulate(trace, plan, capacity, name, freed, step)
            done += len(trace.chains)
            row = _row(trace, plan, capacity, name, outcomes, time.perf_counter() - started)
            if plan.has_prefetch:
                row |= _waits(trace, plan, capacity, name, freed)
            if bound is not None:
                row["belady_token_hit_rate"] = bound
                row["to_belady"] = bound - row["token_hit_rate"]
            yield row
        if bound is not None:
            yield _bound_row(plan, capacity, largest, bound)
    on_progress(total, total)


def _sizes(plan: Plan, capacity: Capacity) -> dict[str, int]:
    """Blocks by tier, fastest first and never smaller than the one before."""
    sizes, least = {}, 0
    for name, share in plan.shares.items():
        if share > 0:
            least = max(least, max(1, int(capacity.blocks * share + 1e-9)))
            sizes[name] = least
    return sizes


def _simulate(
    trace: Trace, plan: Plan, capacity: Capacity, name: str, freed: list[IntArray] | None, step: Callable[[int], None]
) -> dict[str, Outcome]:
    found = {}
    sizes = _sizes(plan, capacity)
    tiers = list(sizes)
    for place, (tier, blocks) in enumerate(sizes.items()):
        cost = plan.machine.load_cost(tiers[place + 1 :])
        setting = Setting(blocks, trace.block_tokens, plan.window, plan.sinks, load_cost=partial(float, cost))
        policy = make_policy(name, setting)
        found[tier] = simulate(trace, policy, blocks, releases=freed, on_request=step)
    return found


def _row(
    trace: Trace, plan: Plan, capacity: Capacity, name: str, outcomes: dict[str, Outcome], seconds: float
) -> dict[str, Any]:
    cost = estimate(trace, outcomes, plan.machine)
    total = max(1, trace.total_tokens)
    largest = list(outcomes.values())[-1]
    return {
        "case": plan.case,
        "policy": name,
        "capacity": capacity.text,
        "capacity_blocks": max(_sizes(plan, capacity).values()),
        "token_hit_rate": largest.token_hit_rate(trace),
        **{f"{tier}_token_hit_rate": tokens / total for tier, tokens in cost.hit_tokens.items()},
        "modelled_ttft_mean_s": float(cost.ttft_s.mean()) if len(cost.ttft_s) else 0.0,
        "modelled_ttft_p99_s": float(np.quantile(cost.ttft_s, 0.99)) if len(cost.ttft_s) else 0.0,
        "modelled_loaded_bytes": cost.loaded_bytes,
        "modelled_written_bytes": cost.written_bytes,
        "evicted_blocks": largest.evicted_blocks,
        "references_per_s": trace.num_references * len(outcomes) / max(seconds, 1e-9),
    }


def _waits(trace: Trace, plan: Plan, capacity: Capacity, name: str, freed: list[IntArray] | None) -> dict[str, float]:
    """In virtual time, by demand alone and with prefetch."""
    sizes = _sizes(plan, capacity)
    for above, tier in itertools.pairwise(TIERS):
        sizes.setdefault(tier, sizes[above])  # one that is not there holds what the one above it holds, and no more
    alone, both = (
        TimedReplay(trace, name, sizes, plan.machine, mode, freed).run()
        for mode in (Mode(), Mode(queue=True, next_turn=True))
    )
    return {
        "modelled_demand_wait_mean_s": float(alone.wait_s.mean()),
        "modelled_wait_mean_s": float(both.wait_s.mean()),
        "modelled_prefetched_bytes": both.prefetched_bytes,
        "prefetch_wasted_share": both.wasted_share,
    }


def _bound(trace: Trace, blocks: int, uses: list[IntArray] | None) -> float:
    return Outcome(belady(trace, blocks, uses), 0, 0).token_hit_rate(trace)


def _bound_row(plan: Plan, capacity: Capacity, blocks: int, bound: float) -> dict[str, Any]:
    return {
        "case": plan.case,
        "policy": "belady",
        "capacity": capacity.text,
        "capacity_blocks": blocks,
        "token_hit_rate": bound,
        "belady_token_hit_rate": bound,
        "to_belady": 0.0,
    }


def _said_releases(trace: Trace) -> list[IntArray] | None:
    """The trace's own `release` marks."""
    if not any(trace.released):
        return None
    return [chain if said else chain[:0] for chain, said in zip(trace.chains, trace.released, strict=True)]
