"""Processes that die in the middle of a copy: SIGKILL by their own hand at the n-th one, when half of its bytes are there.

die_in_copy(n)                      in an engine: between its device pool and the slab
die_in_order(n)                     in an engine whose daemon copies: when it has asked for the n-th copy
dying.py N ARGUMENTS OF PAGERD      a real pagerd, run as a program: between slab and disk, in the journal, while a block
                                    comes in over a socket, or in a copy that a client ordered; never for N = 0.
                                    Its ordered copies are slow, so that they can be died in; it says what it dies in
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from kvtier.pager.client.orders import CopyOrders
from kvtier.pager.daemon.connection import Connection
from kvtier.tiers import cpu
from kvtier.tiers.nvme.calls import SystemCalls

SLOW_S = 0.002  # of a copy that is ordered


class _Countdown:
    """Counts copies; at the last one `half` is done of it, and nothing else ever."""

    def __init__(self, n: int) -> None:
        self.left = n

    def copy(self, what: str, half: Callable[[], object]) -> None:
        self.left -= 1
        if self.left == 0:
            half()
            os.write(2, f"event=dies in={what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def die_in_copy(n: int) -> None:
    _die_in_rows(_Countdown(n))


def die_in_order(n: int) -> None:
    count, order = _Countdown(n), CopyOrders.copy

    def copy(self: CopyOrders, *what: Any, **how: Any) -> None:
        count.copy("order", lambda: order(self, *what, **how))
        order(self, *what, **how)

    CopyOrders.copy = copy  # type: ignore[method-assign]


def _die_in_rows(count: _Countdown) -> None:
    whole = cpu.copy_rows_now

    def copy(target: Any, target_rows: Any, source: Any, source_rows: Any) -> None:
        def half() -> None:
            rows = len(target_rows) // 2
            whole(target, target_rows[:rows], source, source_rows[:rows])
            size = target.shape[1] // 2
            target[target_rows[rows], :size] = source[source_rows[rows], :size]

        count.copy("rows", half)
        whole(target, target_rows, source, source_rows)

    cpu.copy_rows_now = copy


def die_in_daemon(n: int) -> None:
    """Of all copies of a daemon together."""
    count = _Countdown(n)

    def dying(call: Callable[..., int], cut: Callable[[Any], Any]) -> Callable[..., int]:
        def made(self: SystemCalls, fd: int, what: Any, *rest: int) -> int:
            count.copy(call.__name__, lambda: call(self, fd, cut(what), *rest))
            return call(self, fd, what, *rest)

        return made

    SystemCalls.preadv = dying(SystemCalls.preadv, _half_of_all)  # type: ignore[method-assign]
    SystemCalls.pwritev = dying(SystemCalls.pwritev, _half_of_all)  # type: ignore[method-assign]
    SystemCalls.append = dying(SystemCalls.append, lambda frame: frame[: len(frame) // 2])  # type: ignore[method-assign]
    arrived = Connection._take_raw

    def take_raw(self: Connection, header: Any, start: int) -> int:
        taken = arrived(self, header, start)
        if taken:
            count.copy("socket", lambda: None)  # the start of its payload is in the slot
        return taken

    Connection._take_raw = take_raw  # type: ignore[method-assign]
    _die_in_rows(count)
    made_stream = cpu.CpuStream.__init__

    def slow(self: cpu.CpuStream, name: str, notify: Any, *, poison: bool, delay_s: float) -> None:
        made_stream(self, name, notify, poison=True, delay_s=SLOW_S)

    cpu.CpuStream.__init__ = slow  # type: ignore[method-assign]


def _half_of_all(buffers: Any) -> list[memoryview]:
    """The first half of the first buffer, in whole pages where it has some: O_DIRECT takes nothing else."""
    first = memoryview(np.frombuffer(buffers[0], np.uint8))
    pages = len(first) // 4096
    return [first[: pages // 2 * 4096] if pages > 1 else first]


def main() -> int:
    from kvtier.tools.pagerd import main as pagerd

    die_in_daemon(int(sys.argv[1]))
    return pagerd(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
