"""What happened in a simulated run, as a hash and a count: the same seed must give the same of both.

An event is one call of the pager's public interface, one step of a stream or disk queue, or one call to the kernel.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque

LAST_EVENTS = 40  # shown with a failure


class Clock:
    """Seconds that pass only when something happens."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Trace:
    """Every event of a run, hashed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last: deque[str] = deque(maxlen=LAST_EVENTS)
        self._hash = hashlib.blake2b(digest_size=16)

    def event(self, kind: str, said: str) -> None:
        self.counts[kind] += 1
        line = f"{kind} {said}\n"
        self._hash.update(line.encode())
        self.last.append(line)

    @property
    def total(self) -> int:
        return self.counts.total()

    def digest(self) -> str:
        return self._hash.hexdigest()
