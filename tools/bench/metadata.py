"""`kvtier bench metadata`: what the pager's books cost, per block of a long prompt, apart from any copy.

The references are limits: what the least work of that kind costs in this Python (a bare hash chain, a bare free list, a
bare counter per block). For the look-up of a prompt also peers, where their interpreters are named. Blocks are tiny, so no
figure contains moving bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span

from ...pager.keys import KeyChain
from ...pager.known_runs import KnownRuns
from ...pager.prefix import match_keys
from ...tiers.errors import ConfigError
from . import metadata_scale, prefix_peers
from .harness import Row, interleave, medians


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens of the prompt")
    parser.add_argument("--block-size", type=int, default=16, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    for kind, name in prefix_peers.NAMES.items():
        parser.add_argument(
            f"--{kind}", metavar="PYTHON", help=f"also {name}'s prefix look-up, which this interpreter has installed"
        )
    parser.add_argument(
        "--scale",
        nargs="?",
        const=metadata_scale.DEFAULT,
        metavar="N,..",
        help="instead, whether directory and policies cost the same with so many blocks (default 10^4 to 10^7)",
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in nanoseconds per block. Raises ConfigError for a prompt of no whole block."""
    if arguments.context < arguments.block_size or arguments.rounds < 1:
        raise ConfigError(f"--context {arguments.context}, --rounds {arguments.rounds}: need one block and one round")
    pythons = {kind: getattr(arguments, kind) for kind in prefix_peers.NAMES}
    if arguments.scale is not None:
        for kind, python in pythons.items():
            if python:
                raise ConfigError(f"--{kind} {python!r} has no part in --scale: leave one of them out")
        return metadata_scale.run(arguments.scale, arguments.rounds)
    layout = KVLayout(1, 1, head_dim=8, block_size=arguments.block_size, dtype="float32")
    blocks = arguments.context // arguments.block_size
    prompt = random.Random(0).choices(range(1 << 17), k=blocks * arguments.block_size)
    config = PagerConfig(device_bytes=6 * blocks * layout.block_bytes, host_bytes=0, backend="cpu")
    with Pager.open(layout, config) as pager, Pager.open(layout, replace(config, policy="lru")) as plain:
        cases = _Cases(pager, prompt, blocks, arguments.block_size)
        seconds = medians(cases.run(arguments.rounds))
        beside = _Cases(plain, prompt, blocks, arguments.block_size)
        by_policy = medians(interleave(_of_policies(cases, beside), arguments.rounds, warmup=2))
        compared = prefix_peers.run(
            pythons, cases.look_ups(arguments.rounds), len(prompt), arguments.block_size, arguments.rounds
        )
    case = f"{len(prompt)} tokens, block {arguments.block_size}"
    limits = {
        "lookup": "limit: BLAKE2b chain alone",
        "allocate": "limit: pop from a deque, per block",
        "pin": "limit: += 1 in a list, per block",
        "free": "limit: append to a deque, per block",
    }
    return (
        [
            Row.of_times(
                case, name, "ns/block", seconds[name], limit, seconds[f"{name} limit"], 1e9 / blocks, arguments.rounds
            )
            for name, limit in limits.items()
        ]
        + [
            Row.of_times(
                case,
                f"{name}, policy {pager.policy}",
                "ns/block",
                by_policy[name],
                "the same with policy lru",
                by_policy[f"{name} lru"],
                1e9 / blocks,
                arguments.rounds,
            )
            for name in ("step", "turn")
        ]
        + compared
    )


def _of_policies(ours: _Cases, plain: _Cases) -> dict[str, Callable[[], object]]:
    return {"step": ours.pin, "step lru": plain.pin, "turn": ours.turn, "turn lru": plain.turn}


class _Cases:
    """One life of a prompt, timed part by part: it is found, gets pages, is pinned, and goes."""

    def __init__(self, pager: Pager, prompt: list[int], blocks: int, block_size: int) -> None:
        self._pager, self._prompt, self._blocks = pager, prompt, blocks
        self._size = block_size
        self._raw = struct.pack(f"<{len(prompt)}I", *prompt)
        self._cached = pager.begin()
        pager.append(self._cached, prompt)
        with pager.lease([Span(self._cached, 0, len(prompt))]) as lease:
            lease.commit()
        self._number = 0

    def run(self, rounds: int) -> dict[str, list[float]]:
        free, held, counts = deque(range(self._blocks)), deque[int](), [0] * self._blocks

        def pop() -> None:
            for _ in range(self._blocks):
                held.append(free.popleft())

        def push() -> None:
            while held:
                free.append(held.popleft())

        def count() -> None:
            for i in range(self._blocks):
                counts[i] += 1

        cases: dict[str, Callable[[], object]] = {
            "lookup": self._lookup,
            "lookup limit": self._hash,
            "allocate": self._allocate,
            "allocate limit": pop,
            "free": self._free,
            "free limit": push,
            "pin": self.pin,
            "pin limit": count,
        }
        return interleave(cases, rounds, warmup=2)

    def look_ups(self, rounds: int) -> dict[str, Callable[[], object]]:
        """The cases of prefix_peers."""
        core, keys = self._pager._core, list[bytes]()
        core.chain("default").extend(keys, self._prompt)
        other = random.Random(1).choices(range(1 << 17), k=len(self._prompt))
        as_array = array("I", self._prompt)
        turns = deque(
            self._prompt + random.Random(2 + number).choices(range(1 << 17), k=prefix_peers.TURN_TOKENS)
            for number in range(prefix_peers.WARMUP + rounds)
        )

        def known() -> None:
            assert match_keys(core, keys)[0] == self._blocks

        def missing() -> None:
            assert self._pager.match(other).tokens == 0

        def of_array() -> None:
            assert self._pager.match(as_array).tokens == len(self._prompt)

        def turn() -> None:
            turns.rotate()  # and stays: to free a list costs as much as half of this
            assert self._pager.match(turns[0]).tokens == len(self._prompt)

        return {
            "first": self._first,
            "new": self._lookup,
            "array": of_array,
            "turn": turn,
            "known": known,
            "missing": missing,
        }

    def _first(self) -> None:
        """The look-up of a pager that remembers nothing of this prompt; what it remembers it forgets again."""
        core = self._pager._core
        (group,), chain = core.groups, core.chain("default")
        core._chains["default"] = KeyChain(core.fingerprint, "default", b"", self._size)
        runs, group.runs = group.runs, KnownRuns(group.directory)
        self._lookup()
        core._chains["default"], group.runs = chain, runs

    def _lookup(self) -> None:
        assert self._pager.match(self._prompt).tokens == len(self._prompt)

    def _hash(self) -> None:
        parent, step = bytes(32), self._size * 4
        for offset in range(0, len(self._raw), step):
            parent = hashlib.blake2b(parent + self._raw[offset : offset + step], digest_size=32).digest()

    def _allocate(self) -> None:
        """Pages and the slot mapping for a whole new prompt."""
        self._seq = self._pager.begin()
        self._pager.append(self._seq, self._prompt)
        self._lease = self._pager.lease([Span(self._seq, 0, len(self._prompt))])

    def _free(self) -> None:
        """Unpin and give all pages back: the lease was not committed, so nothing is worth keeping."""
        self._lease.release()
        self._pager.finish(self._seq)

    def turn(self) -> None:
        """A request finds the whole prompt, takes it over, and ends."""
        seq = self._pager.begin()
        assert self._pager.attach(seq, self._prompt).tokens == len(self._prompt)
        self._pager.finish(seq)

    def pin(self) -> None:
        """A decode step's lease over the cached prompt: every block checked, pinned and unpinned, its table built."""
        self._number += 1
        self._pager.append(self._cached, [self._number])
        start = len(self._prompt) + self._number - 1
        with self._pager.lease([Span(self._cached, start, start + 1)]) as lease:
            lease.commit()
