"""Handles: the blocks below that a client knows of, by a small number each, as a store's slots are.

Per handle the key and what else its stamp says, whether the daemon holds it for us, and whether it lay in memory there.
Changed under the pager's lock; workers read stamps of handles that are in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiers.errors import TierFullError
from ...tiers.nvme.manifest import STAMP
from ...tiers.streams import IntArray

_FIRST = 1024


class Handles:
    """Of one layer group; at most `limit` in use."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.stamps: npt.NDArray[Any] = np.zeros(0, STAMP)
        self.is_held = np.zeros(0, bool)
        self.is_near = np.zeros(0, bool)
        self._is_used = np.zeros(0, bool)
        self._num_used = 0

    @property
    def num_free(self) -> int:
        return self.limit - self._num_used

    def allocate(self, n: int) -> IntArray:
        if n > self.num_free:
            raise TierFullError(f"{self._num_used} blocks of the daemon are known; at most {self.limit} can be")
        while len(self._is_used) - self._num_used < n:
            self._grow()
        found = np.flatnonzero(~self._is_used)[:n]
        self._is_used[found] = True
        self._num_used += n
        self.is_held[found] = self.is_near[found] = False
        return found

    def free(self, handles: IntArray) -> None:
        used = np.unique(handles[handles >= 0])
        used = used[self._is_used[used]]
        self._is_used[used] = False
        self.is_held[used] = False
        self._num_used -= len(used)

    def keys(self, handles: IntArray) -> bytes:
        """Of these handles, one behind the other."""
        return np.ascontiguousarray(self.stamps["key"][handles]).tobytes()

    def _grow(self) -> None:
        new = max(_FIRST, len(self._is_used))
        self.stamps = np.concatenate([self.stamps, np.zeros(new, STAMP)])
        for name in ("is_held", "is_near", "_is_used"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(new, bool)]))
