"""`kvtier bench metadata --scale`: whether the books cost the same per block however many blocks there are.

The directory and three policies hold so many blocks, in chains of 256. Timed is one chain at a time, drawn anew: found by
its keys; used again; the coldest 256 blocks named and evicted, and inserted again so that the next round finds as many.
The reference is the smallest number of blocks in the same run, its rounds taken in turn with the others': a ratio of 1 is
flat. Memory stops being in the CPU's caches somewhere on the way up; that much any table pays.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np

from ...pager.directory import Directory
from ...pager.policies.base import IntArray, Policy, Request
from ...pager.policies.registry import Setting, make_policy
from ...pager.states import HostSlots, Pages
from ...tiers.errors import ConfigError
from .harness import Row, interleave, medians

CHAIN = 256
POLICIES = ("lru", "arc", "auto")
DEFAULT = "10000,100000,1000000,10000000"


def sizes_of(text: str) -> list[int]:
    """Raises: ConfigError."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--scale {text!r}: say numbers of blocks, as 10000,100000") from error
    if min(sizes) < 2 * CHAIN:
        raise ConfigError(f"--scale {text!r}: at least {2 * CHAIN} blocks each")
    return sorted(set(sizes))


def run(text: str, rounds: int) -> list[Row]:
    sizes = sizes_of(text)
    cases: dict[str, Callable[[], object]] = {}
    for size in sizes:
        books = _Books(size)
        cases[f"lookup {size}"] = books.look_up
        for name, policy in books.policies.items():
            cases[f"{name} use {size}"] = partial(books.use, policy)
            cases[f"{name} evict {size}"] = partial(books.evict, policy)
    seconds = medians(interleave(cases, 20 * rounds, warmup=20))
    rows = []
    for case in ("lookup", *(f"{name} {what}" for name in POLICIES for what in ("use", "evict"))):
        for size in sizes:
            ours, least = seconds[f"{case} {size}"], seconds[f"{case} {sizes[0]}"]
            reference = f"the same with {sizes[0]} blocks"
            rows.append(
                Row.of_times(f"{size} blocks", case, "ns/block", ours, reference, least, 1e9 / CHAIN, 20 * rounds)
            )
    return rows


class _Books:
    """A directory and policies that hold `size` blocks."""

    def __init__(self, size: int) -> None:
        self._pick, self._now_s = random.Random(0), 0.0
        count = size // CHAIN
        self._directory = Directory(Pages(1), HostSlots(0))
        depth = np.tile(np.arange(CHAIN), count)
        self._chains: list[IntArray] = list(self._directory.create(depth, 0).reshape(count, CHAIN))
        self._keys = [_keys(number) for number in range(count)]
        for chain, keys in zip(self._chains, self._keys, strict=True):
            self._directory.bind_many(chain, keys, np.full(CHAIN, 16))
            self._directory.nvme_valid[chain] = True
        self.policies = {name: make_policy(name, Setting(size, 16)) for name in POLICIES}
        for policy in self.policies.values():
            policy.grow(len(self._directory.depth))
            for chain in self._chains:
                self._tell(policy, chain, was_held=False)

    def look_up(self) -> None:
        keys = self._pick.choice(self._keys)
        assert self._directory.is_valid(self._directory.find(keys)).all()

    def use(self, policy: Policy) -> None:
        self._tell(policy, self._pick.choice(self._chains), was_held=True)

    def evict(self, policy: Policy) -> None:
        leaving = policy.coldest(CHAIN)
        policy.on_evict(leaving)
        self._tell(policy, np.sort(leaving), was_held=False)

    def _tell(self, policy: Policy, chain: IntArray, *, was_held: bool) -> None:
        self._now_s += 1.0
        policy.on_chain(chain, np.full(len(chain), was_held), Request(self._now_s, 16 * len(chain), 100))


def _keys(number: int) -> list[bytes]:
    return [(number * CHAIN + place).to_bytes(32, "big") for place in range(CHAIN)]
