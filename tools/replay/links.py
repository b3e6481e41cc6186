"""A link of the virtual machine: bytes per second, what somebody waits for first, prefetch in the time that is left.

Demand is served in order. Prefetch moves in chunks while nobody waits, so it can delay demand by one chunk at most, and
that chunk is charged. Times are virtual and never go back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

CHUNK_BYTES = 8 << 20  # as the pager's: what is submitted at once


@dataclass(slots=True, eq=False)
class Job:
    """Bytes that nobody waits for yet. `left` falls as they move; `then` is told when all have."""

    left: float
    then: Callable[[float], None]
    is_cancelled: bool = False


class Link:
    """From one tier to the next."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._now_s = self._busy_until_s = 0.0
        self._jobs: deque[Job] = deque()

    def demand(self, now_s: float, nbytes: float) -> float:
        """When these bytes are there for somebody who waits for them from now on."""
        self.advance(now_s)
        if nbytes <= 0:
            return now_s
        begins_s = max(now_s, self._busy_until_s)
        if self._jobs and self._busy_until_s < now_s:  # a chunk is on its way
            begins_s += min(CHUNK_BYTES, self._jobs[0].left) / self._rate
        self._busy_until_s = begins_s + nbytes / self._rate
        return self._busy_until_s

    def prefetch(self, now_s: float, nbytes: float, then: Callable[[float], None]) -> Job:
        self.advance(now_s)
        job = Job(nbytes, then)
        self._jobs.append(job)
        return job

    def advance(self, now_s: float) -> None:
        """Let the prefetches run until now, where nobody's demand does."""
        at_s = max(self._now_s, self._busy_until_s)
        self._now_s = max(self._now_s, now_s)
        while self._jobs and at_s < now_s:
            job = self._jobs[0]
            if job.is_cancelled:
                self._jobs.popleft()
                continue
            took = min(job.left, (now_s - at_s) * self._rate)
            job.left -= took
            at_s += took / self._rate
            if job.left > 1e-6:
                return
            self._jobs.popleft()
            job.then(at_s)
