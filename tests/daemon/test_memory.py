"""The daemon's memory stays within what it was given, 10 % and 64 MiB, whatever clients ask of it."""

from __future__ import annotations

import threading

import numpy as np

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.tiers.layout import KVLayout

from .raw import key, stamps
from .running import Pagerd

LAYOUT = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=64, dtype="float32")  # 512 KiB
HOST_BYTES = 64 << 20
BOUND = HOST_BYTES * 11 // 10 + (64 << 20)
OVERLOAD = 4


def fill(daemon: Pagerd, first: int, count: int, *, over_socket: bool) -> None:
    """Store blocks and read them back, never giving up a hold before the daemon makes us."""
    features = ("bytes",) if over_socket else ("slab", "bytes")
    client = Attachment.open(daemon.address, [LAYOUT], "memory", {}, Greeting("test", features=features))
    row_bytes, rng = LAYOUT.block_bytes, np.random.default_rng(first)
    for number in range(first, first + count):
        rows, _ = client.reserve(0, 1, 30.0)
        block = rng.integers(0, 256, row_bytes, np.uint8)
        if over_socket:
            client.write_rows(0, rows[:1], block[None], np.zeros(1, np.int64))
        else:
            client.rows[0][rows[0]] = block
        results, _ = client.commit(0, rows, stamps([number], tokens=64), [b""])
        assert results[0] & 3 == 1
        client.release(0, rows)
        if number % 8 == 0:
            got, _ = client.lease(0, b"".join(map(key, range(max(first, number - 7), number + 1))), 30.0)
            if over_socket:
                target = np.empty((len(got), row_bytes), np.uint8)
                client.read_rows(0, got[got >= 0], target, np.arange(int((got >= 0).sum())))
            client.release(0, got[got >= 0])
    client.goodbye()


def test_memory_stays_within_its_bound_under_overload(tmp_path):
    blocks = OVERLOAD * HOST_BYTES // LAYOUT.block_bytes
    with Pagerd(tmp_path, host_bytes=HOST_BYTES, nvme_bytes=2 * OVERLOAD * HOST_BYTES, starts_cold=True) as daemon:
        clients = [
            threading.Thread(target=fill, args=(daemon, start, blocks // 2), kwargs={"over_socket": bool(start)})
            for start in (0, 100_000)
        ]
        for client in clients:
            client.start()
        most = 0
        while any(client.is_alive() for client in clients):
            most = max(most, daemon.resident_bytes())
            clients[0].join(0.02)
        for client in clients:
            client.join()
        stored = daemon.status()["tiers"]["nvme"]["blocks"] + daemon.status()["tiers"]["host"]["blocks"]
        assert stored >= blocks
        assert HOST_BYTES // 2 < most <= BOUND, f"{most >> 20} MiB of {BOUND >> 20}"
        print(f"{most >> 20} MiB of {BOUND >> 20}")
