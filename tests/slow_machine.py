"""A machine that is slow by chance: `pytest --slow SEED` makes workers late and threads take turns where they never would.

Every call that a worker of the CPU backend takes from its queue, and every look at the pager's books, may wait first:
mostly not at all, sometimes for as long as a busy machine would let it. Turns of a scheduler end at once under odd seeds.
Found this way: what depends on who is faster. Of this process alone; a seed draws delays and cannot repeat what threads do.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable

SWITCH_S = 1e-5  # between threads; the usual is 5 ms
LATE, VERY_LATE = 0.2, 0.01  # shares of calls
LATE_S, VERY_LATE_S = 0.002, 0.1


class Delays:
    """Seeded, for any thread."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()

    def pause(self, worst_s: float = VERY_LATE_S) -> None:
        with self._lock:
            draw, share = self._random.random(), self._random.random()
        if draw < VERY_LATE:
            time.sleep(share * worst_s)
        elif draw < LATE:
            time.sleep(share * LATE_S)


def install(seed: int) -> None:
    """For the rest of this process."""
    from kvtier.engine import scheduler
    from kvtier.pager.core import Core
    from kvtier.tiers.cpu import Workers

    delays = Delays(seed)
    sys.setswitchinterval(SWITCH_S)
    put, poll = Workers._put, Core.advance

    def put_late(self: Workers, fn: Callable[[], None], event: object) -> None:
        def late() -> None:
            delays.pause()
            fn()

        put(self, late, event)  # type: ignore[arg-type]

    def poll_late(self: Core) -> None:
        delays.pause(LATE_S)
        poll(self)

    Workers._put, Core.advance = put_late, poll_late  # type: ignore[method-assign, assignment]
    if seed % 2:
        scheduler.SchedulerLimits.__init__.__defaults__ = (64, 0.0, 30.0, 8)
