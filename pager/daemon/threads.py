"""Threads: work of clients that may wait, off the loop. Each name has a few of its own, and queues behind those alone.

To wait for room is to wait for others, so whoever waits is in nobody else's way: neither another tenant's nor, under another
name, its own. Everything but the work itself runs on the event loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...tiers.errors import TierUnavailableError

AT_ONCE = 4  # of one name, with threads of their own
MAX_THREADS = 1024  # made when they are needed: names come from the configuration
T = TypeVar("T")


class Threads:
    """Of one daemon."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="kvtier-slow")
        self._queues: dict[Hashable, deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = {}
        self._running: Counter[Hashable] = Counter()
        self._is_stopped = False

    def __len__(self) -> int:
        """Work that is not over, begun or not."""
        return self._running.total() + sum(map(len, self._queues.values()))

    def run(self, name: Hashable, work: Callable[[], T]) -> asyncio.Future[T]:
        """Its outcome, in time; TierUnavailableError where it is not begun any more."""
        future: asyncio.Future[T] = asyncio.Future(loop=self._loop)
        if self._is_stopped:
            _refuse(future)
        else:
            self._queues.setdefault(name, deque()).append((work, future))
            self._begin(name)
        return future

    def stop(self) -> None:
        """Nothing more is begun; who is not yet, is told so."""
        self._is_stopped = True
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            for _, future in queue:
                _refuse(future)

    def close(self) -> None:
        """Joins nobody: what still runs is held up in a call to the kernel, and the loop has others to serve."""
        self.stop()
        self._pool.shutdown(wait=False)

    def _begin(self, name: Hashable) -> None:
        while (queue := self._queues.get(name)) and self._running[name] < AT_ONCE:
            work, future = queue.popleft()
            if not queue:
                del self._queues[name]
            self._running[name] += 1
            ended = functools.partial(self._ended, name, future)
            self._loop.run_in_executor(self._pool, work).add_done_callback(ended)

    def _ended(self, name: Hashable, future: asyncio.Future[Any], ended: asyncio.Future[Any]) -> None:
        self._running -= Counter([name])  # leaves no zero behind
        if (error := ended.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(ended.result())
        self._begin(name)


def _refuse(future: asyncio.Future[Any]) -> None:
    future.set_exception(TierUnavailableError("the daemon is shutting down"))
