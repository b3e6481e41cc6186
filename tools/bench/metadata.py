"""`kvtier bench metadata`: what the pager's books cost, per block of a long prompt, apart from any copy.

The references are limits, not peers: what the least work of that kind costs in this Python (a bare hash chain, a bare
free list, a bare counter per block). Blocks are tiny, so no figure contains moving bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import struct
from collections import deque
from collections.abc import Callable

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span

from ...tiers.errors import ConfigError
from . import metadata_scale
from .harness import Row, interleave, medians


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens of the prompt")
    parser.add_argument("--block-size", type=int, default=16, metavar="N")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
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
    if arguments.scale is not None:
        return metadata_scale.run(arguments.scale, arguments.rounds)
    layout = KVLayout(1, 1, head_dim=8, block_size=arguments.block_size, dtype="float32")
    blocks = arguments.context // arguments.block_size
    prompt = random.Random(0).choices(range(1 << 17), k=blocks * arguments.block_size)
    config = PagerConfig(device_bytes=6 * blocks * layout.block_bytes, host_bytes=0, backend="cpu")
    with Pager.open(layout, config) as pager:
        seconds = medians(_Cases(pager, prompt, blocks, arguments.block_size).run(arguments.rounds))
    case = f"{len(prompt)} tokens, block {arguments.block_size}"
    limits = {
        "lookup": "limit: BLAKE2b chain alone",
        "allocate": "limit: pop from a deque, per block",
        "pin": "limit: += 1 in a list, per block",
        "free": "limit: append to a deque, per block",
    }
    return [
        Row.of_times(
            case, name, "ns/block", seconds[name], limit, seconds[f"{name} limit"], 1e9 / blocks, arguments.rounds
        )
        for name, limit in limits.items()
    ]


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
            "pin": self._pin,
            "pin limit": count,
        }
        return interleave(cases, rounds, warmup=2)

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

    def _pin(self) -> None:
        """A decode step's lease over the cached prompt: every block checked, pinned and unpinned, its table built."""
        self._number += 1
        self._pager.append(self._cached, [self._number])
        start = len(self._prompt) + self._number - 1
        with self._pager.lease([Span(self._cached, start, start + 1)]) as lease:
            lease.commit()
