"""Times that a promise bounds, on a machine that others use too: what they take is measured and taken out."""

from __future__ import annotations

import time

_SPIN_S = 0.05
MOST_S = 2.0  # pins of the dead are gone, a restarted daemon serves


def slowness() -> float:
    """How many times as long as alone a busy thread takes here right now; 1 on a machine of one's own."""
    started_s, busy_s = time.perf_counter(), time.thread_time()
    while time.thread_time() - busy_s < _SPIN_S:
        pass
    return max(1.0, (time.perf_counter() - started_s) / _SPIN_S)


class Stopwatch:
    """Keeps the longest of the times between `start` and `stop`, as seconds of a machine that had nothing else to do."""

    def __init__(self) -> None:
        self.slowest_s = self._started_s = 0.0
        self._slowness = 1.0

    def start(self) -> None:
        self._started_s = time.monotonic()
        self._slowness = slowness()

    def stop(self) -> None:
        took_s = time.monotonic() - self._started_s
        self.slowest_s = max(self.slowest_s, took_s / max(self._slowness, slowness()))
