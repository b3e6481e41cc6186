"""From hits to seconds and bytes: what the tiers' bandwidths and a prefill rate make of a replay. Modelled, not measured.

Tiers are inclusive, as the pager's copies are: each is a cache of its own over all requests, and a block is read from the
fastest one that has it. The largest one decides what is a hit at all, so a cell's hit rate is that of one cache of its
capacity, however it is split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...pager.policies.base import IntArray
from ...tiers.errors import ConfigError
from .simulate import Outcome
from .trace import Trace

TIERS = ("device", "host", "nvme")


@dataclass(frozen=True)  # without slots: the command reads the defaults
class Machine:
    """Rates of an assumed machine."""

    bytes_per_token: int = 128 << 10  # an 8B model with grouped heads, in 16 bits
    prefill_tokens_per_s: float = 10_000.0
    host_bytes_per_s: float = 25e9
    nvme_bytes_per_s: float = 5e9

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be more than 0")

    def load_cost(self, below: list[str]) -> float:
        """Of loading from the first of these tiers over computing; endless where there is none."""
        rates = {"host": self.host_bytes_per_s, "nvme": self.nvme_bytes_per_s}
        if not below:
            return math.inf
        return self.bytes_per_token * self.prefill_tokens_per_s / rates[below[0]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one cell costs and saves."""

    hit_tokens: dict[str, int]
    ttft_s: npt.NDArray[np.float64]
    loaded_bytes: int
    written_bytes: int


def estimate(trace: Trace, outcomes: dict[str, Outcome], machine: Machine) -> Estimate:
    """`outcomes` by tier, fastest first; the last one is the largest."""
    tokens = np.array([one.input_tokens for one in trace.requests], np.int64)
    most = list(outcomes.values())[-1].hit_tokens(trace)
    covered: IntArray = np.zeros(len(tokens), np.int64)
    by_tier = {}
    for name, outcome in outcomes.items():
        reached = np.minimum(outcome.hit_tokens(trace), most)
        by_tier[name] = np.maximum(reached - covered, 0)
        covered = np.maximum(covered, reached)
    per_token = machine.bytes_per_token
    load_s = np.zeros(len(tokens))
    for name, rate in (("host", machine.host_bytes_per_s), ("nvme", machine.nvme_bytes_per_s)):
        load_s += by_tier.get(name, 0) * per_token / rate
    ttft_s = load_s + (tokens - most) / machine.prefill_tokens_per_s
    loaded = sum(int(hit.sum()) for name, hit in by_tier.items() if name != "device") * per_token
    below = [outcome for name, outcome in outcomes.items() if name != "device"]
    written = sum(outcome.written_blocks for outcome in below) * trace.block_tokens * per_token
    return Estimate({name: int(hit.sum()) for name, hit in by_tier.items()}, ttft_s, loaded, written)


def split_of(text: str) -> dict[str, float]:
    """`device=10%,host=30%` as shares of a cell's capacity; a tier that is not named has all of it (nvme) or nothing."""
    shares = {"device": 0.0, "host": 0.0, "nvme": 1.0}
    for name, value in _pairs(text, "--tiers"):
        shares[name] = _number(value.removesuffix("%"), f"--tiers {text}") / (100 if value.endswith("%") else 1)
    return shares


def changed(shares: dict[str, float], what_if: str) -> dict[str, float]:
    """`host=2x,nvme=0`: times as large, or none."""
    new = dict(shares)
    for name, value in _pairs(what_if, "--what-if"):
        factor = _number(value.removesuffix("x"), f"--what-if {what_if}")
        if not value.endswith("x") and factor:
            raise ConfigError(f"--what-if {name}={value}: say a factor as {value}x, or 0 for no {name} tier")
        new[name] = shares[name] * factor
    if not any(new.values()):
        raise ConfigError(f"--what-if {what_if}: no tier is left; leave at least one")
    return new


def _pairs(text: str, where: str) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, _, value in (part.strip().partition("=") for part in text.split(","))]
    for name, value in pairs:
        if name not in TIERS or not value:
            raise ConfigError(f"{where} {name}={value}: say tier=value with a tier of {', '.join(TIERS)}")
    return pairs


def _number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a number") from error
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{where}: {text} must be 0 or more")
    return number
