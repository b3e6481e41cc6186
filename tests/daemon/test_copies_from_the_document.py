"""A client of the copies by the daemon (feature "ipc"), after docs/protocol.md alone: `Pages` uses nothing of kvtier."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from .inside import InsideDaemon
from .running import Pagerd
from .test_from_the_document import (
    BLOCK_BYTES,
    COMMIT,
    GOODBYE,
    LEASE,
    LOOKUP,
    RELEASE,
    RESERVE,
    Client,
    Refused,
    name_blocks,
    store,
    tag,
)

EXPORT, REGISTER, COPY, SETTLE = 36, 37, 38, 39
F_ADD_SEALS, SEAL_SHRINK, SEAL_GROW = 1033, 2, 4
NUM_PAGES = 8


class Pages(Client):
    """A client with a pool of NUM_PAGES pages in a memfd, which the daemon copies from and to."""

    def __init__(self, path: str, *, register: bool = True) -> None:
        super().__init__(path, ["slab", "ipc"])
        assert "ipc" in self.welcome["features"]
        self.open(want_slab=True)
        _, (self.pidfd, channel) = self.ask_for_fds(EXPORT, epoch=self.welcome["epoch"])
        self.channel = socket.socket(fileno=channel)
        self.pool = os.memfd_create("pages", os.MFD_ALLOW_SEALING)
        size = max((NUM_PAGES + 1) * BLOCK_BYTES, 4096)
        os.posix_fallocate(self.pool, 0, size)
        self.pages = mmap.mmap(self.pool, size)
        if register:
            self.register()

    def register(self) -> None:
        fcntl.fcntl(self.pool, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW)
        socket.send_fds(self.channel, [b"p"], [self.pool])
        what = {"kind": "memfd", "handle": b"", "num_pages": NUM_PAGES, "page_bytes": BLOCK_BYTES}
        assert self.of_store(REGISTER, group=0, **what) == {}

    def page(self, number: int) -> bytes:
        return self.pages[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]

    def fill(self, number: int, block: bytes) -> None:
        self.pages[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES] = block

    def copy(self, pages: list[int], slots: bytes, *, is_write_back: bool) -> int:
        blob = struct.pack(f"<{len(pages)}I", *pages)
        return self.of_store(COPY, group=0, pages=blob, slots=slots, is_write_back=is_write_back)["count"]

    def put(self, keys: list[bytes], pages: list[int]) -> None:
        count = len(keys)
        slots = self.of_store(RESERVE, group=0, count=count)["slots"]
        assert self.copy(pages, slots, is_write_back=True) == count
        done = self.of_store(
            COMMIT,
            group=0,
            slots=slots,
            keys=b"".join(keys),
            parents=b"".join([bytes(32), *keys[:-1]]),
            tokens=struct.pack("<I", 4) * count,
            owners=tag("default") * count,
        )
        assert list(done["results"]) == [1] * count
        self.of_store(RELEASE, group=0, slots=slots)

    def get(self, keys: list[bytes], pages: list[int]) -> None:
        leased = self.of_store(LEASE, group=0, keys=b"".join(keys))
        assert min(struct.unpack(f"<{len(keys)}i", leased["slots"])) >= 0
        assert self.copy(pages, leased["slots"], is_write_back=False) == len(keys)
        now = b"".join(self.memory[1][8 * s : 8 * s + 8] for s in struct.unpack(f"<{len(keys)}I", leased["slots"]))
        assert now == leased["generations"]
        self.of_store(RELEASE, group=0, slots=leased["slots"])

    def close(self) -> None:
        self.pages.close()
        self.channel.close()
        self.socket.close()
        for fd in (self.pool, self.pidfd):
            os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with InsideDaemon(tmp_path, host_bytes=64 * BLOCK_BYTES, allow_ipc=True) as daemon:
        yield daemon.address.removeprefix("unix://")


def named(client: Client, count: int) -> tuple[list[bytes], list[bytes]]:
    keys = name_blocks(client.welcome["namespaces"].get("default", b""), list(range(100, 100 + 4 * count)))
    return keys, [np.random.default_rng(i).bytes(BLOCK_BYTES) for i in range(count)]


def test_a_client_after_the_document_orders_copies_both_ways(path):
    one, two = Pages(path), Pages(path)
    keys, blocks = named(one, 3)
    for page, block in zip((5, 0, 2), blocks, strict=True):
        one.fill(page, block)
    one.put(keys, [5, 0, 2])
    assert two.of_store(LOOKUP, keys=b"".join(keys))["num_keys"] == 3
    two.get(keys, [7, 1, 3])
    assert [two.page(page) for page in (7, 1, 3)] == blocks
    assert two.page(0) == two.page(5) == bytes(BLOCK_BYTES)
    two.get(keys[:1], [NUM_PAGES])  # the row behind the pages, to try the registration with
    assert two.page(NUM_PAGES) == blocks[0]
    for client in (one, two):
        client.ask(GOODBYE, epoch=client.welcome["epoch"])
        client.close()


def test_what_one_that_copies_by_itself_has_stored_is_the_same(path):
    plain, ordering = Client(path, ["slab"]), Pages(path)
    plain.open(want_slab=True)
    keys, blocks = named(plain, 2)
    store(plain, keys, blocks)
    ordering.get(keys, [4, 6])
    assert [ordering.page(4), ordering.page(6)] == blocks
    plain.ask(GOODBYE, epoch=plain.welcome["epoch"])
    ordering.ask(GOODBYE, epoch=ordering.welcome["epoch"])
    ordering.close()


def test_a_broken_connection_is_settled_over_another_one(path):
    broken = Pages(path)
    keys, blocks = named(broken, 1)
    broken.fill(0, blocks[0])
    broken.put(keys, [0])
    broken.socket.shutdown(socket.SHUT_RDWR)
    assert not select.select([broken.pidfd], [], [], 0)[0]  # the daemon lives, so its copies may still run
    other = Pages(path)
    assert other.ask(SETTLE, previous_epoch=broken.welcome["epoch"]) == {}
    assert other.ask(SETTLE, previous_epoch=1) == {}  # nobody's
    broken.close()  # its pages are free: nobody copies there
    other.get(keys, [3])
    assert other.page(3) == blocks[0]
    other.ask(GOODBYE, epoch=other.welcome["epoch"])
    other.close()


def test_the_pidfd_tells_when_the_daemon_is_gone(tmp_path):
    options = ("--no-prefault", "--allow-ipc")
    with Pagerd(tmp_path, host_bytes=64 * BLOCK_BYTES, options=options) as daemon:
        client = Pages(str(daemon.socket))
        assert not select.select([client.pidfd], [], [], 0)[0]
        daemon.kill()
        assert select.select([client.pidfd], [], [], 30)[0] == [client.pidfd]
        client.close()


def test_refusals_have_the_codes_of_the_document(path):
    client = Pages(path, register=False)

    def refused(kind: int, /, **fields: object) -> str:
        with pytest.raises(Refused) as error:
            client.of_store(kind, **fields)
        code, _, retry_ms = error.value.args
        assert retry_ms == 0
        return code

    what = {"group": 0, "kind": "memfd", "handle": b"", "num_pages": NUM_PAGES, "page_bytes": BLOCK_BYTES}
    assert refused(REGISTER, **what) == "protocol"  # no descriptor came
    socket.send_fds(client.channel, [b"p"], [client.pool])
    assert refused(REGISTER, **what) == "config"  # not sealed
    client.register()
    assert refused(REGISTER, **what) == "protocol"  # a second one
    order = {"group": 0, "slots": bytes(4), "is_write_back": True}
    assert refused(COPY, pages=bytes(4), **order) == "protocol"  # not its slot
    assert refused(COPY, pages=struct.pack("<I", NUM_PAGES + 1), **order) == "protocol"
    client.ask(GOODBYE, epoch=client.welcome["epoch"])
    client.close()
