"""The daemon's peers, measured in the rounds of the daemon's own benchmark: a Valkey or Redis server, LMCache's server.

The same work for all: blocks of 2 MiB put and got, keys looked up. Whoever benchmarks the daemon calls `run_round` once in
each of its rounds and hands its own medians to `rows`. A peer that is not installed is a row that says how to have it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from .harness import Row
from .key_value_peer import NOT_INSTALLED as NO_SERVER
from .key_value_peer import KeyValuePeer
from .lmcache import NOT_INSTALLED as NO_LMCACHE
from .lmcache import LmcacheServerPeer

BLOCK_BYTES = 2 << 20
CASES = ("put", "get", "lookup")


class Peers:
    """Those that are there. Use as a context."""

    def __init__(self, folder: Path, *, blocks: int, keys: int, lmcache: str | None) -> None:
        self._blocks, self._num_keys = blocks, keys
        self._seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._timed: dict[str, Callable[[str], float]] = {}  # by name of the peer, seconds of a case
        self._skipped: list[str] = []
        self._opened: list[KeyValuePeer | LmcacheServerPeer] = []
        try:
            self._open_key_value(folder / "key-value")
            self._open_lmcache(folder / "lmcache", lmcache)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run_round(self, cases: Sequence[str] = CASES, order: random.Random | None = None) -> None:
        """These cases of every peer once; whose turn is first, the order says."""
        turns = list(self._timed.items())
        (order or random.Random(0)).shuffle(turns)
        for name, seconds_of in turns:
            for case in cases:
                self._seconds[name, case].append(seconds_of(case))

    def rows(self, ours_s: Mapping[str, float]) -> list[Row]:
        """One row per case and peer: what we took beside what it took, in GB/s and in milliseconds."""
        found = []
        for case in (case for case in CASES if case in ours_s):
            what = f"{case}, {self._num_keys} keys" if case == "lookup" else f"{case}, {self._blocks} blocks of 2 MiB"
            for name in self._timed:
                found.append(self._row(case, what, name, ours_s[case], self._seconds[name, case]))
            metric, value, unit = self._figure(case, ours_s[case])
            found += [Row(what, metric, value, unit, reason) for reason in self._skipped]
        return found

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()

    # ------------------------------------------------------------------ inside
    def _row(self, case: str, what: str, name: str, ours_s: float, peers_s: list[float]) -> Row:
        theirs_s = statistics.median(peers_s)
        metric, value, unit = self._figure(case, ours_s)
        return Row(what, metric, value, unit, name, self._figure(case, theirs_s)[1], theirs_s / ours_s, len(peers_s))

    def _figure(self, case: str, seconds: float) -> tuple[str, float, str]:
        if case == "lookup":
            return "time", seconds * 1e3, "ms"
        return "rate", self._blocks * BLOCK_BYTES / seconds / 1e9, "GB/s"

    def _open_key_value(self, folder: Path) -> None:
        program = KeyValuePeer.find()
        if program is None:
            self._skipped.append(NO_SERVER)
            return
        peer = KeyValuePeer(folder, program)
        self._opened.append(peer)
        random_bytes = np.random.default_rng(0)
        source = random_bytes.integers(0, 256, (self._blocks, BLOCK_BYTES), np.uint8)
        target = np.zeros_like(source)
        keys = [bytes(key) for key in random_bytes.integers(0, 256, (max(self._blocks, self._num_keys), 32), np.uint8)]
        names = keys[: self._blocks]

        def run(case: str) -> float:
            start_s = time.perf_counter()
            if case == "put":
                peer.put(names, [memoryview(row) for row in source])  # type: ignore[arg-type]
            elif case == "get":
                peer.get(names, [memoryview(row) for row in target])  # type: ignore[arg-type]
            else:
                peer.lookup(keys[: self._num_keys])
            spent_s = time.perf_counter() - start_s
            if case == "get":
                assert np.array_equal(source, target), f"{peer.name} returned other bytes than were put"
                target.fill(0)
            return spent_s

        self._timed[peer.name] = run

    def _open_lmcache(self, folder: Path, python: str | None) -> None:
        if python is None:
            self._skipped.append(NO_LMCACHE)
            return
        peer = LmcacheServerPeer(python, folder, self._blocks, self._num_keys)
        self._opened.append(peer)
        self._timed[peer.name] = peer.seconds
