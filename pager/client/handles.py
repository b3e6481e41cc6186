"""Handles: the blocks below that a client knows of, by a small number each, as a store's slots are.

Per handle the key and what else its stamp says, whether the daemon holds it for us, and whether it lay in memory there.
Changed under the pager's lock; workers read stamps of handles that are in use, and note what the daemon answered.
"""

from __future__ import annotations

import threading
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
        self.is_doubtful = np.zeros(0, bool)  # of the held: an UNHOLD of ours may have come behind that hold
        self.is_near = np.zeros(0, bool)
        self.serial = np.zeros(0, np.int64)  # which use of the handle this is
        self.unholds_begun = self.unholds_over = 0
        self._lock = threading.Lock()  # of what workers change too
        self._num_allocated = 0
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
        self.serial[found] = np.arange(self._num_allocated, self._num_allocated + n)
        self._num_allocated += n
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

    # ------------------------------------------------------------------ what the daemon holds for us
    def note_held(self, handles: IntArray, since: int) -> None:
        """The daemon said that it holds these. `since`: `unholds_over` before it was asked; with an UNHOLD under way at the
        same time nobody knows which came first."""
        with self._lock:
            is_sure = self.is_held[handles] & ~self.is_doubtful[handles]
            self.is_doubtful[handles] = ~is_sure & (self.unholds_begun != since)
            self.is_held[handles] = True

    def doubt(self, handles: IntArray) -> None:
        """Whether the daemon holds these has to be asked anew."""
        with self._lock:
            self.is_doubtful[handles] = self.is_held[handles]

    def note_written(self, handles: IntArray, stored: npt.NDArray[np.bool_]) -> None:
        with self._lock:
            self.is_near[handles] = stored

    def is_surely_held(self, handles: IntArray) -> npt.NDArray[np.bool_]:
        sure: npt.NDArray[np.bool_] = self.is_held[handles] & ~self.is_doubtful[handles]
        return sure

    def begin_unhold(self) -> None:
        with self._lock:
            self.unholds_begun += 1

    def end_unhold(self) -> None:
        with self._lock:
            self.unholds_over += 1

    # ------------------------------------------------------------------ inside
    def _grow(self) -> None:
        new = max(_FIRST, len(self._is_used))
        with self._lock:
            for name in ("stamps", "is_held", "is_doubtful", "is_near", "serial", "_is_used"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(new, old.dtype)]))
