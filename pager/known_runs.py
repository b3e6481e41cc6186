"""Known runs: the block ids of keys that follow each other in a chain, found by the last of them.

A key commits to all keys before it, so whoever has the last key of a run has the run. A remembered id counts only while its
block still has the name that it had then (`Directory.named`); what does not is looked up by its own key, and the run is
forgotten. Only for keys that a KeyChain made: a foreign list of keys need not be a chain. Whether the blocks are in any tier is
not told here.
"""

from __future__ import annotations

from itertools import takewhile

import numpy as np

from .directory import Directory
from .states import IntArray

RUN = 64  # keys of a run; runs begin at multiples of it
MAX_RUNS = 1 << 14  # a million blocks, in some 20 MB
_NOTHING = np.empty((2, 0), np.int64)


class KnownRuns:
    """Of one layer group."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._runs: dict[bytes, IntArray] = {}  # [2, RUN]: ids, and their namings; in order of remembering

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, keys: list[bytes], first: int, end: int) -> IntArray:
        """Block ids of keys[first:end] as far as all are known; NOWHERE for one that was forgotten since it was remembered."""
        parts, at = [_NOTHING], first
        while at < end:
            known = self._known(keys, at, end)
            parts += known
            at += RUN * len(known)
            stop = min(at - at % RUN + RUN, end)
            parts.append(self._look_up(keys[at:stop]))
            if parts[-1].shape[1] < stop - at:
                break
            at = stop
        return self._as_named(keys, first, np.concatenate(parts, axis=1))

    def _known(self, keys: list[bytes], at: int, end: int) -> list[IntArray]:
        """The remembered runs that follow each other from here on."""
        if at % RUN:
            return []
        found = map(self._runs.get, keys[at + RUN - 1 : end : RUN])
        return list(takewhile(lambda run: run is not None, found))  # type: ignore[arg-type]

    def _look_up(self, keys: list[bytes]) -> IntArray:
        """Key by key; remembered where it is a whole run. Ends where the first is unknown."""
        ids = self._directory.find(keys)
        unknown = np.flatnonzero(ids < 0)
        ids = ids[: unknown[0]] if len(unknown) else ids
        run = np.stack([ids, self._directory.named[ids]])
        if len(ids) == RUN:
            while len(self._runs) >= MAX_RUNS:
                del self._runs[next(iter(self._runs))]
            self._runs[keys[-1]] = run
        return run

    def _as_named(self, keys: list[bytes], first: int, run: IntArray) -> IntArray:
        """Blocks that have lost the name that they were remembered by are looked up again."""
        ids, named = run
        wrong = np.flatnonzero(self._directory.named[ids] != named)
        if len(wrong):
            at = (first + wrong).tolist()
            ids[wrong] = self._directory.find([keys[i] for i in at])
            for last in {i - i % RUN + RUN - 1 for i in at}:
                self._runs.pop(keys[last], None)
        return ids
