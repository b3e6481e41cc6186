"""`kvtier bench metadata --scale`: whether the books cost the same per block however many blocks there are.

The directory and three policies hold so many blocks, in chains of 256. Timed is one chain at a time, drawn anew: found by
its keys; used again; the coldest 256 blocks named and evicted, and inserted again so that the next round finds as many; and a
turn of one of as many sessions as there are chains, each with one a minute, told to the predictor of next turns.
The reference is the smallest number of blocks in the same run, its rounds taken in turn with the others': a ratio of 1 is
flat. Memory stops being in the CPU's caches somewhere on the way up; what that costs any table of such keys, the rows against
a bare `dict.get` of as many keys show. The last row is what all these books took together.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from ...pager.directory import Directory
from ...pager.foresight import Foresight
from ...pager.policies.base import IntArray, Policy, Request
from ...pager.policies.registry import Setting, make_policy
from ...pager.states import HostSlots, Pages
from ...tiers.errors import ConfigError
from .harness import Row, interleave, medians, resident_bytes

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
        cases[f"bare {size}"] = books.look_up_bare
        for name, policy in books.policies.items():
            cases[f"{name} use {size}"] = partial(books.use, policy)
            cases[f"{name} evict {size}"] = partial(books.evict, policy)
        cases[f"prefetch turn {size}"] = books.turn
    seconds = medians(interleave(cases, 20 * rounds, warmup=20))
    rows = []
    for case in ("lookup", *(f"{name} {what}" for name in POLICIES for what in ("use", "evict")), "prefetch turn"):
        for size in sizes:
            ours, least = seconds[f"{case} {size}"], seconds[f"{case} {sizes[0]}"]
            reference = f"the same with {sizes[0]} blocks"
            rows.append(
                Row.of_times(f"{size} blocks", case, "ns/block", ours, reference, least, 1e9 / CHAIN, 20 * rounds)
            )
    for size in sizes:
        ours, bare = seconds[f"lookup {size}"], seconds[f"bare {size}"]
        limit = "limit: dict.get alone, as many keys"
        rows.append(
            Row.of_times(
                f"{size} blocks", "lookup against its limit", "ns/block", ours, limit, bare, 1e9 / CHAIN, 20 * rounds
            )
        )
    return [
        *rows,
        Row(f"{sum(sizes)} blocks in all", "resident memory", resident_bytes() / 1e9, "GB", "nothing to compare with"),
    ]


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
        self._foresight = Foresight(max_idle=count)
        for number in range(count):
            self._foresight.ended(number, 60.0 * number / count)
        self._turns_s = 60.0
        for _ in range(
            2 * count + 2000
        ):  # until as many grow older in a turn as ever will, and think times are learned
            self.turn()
        self.policies = {name: make_policy(name, Setting(size, 16)) for name in POLICIES}
        for policy in self.policies.values():
            policy.grow(len(self._directory.depth))
            for chain in self._chains:
                self._tell(policy, chain, was_held=False)
            for chain in self._pick.sample(self._chains, count):  # a first use is other work than those after it
                self._tell(policy, chain, was_held=True)

    def look_up(self) -> None:
        keys = self._pick.choice(self._keys)
        assert self._directory.is_valid(self._directory.find(keys)).all()

    def look_up_bare(self) -> None:
        deque(map(self._directory.by_key.get, self._pick.choice(self._keys)), maxlen=0)

    def use(self, policy: Policy) -> None:
        self._tell(policy, self._pick.choice(self._chains), was_held=True)

    def evict(self, policy: Policy) -> None:
        leaving = policy.coldest(CHAIN)
        policy.on_evict(leaving)
        self._tell(policy, np.sort(leaving), was_held=False)

    def turn(self) -> None:
        """One session's next turn begins and ends; who is due meanwhile is named."""
        self._turns_s += 60.0 / len(self._chains)  # so each has one a minute
        who = self._pick.randrange(len(self._chains))
        session = self._foresight.began(who, self._turns_s)
        self._foresight.ended(who, self._turns_s, session)
        self._foresight.due(self._turns_s, 60.0, 0.8)

    def _tell(self, policy: Policy, chain: IntArray, *, was_held: bool) -> None:
        self._now_s += 1.0
        policy.on_chain(chain, np.full(len(chain), was_held), Request(self._now_s, 16 * len(chain), 100))


def _keys(number: int) -> list[bytes]:
    return [(number * CHAIN + place).to_bytes(32, "big") for place in range(CHAIN)]
