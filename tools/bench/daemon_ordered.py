"""Rows of `kvtier bench daemon` for transfer="ipc": the daemon copies blocks between this process's pages and its slab.

Against a plain memcpy of as many bytes between the same two memories, by this process, in the same rounds. Every block is
checked. Pages are those of the CPU backend, a memfd; on a GPU gpu_check runs the test of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvtier import KVLayout

from ...pager.client.attachment import Attachment
from ...pager.client.connection import DaemonConnection, Greeting, Reply
from ...pager.client.orders import CopyOrders
from ...pager.keys import owner_tag
from ...pager.rules import ALL_RULES
from ...pager.wire.messages import ALL_FEATURES, STORED, TAKEN, Committed
from ...tiers.cpu import CpuBackend, HostEvent
from ...tiers.errors import KvTierError
from ...tiers.exported import export_rows
from ...tiers.nvme.manifest import STAMP
from ...tiers.streams import IntArray
from .daemon_process import DaemonProcess
from .harness import Row, interleave, medians

SLAB_BATCHES = 17  # one client may have a quarter: one batch is reserved, one copied, one named
WAIT_S = 60.0


class _Ordered:
    """One batch that the daemon copies."""

    def __init__(self, names: list[bytes], rows: IntArray) -> None:
        self.names, self.rows, self.event = names, rows, HostEvent()

    def over(self, error: KvTierError | None) -> None:
        self.event.finish(error)

    def in_doubt(self) -> None:
        """The benchmark ends with it."""

    def wait(self) -> None:
        self.event.wait(WAIT_S)
        if self.event.error is not None:
            raise self.event.error


class _Pages:
    """A pool of as many pages as a round has blocks."""

    def __init__(self, address: str, layout: KVLayout, blocks: int, batch: int) -> None:
        greeting = Greeting("bench", features=ALL_FEATURES)
        self.client = Attachment.open(address, [layout], "bench", {}, greeting)
        self.backend = CpuBackend()
        self.pool = export_rows(self.backend, blocks, layout.block_bytes)
        self.orders = CopyOrders.begin(self.client, ALL_RULES, lambda: DaemonConnection.open(address))
        self.orders.register(0, self.pool)
        self._layout, self._blocks, self._batch, self._round = layout, blocks, batch, 0

    def put(self) -> None:
        """While the daemon copies one batch, the one before is named and room for the next is on its way."""
        self._round += 1
        done, before = [], None
        for names in self._batches():
            rows, _ = self.client.reserve(0, len(names), WAIT_S)
            assert len(rows) == len(names), "the slab is too small for this benchmark"
            copied = self._order(names, rows, is_write_back=True)
            if before is not None:
                done.append(self._name(before))
            before = copied
        assert before is not None
        done.append(self._name(before))
        for reply in done:
            assert {result & STORED for result in reply.result().results} == {TAKEN}

    def get(self) -> None:
        """While the daemon copies one batch, the next is leased."""
        before = None
        for names in self._batches():
            rows, _ = self.client.lease(0, b"".join(names), WAIT_S)
            assert (rows >= 0).all(), "the slab is too small for this benchmark"
            copied = self._order(names, rows, is_write_back=False)
            if before is not None:
                self._release(before)
            before = copied
        assert before is not None
        self._release(before)

    def _order(self, names: list[bytes], rows: IntArray, *, is_write_back: bool) -> _Ordered:
        first, ordered = int.from_bytes(names[0][16:], "little"), _Ordered(names, rows)
        pages = np.arange(first, first + len(names))
        self.orders.copy(0, pages, rows, is_write_back=is_write_back, order=ordered)
        return ordered

    def _name(self, copied: _Ordered) -> Reply[Committed]:
        copied.wait()
        stamps = np.zeros(len(copied.names), STAMP)
        stamps["key"] = np.frombuffer(b"".join(copied.names), "V32")
        stamps["tokens"], stamps["owner"] = self._layout.block_size, owner_tag("default")
        reply = self.client.begin_commit(0, copied.rows, stamps, [b""] * len(copied.names))
        self.client.begin_release(0, copied.rows)  # served behind the commit
        return reply

    def _release(self, copied: _Ordered) -> None:
        copied.wait()
        self.client.begin_release(0, copied.rows)

    def _batches(self) -> list[list[bytes]]:
        names = [self._round.to_bytes(16, "little") + i.to_bytes(16, "little") for i in range(self._blocks)]
        return [names[first : first + self._batch] for first in range(0, self._blocks, self._batch)]

    def into_slab(self) -> None:
        for i in range(self._blocks):
            np.copyto(self.client.rows[0][i], self.pool.rows[i])

    def out_of_slab(self) -> None:
        for i in range(self._blocks):
            np.copyto(self.pool.rows[i], self.client.rows[0][i])

    def close(self) -> None:
        self.client.goodbye()
        self.orders.close()
        self.pool.close()
        self.backend.close(5.0)


def ordered_rows(folder: Path, layout: KVLayout, blocks: int, batch: int, rounds: int) -> list[Row]:
    """GB/s of put and get where the daemon copies. Raises TierUnavailableError without a daemon."""
    size = layout.block_bytes
    host_bytes = max(3 * blocks, SLAB_BATCHES * batch) * size
    options = ["--host-bytes", str(host_bytes), "--allow-ipc"]
    with DaemonProcess(folder / f"{time.monotonic_ns()}.sock", options) as daemon:
        pages = _Pages(daemon.address, layout, blocks, batch)
        source = np.random.default_rng(0).integers(0, 256, (blocks, size), np.uint8)
        order: dict[str, Callable[[], object]] = {
            "put limit": pages.into_slab,
            "put": pages.put,
            "get": pages.get,
            "get limit": pages.out_of_slab,
        }
        if (populating := pages.client.populate()) is not None:
            populating.wait(WAIT_S)
        seconds = medians(interleave(order, rounds, warmup=3))
        pages.pool.rows[:] = source
        pages.put()
        pages.pool.rows[:] = 0
        pages.get()
        assert (pages.pool.rows == source).all()
        pages.close()
    case, said = f"{blocks} blocks of 2 MiB, {batch} a message, copied by the daemon", "limit: memcpy, the same memory"
    moved = blocks * size * 1e-9
    return [
        Row(
            *(case, name, moved / seconds[name], "GB/s", said, moved / seconds[f"{name} limit"]),
            seconds[f"{name} limit"] / seconds[name],
            rounds,
        )
        for name in ("put", "get")
    ]
