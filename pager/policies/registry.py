"""Policies by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ...tiers.errors import ConfigError
from .arc import Arc
from .auto import Auto
from .base import Policy
from .by_tier import ByTier
from .fifo import Fifo
from .gdsf import Gdsf
from .importance import Importance
from .lfu import Lfu
from .lru import Lru
from .prefix_aware import PrefixAware
from .queues import QueuePolicy
from .s3fifo import S3Fifo
from .sieve import Sieve
from .slru import Slru
from .two_queue import TwoQueue
from .window import SlidingWindow
from .wtinylfu import WTinyLfu


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy may want to know of where it is used."""

    capacity: int
    block_size: int
    window: int | None = None
    sinks: int = 4
    clock: Callable[[], float] | None = None  # of a pager at work
    # seconds to load tokens from the tier below over those to compute them; inf: none below
    load_cost: Callable[[], float] = lambda: math.inf


_MAKERS: dict[str, Callable[[Setting], Policy]] = {
    "auto": lambda s: Auto(s.capacity, s.clock, s.block_size),
    "lru": lambda s: Lru(s.capacity),
    "sliding_window": lambda s: SlidingWindow(s.capacity, s.window or 0, s.sinks, s.block_size),
    "fifo": lambda s: Fifo(s.capacity),
    "lfu": lambda s: Lfu(s.capacity),
    "slru": lambda s: Slru(s.capacity),
    "2q": lambda s: TwoQueue(s.capacity),
    "arc": lambda s: Arc(s.capacity),
    "sieve": lambda s: Sieve(s.capacity),
    "s3fifo": lambda s: S3Fifo(s.capacity),
    "gdsf": lambda s: Gdsf(s.capacity),
    "wtinylfu": lambda s: WTinyLfu(s.capacity),
    "importance": lambda s: Importance(s.capacity),
    "prefix": lambda s: PrefixAware(s.capacity, s.block_size, s.load_cost),
}
NAMES = tuple(_MAKERS)
_PER_TIER = (
    "2q",
    "arc",
    "sieve",
    "s3fifo",
    "gdsf",
    "wtinylfu",
    "prefix",
)  # about what one tier holds; the others rank for all


def make_policy(name: str, setting: Setting) -> Policy:
    """Raises: ConfigError naming the known ones."""
    check_policy(name, setting.window)
    return _MAKERS[name](setting)


def make_policy_of_tiers(name: str, setting: Setting, tiers: Mapping[str, tuple[int, Callable[[], float]]]) -> Policy:
    """For a pager at work. `tiers`: capacity in blocks and load cost of each, fastest first. Raises: ConfigError."""
    if name not in _PER_TIER:
        return make_policy(name, setting)
    rules: dict[str, QueuePolicy] = {}
    for tier, (capacity, load_cost) in tiers.items():
        rule = make_policy(name, replace(setting, capacity=capacity, load_cost=load_cost))
        assert isinstance(rule, QueuePolicy)
        rules[tier] = rule
    return ByTier(rules)


def check_policy(name: str, window: int | None) -> None:
    """Raises: ConfigError."""
    if name not in _MAKERS:
        raise ConfigError(f"policy={name!r} is unknown; choose one of {', '.join(NAMES)}")
    if name == "sliding_window" and (window is None or window < 1):
        raise ConfigError(f"window={window}: policy='sliding_window' needs a window of at least 1 token")
