"""Counters and ghosts: what happened, in tokens, bytes, blocks and seconds, never as ratios.

Every path that moves or finds a block counts here, labelled by tier, direction and reason; readers divide. Ghosts are
the keys of evicted blocks: a later miss on one of them was thrashing, not a cold miss.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = tuple[tuple[str, str], ...]


class Counters:
    """Monotonic sums keyed by name and labels."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, Labels], float] = defaultdict(float)

    def add(self, name: str, amount: float, **labels: str) -> None:
        self._sums[name, tuple(sorted(labels.items()))] += amount

    def get(self, name: str, **labels: str) -> float:
        """Sum over all entries of `name` whose labels include these. From any thread: others may add meanwhile."""
        wanted, entries = set(labels.items()), list(self._sums.items())  # a list of them is made in one go
        return sum(value for (n, have), value in entries if n == name and wanted <= set(have))

    def to_list(self) -> list[dict[str, Any]]:
        return [{"name": n, "labels": dict(have), "value": v} for (n, have), v in sorted(self._sums.items())]


@dataclass(frozen=True, slots=True)
class Ghost:
    """An evicted block: the lowest tier that it left, when, why, and whose it was."""

    tier: str
    evicted_s: float
    reason: str
    owner: int = 0  # tag of its namespace


class Ghosts:
    """The most recent evicted keys, bounded; the oldest is forgotten first."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._by_key: OrderedDict[bytes, Ghost] = OrderedDict()

    def remember(self, key: bytes, ghost: Ghost) -> None:
        self._by_key[key] = ghost
        self._by_key.move_to_end(key)
        while len(self._by_key) > self._limit:
            self._by_key.popitem(last=False)

    def forget(self, key: bytes) -> None:
        self._by_key.pop(key, None)

    def get(self, key: bytes) -> Ghost | None:
        return self._by_key.get(key)

    def owners(self, keys: list[bytes]) -> npt.NDArray[np.int64]:
        """Whose block each of these keys was, -1 where it is not remembered. One path, whatever is found."""
        ghosts = (self._by_key.get(key) for key in keys)
        return np.array([-1 if ghost is None else ghost.owner for ghost in ghosts], np.int64)

    def recent(self) -> Iterator[tuple[bytes, Ghost]]:
        """Every key and its ghost, the latest first."""
        return reversed(self._by_key.items())

    def __len__(self) -> int:
        return len(self._by_key)
