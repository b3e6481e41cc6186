"""OrderedStream: a copy stream whose copies the daemon drives. Between our pages and its slots, for one layer group.

Behind it, a lane per direction sends the orders, a few at a time, from a thread of its own. Where no daemon takes orders the
stream is the backend's own and we copy. Guards rules 2 and 3 across processes: an order leaves only when the events that it has
to wait for are over, seen by the host, so the daemon never waits for a stream of ours; and an event recorded here is done only
when the copies are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ...tiers.cpu import HostEvent, Workers
from ...tiers.errors import KvTierError, TierUnavailableError
from ...tiers.streams import AllDone, Event, ForeignCopy, IntArray, Rows, Stream, Work
from ..wire.messages import MAX_COPIES, MAX_COPY_BYTES
from .orders import CopyOrders

_LOOK_S = 0.2  # how often who waits looks whether the lane is closing
_UNDER_WAY = MAX_COPIES // 2  # two lanes


class _Sent:
    """One order: `done` when it is over, `source` when what it reads may be written again."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self.done, self.source = HostEvent(), HostEvent()

    def over(self, error: KvTierError | None) -> None:
        self.in_doubt()
        self.done.finish(error)
        self._lane.ended()

    def in_doubt(self) -> None:
        if not self.source.is_done():
            self.source.finish()


class Lane:
    """Orders of one direction, first in, first out. `orders`: who takes them now; changed while nothing is under way."""

    def __init__(self, name: str, notify: Callable[[], None]) -> None:
        self.name, self._notify = name, notify
        self.orders: CopyOrders | None = None
        self._workers = Workers(f"order-{name}", 1, notify)
        self._room = threading.Semaphore(_UNDER_WAY)

    def order(self, waits: Sequence[Event], group: int, pages: IntArray, slots: IntArray, is_write_back: bool) -> _Sent:
        """Raises: QueueFullError, TierUnavailableError when it is closed."""
        orders, sent = self.orders, _Sent(self)
        assert orders is not None
        send = partial(orders.copy, group, pages, slots, is_write_back=is_write_back, order=sent)
        self._workers.submit_silently(lambda: self._send(waits, send, sent))
        return sent

    def ended(self) -> None:
        self._room.release()
        self._notify()

    def _send(self, waits: Sequence[Event], send: Callable[[], None], sent: _Sent) -> None:
        """Once what it waits for is over, and few enough are under way."""
        may = all(self._wait(event.wait) for event in waits) and self._wait(self._acquire)
        if may:
            send()
        else:  # closing: nothing was ordered
            sent.over(TierUnavailableError(f"lane {self.name} is closed"))

    def _acquire(self, timeout_s: float) -> bool:
        return self._room.acquire(timeout=timeout_s)

    def _wait(self, wait: Callable[[float], bool]) -> bool:
        """False when the lane is closing."""
        while not wait(_LOOK_S):
            if self._workers.is_closing:
                return False
        return True

    def close(self, timeout_s: float) -> None:
        self._workers.close(timeout_s)


class OrderedStream:
    """See streams.Stream. Used under the pager's lock: what is waited for, copied and recorded belongs together."""

    def __init__(self, lane: Lane, group: int, pool: Rows, own: Stream) -> None:
        self._lane, self._group, self._pool, self._own = lane, group, pool, own
        self.name = f"{own.name}-ordered"
        self._per_order = max(1, MAX_COPY_BYTES // pool.shape[1])
        self._waits: list[Event] = []
        self._sent: list[_Sent] = []

    def wait(self, event: Event) -> None:
        if self._lane.orders is None:
            self._own.wait(event)
        elif not event.is_done():
            self._waits.append(event)

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        if self._lane.orders is None:
            self._own.copy_rows(target, target_rows, source, source_rows)
            return
        is_write_back = source is self._pool
        pages, slots = (source_rows, target_rows) if is_write_back else (target_rows, source_rows)
        waits, self._waits = self._waits, []
        for start in range(0, len(pages), self._per_order):
            part = slice(start, start + self._per_order)
            own = np.array(pages[part]), np.array(slots[part])  # the caller may change its arrays
            self._sent.append(self._lane.order(waits, self._group, *own, is_write_back))

    def record(self) -> Event:
        if self._lane.orders is None:
            return self._own.record()
        sent, self._sent = self._sent, []
        return ForeignCopy(AllDone([one.done for one in sent]), AllDone([one.source for one in sent]))

    def run(self, fn: Work) -> None:
        self._own.run(fn)

    def synchronize(self, timeout_s: float | None = None) -> bool:
        return self._own.synchronize(timeout_s)
