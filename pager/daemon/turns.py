"""Turns: requests of many namespaces, served one of each in turn, so that a flood of one delays the others by one request.

Bounded by what connections may have in flight. Runs on the event loop: after SLICE_S of work it lets the loop look at
its sockets again.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

SLICE_S = 0.002
Work = Callable[[], None]


class Turns:
    """One queue per name; whoever waits is served round robin."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop, self._clock = loop, clock
        self._waiting: OrderedDict[str, deque[Work]] = OrderedDict()
        self._is_scheduled = False

    def put(self, name: str, work: Work) -> None:
        self._waiting.setdefault(name, deque()).append(work)
        self._serve_soon()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _serve(self) -> None:
        self._is_scheduled = False
        until_s = self._clock() + SLICE_S
        while self._waiting:
            name, queue = self._waiting.popitem(last=False)
            work = queue.popleft()
            if queue:
                self._waiting[name] = queue  # behind everybody else
            try:
                work()
            except BaseException:  # whoever breaks does not keep the others waiting
                self._serve_soon()
                raise
            if self._clock() >= until_s:
                self._serve_soon()
                return

    def _serve_soon(self) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._serve)
