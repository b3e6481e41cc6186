"""Blocks put into a daemon's slab and got out of it, for `kvtier bench daemon`: copied by the client or by the daemon.

As a client's pager does it: while one batch is copied, on copy streams, the one before is named, and room for the next is on
its way. Against a plain memcpy (one thread) of as many bytes between the same two memories, in the same rounds. Every block is
checked. Pages are those of the CPU backend; on a GPU gpu_check runs the test of daemon copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvtier import KVLayout

from ...pager.client.attachment import Attachment
from ...pager.client.connection import DaemonConnection, Greeting, Reply
from ...pager.client.orders import CopyOrders
from ...pager.keys import owner_tag
from ...pager.rules import ALL_RULES
from ...pager.wire.messages import ALL_FEATURES, STORED, TAKEN, Committed, Leased, Slots
from ...tiers.cpu import CpuBackend, HostEvent
from ...tiers.errors import Busy, KvTierError
from ...tiers.exported import export_rows
from ...tiers.nvme.manifest import STAMP
from ...tiers.streams import DONE, Event, IntArray, Rows
from .harness import Row, interleave, medians

SLAB_BATCHES = 17  # one client may have a quarter: one batch is reserved, one copied, one named, one to spare
WAIT_S = 60.0
SLICES = (1, 16, 64)  # at once


@dataclass(slots=True)
class _Batch:
    names: list[bytes]
    rows: IntArray
    event: Event

    def wait(self) -> None:
        assert self.event.wait(WAIT_S)
        if self.event.error is not None:
            raise self.event.error


class SlabCopies:
    """Pages of this process, as many as a round has blocks, and the daemon's slab."""

    def __init__(self, client: Attachment, layout: KVLayout, blocks: int, batch: int, pages: Rows) -> None:
        self.client, self.pages = client, pages
        self._layout, self._blocks, self._batch, self._round = layout, blocks, batch, 0
        self._room: Reply[Slots] | None = None  # asked for ahead, also across rounds, as a pager has rows to spare

    def copy(self, pages: IntArray, rows: IntArray, *, is_write_back: bool) -> Event:
        raise NotImplementedError

    def put(self, *, copies: bool = True) -> None:
        self._round += 1
        done, under_way = [], deque[_Batch]()
        for names in self._batches():
            rows = self._reserved(len(names))
            under_way.append(self._begin(names, rows, copies, is_write_back=True))
            if len(under_way) > 1:
                done.append(self._name(under_way.popleft()))
        done += map(self._name, under_way)
        for reply in done:
            assert {result & STORED for result in reply.result().results} == {TAKEN}

    def get(self, *, copies: bool = True) -> None:
        batches, under_way = self._batches(), deque[_Batch]()
        ahead = self._lease(batches[0])
        for names, following in zip(batches, [*batches[1:], None], strict=True):
            leased = ahead.result()
            if following is not None:
                ahead = self._lease(following)
            rows = np.frombuffer(leased.slots, "<i4")
            assert (rows >= 0).all(), "the slab is too small for this benchmark"
            under_way.append(self._begin(names, rows, copies, is_write_back=False))
            if len(under_way) > 1:
                self._release(under_way.popleft())
        for batch in under_way:
            self._release(batch)

    # ------------------------------------------------------------------ parts of both
    def _begin(self, names: list[bytes], rows: IntArray, copies: bool, *, is_write_back: bool) -> _Batch:
        first = int.from_bytes(names[0][16:], "little")
        pages = np.arange(first, first + len(names))
        return _Batch(names, rows, self.copy(pages, rows, is_write_back=is_write_back) if copies else DONE)

    def _reserved(self, count: int) -> IntArray:
        """Rows to write to, and room for as many more on its way."""
        reply = self._room or self.client.begin_reserve(0, count)
        try:
            rows = np.frombuffer(reply.result().slots, "<i4")
        except Busy:
            rows, _ = self.client.reserve(0, count, WAIT_S)
        assert len(rows) == count, "the slab is too small for this benchmark"
        self._room = self.client.begin_reserve(0, count)
        return rows

    def _name(self, batch: _Batch) -> Reply[Committed]:
        batch.wait()
        stamps = stamps_of(batch.names, self._layout)
        reply = self.client.begin_commit(0, batch.rows, stamps, [b""] * len(batch.names))
        self.client.begin_release(0, batch.rows)  # served behind the commit
        return reply

    def _lease(self, names: list[bytes]) -> Reply[Leased]:
        return self.client.begin_lease(0, b"".join(names), WAIT_S)

    def _release(self, batch: _Batch) -> None:
        batch.wait()
        self.client.begin_release(0, batch.rows)

    def _batches(self) -> list[list[bytes]]:
        names = [self._round.to_bytes(16, "little") + i.to_bytes(16, "little") for i in range(self._blocks)]
        return [names[first : first + self._batch] for first in range(0, self._blocks, self._batch)]

    # ------------------------------------------------------------------ the reference
    def into_slab(self) -> None:
        for i in range(self._blocks):
            np.copyto(self.client.rows[0][i], self.pages[i])

    def out_of_slab(self) -> None:
        for i in range(self._blocks):
            np.copyto(self.pages[i], self.client.rows[0][i])

    def close(self) -> None:
        self.client.goodbye()


class ByClient(SlabCopies):
    """On copy streams of ours."""

    def __init__(self, address: str, layout: KVLayout, blocks: int, batch: int) -> None:
        client = Attachment.open(address, [layout], "bench", {}, Greeting("bench"))
        self._backend = CpuBackend()
        pages = self._backend.alloc_host(blocks, layout.block_bytes)
        super().__init__(client, layout, blocks, batch, pages)

    def copy(self, pages: IntArray, rows: IntArray, *, is_write_back: bool) -> Event:
        slab = self.client.rows[0]
        if is_write_back:
            self._backend.demote.copy_rows(slab, rows, self.pages, pages)
            return self._backend.demote.record()
        self._backend.promote.copy_rows(self.pages, pages, slab, rows)
        return self._backend.promote.record()

    def close(self) -> None:
        super().close()
        self._backend.close(5.0)


class ByDaemon(SlabCopies):
    """Ordered: transfer="ipc"."""

    def __init__(self, address: str, layout: KVLayout, blocks: int, batch: int) -> None:
        client = Attachment.open(address, [layout], "bench", {}, Greeting("bench", features=ALL_FEATURES))
        self._backend = CpuBackend()
        self._pool = export_rows(self._backend, blocks, layout.block_bytes)
        super().__init__(client, layout, blocks, batch, self._pool.rows)
        self._orders = CopyOrders.begin(client, ALL_RULES, lambda: DaemonConnection.open(address))
        self._orders.register(0, self._pool)

    def copy(self, pages: IntArray, rows: IntArray, *, is_write_back: bool) -> Event:
        told = _Told()
        self._orders.copy(0, pages, rows, is_write_back=is_write_back, order=told)
        return told.event

    def close(self) -> None:
        super().close()
        self._orders.close()
        self._pool.close()
        self._backend.close(5.0)


class _Told:
    """An order that its giver waits for."""

    def __init__(self) -> None:
        self.event = HostEvent()

    def over(self, error: KvTierError | None) -> None:
        self.event.finish(error)

    def in_doubt(self) -> None:
        """The benchmark ends with it."""


def measure(copies: SlabCopies, rounds: int) -> dict[str, float]:
    """Seconds of put, get, their limits (memcpy) and their messages alone."""
    order: dict[str, Callable[[], object]] = {
        "put limit": copies.into_slab,
        "put": copies.put,
        "get": copies.get,
        "get limit": copies.out_of_slab,
        "put messages": partial(copies.put, copies=False),
        "get messages": partial(copies.get, copies=False),
    }
    if (populating := copies.client.populate()) is not None:
        populating.wait(WAIT_S)
    seconds = medians(interleave(order, rounds, warmup=3))  # every row was touched once
    source = np.random.default_rng(0).integers(0, 256, copies.pages.shape, np.uint8)
    copies.pages[:] = source
    copies.put()
    copies.pages[:] = 0
    copies.get()
    assert (copies.pages == source).all()
    return seconds


def rows_of(seconds: dict[str, float], case: str, moved_gb: float, rounds: int) -> list[Row]:
    """GB/s against the memcpy, and what asking takes where nothing is copied; with copies, most of it is under them."""
    rows = []
    for name in ("put", "get"):
        rate, limit = moved_gb / seconds[name], moved_gb / seconds[f"{name} limit"]
        said = "limit: memcpy by one thread, the same memory"
        rows.append(Row(case, name, rate, "GB/s", said, limit, seconds[f"{name} limit"] / seconds[name], rounds))
    for name in ("put", "get"):
        asked_s, whole_s = seconds[f"{name} messages"], seconds[name]
        said = f"the whole {name}, same rounds"
        rows.append(Row(case, f"{name}_messages", asked_s * 1e3, "ms", said, whole_s * 1e3, whole_s / asked_s, rounds))
    return rows


def slices(copies: ByDaemon, blocks: Rows, rounds: int) -> list[Row]:
    """One layer's slice of some blocks: ordered from the daemon, against copied by the client, as streaming does it.

    copies: of a layout of one layer, all its blocks in one batch; blocks: whole ones, [blocks, bytes], of many such layers.
    """
    copies.put()
    (names,) = copies._batches()
    rows = np.frombuffer(copies._lease(names).result().slots, "<i4")
    size, found = copies.pages.shape[1], []
    own = np.zeros_like(copies.pages)
    for count in SLICES:
        pages = np.arange(count)

        def by_client(pages: IntArray = pages) -> None:
            own[pages] = blocks[pages, :size]

        def by_daemon(pages: IntArray = pages) -> None:
            _Batch([], pages, copies.copy(pages, rows[pages], is_write_back=False)).wait()

        seconds = medians(interleave({"client": by_client, "daemon": by_daemon}, 10 * rounds, warmup=3))
        case, said = f"{count} layer slices of {size >> 10} KiB, copied by the daemon", "copied by the client"
        found.append(
            Row.of_times(case, "time", "ms", seconds["daemon"], said, seconds["client"], 1e3, 10 * rounds),
        )
    copies.client.release(0, rows)
    return found


def stamps_of(keys: list[bytes], layout: KVLayout) -> np.ndarray:
    found = np.zeros(len(keys), STAMP)
    found["key"] = np.frombuffer(b"".join(keys), "V32")
    found["tokens"], found["owner"] = layout.block_size, owner_tag("default")
    return found
