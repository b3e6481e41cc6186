"""`kvtier bench daemon`: what it costs to ask a daemon instead of a pager of one's own.

Look-ups of a prompt's keys by clients in processes of their own, against the same look-up called in this process; blocks put
into and read from the daemon's slab, copied by the client or by the daemon, against a plain memcpy (daemon_copies.py).
A local Valkey or Redis and LMCache's own server do the same work in rounds with ours (daemon_peers.py). Every reply is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kvtier import KVLayout

from ...pager.client.attachment import Attachment
from ...pager.client.connection import Greeting
from ...pager.config import PagerConfig
from ...pager.daemon.store import SharedStore
from ...pager.daemon.tenants import OwnerOnly, Tenant
from ...pager.keys import owner_tag
from ...tiers.errors import ConfigError, TierUnavailableError
from . import daemon_start
from .daemon_client import LOOKUP_LAYOUT, MODEL, keys_of
from .daemon_copies import SLAB_BATCHES, SLICES, ByClient, ByDaemon, measure, rows_of, slices, stamps_of
from .daemon_peers import Peers
from .daemon_process import DaemonProcess
from .harness import Row, interleave, medians

BLOCKS = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 2 MiB
CLIENTS = (1, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=int, default=8192, metavar="N", help="keys per look-up (default 8192)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of look-ups per number of clients")
    parser.add_argument("--blocks", type=int, default=64, metavar="N", help="2 MiB blocks per round (default 64)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="blocks per message (default 16)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument(
        "--listed", type=int, default=1_000_000, metavar="N", help="blocks of the store to restart over"
    )
    parser.add_argument(
        "--lmcache", metavar="PYTHON", help="a Python that has lmcache installed, to measure its server too"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in ms and GB/s. Raises ConfigError for sizes that measure nothing, TierUnavailableError without a daemon."""
    counts = (arguments.keys, arguments.blocks, arguments.batch, arguments.rounds, arguments.listed)
    if min(counts) < 1 or arguments.seconds <= 0:
        raise ConfigError("--keys, --blocks, --batch, --rounds, --listed and --seconds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="kvtier-") as name:
        folder = Path(name)
        starts = daemon_start.rows(folder, arguments.listed, arguments.rounds)
        with Peers(folder, blocks=arguments.blocks, keys=arguments.keys, lmcache=arguments.lmcache) as peers:
            lookups, ours_s = _lookups(folder, arguments, peers)
            copies, copied_s = _copies(folder, arguments, peers)
            return [*starts, *lookups, *copies, *peers.rows(ours_s | copied_s)]


# ---------------------------------------------------------------------- look-ups
def _lookups(folder: Path, arguments: argparse.Namespace, peers: Peers) -> tuple[list[Row], dict[str, float]]:
    """Rows, and seconds of one look-up in the rounds in which the peers do theirs."""
    own_s = _in_process(arguments.keys, arguments.seconds / 2)
    rows = []
    with _daemon(folder, host_bytes=2 * arguments.keys * LOOKUP_LAYOUT.block_bytes) as daemon:
        address = daemon.address
        fill(address, arguments.keys)
        for clients in CLIENTS:
            seconds = _ask(address, clients, arguments.keys, arguments.seconds)
            case = f"look-up of {arguments.keys} keys, {clients} client{'s' * (clients > 1)}"
            for name, value, limit in (("p50", 50, 50), ("p99", 99, 99)):
                ours, reference = float(np.percentile(seconds, value)), float(np.percentile(own_s, limit))
                said = f"limit: the same look-up in-process, {name}"
                rows.append(Row.of_times(case, name, "ms", ours, said, reference, 1e3, len(seconds)))
        client, keys = Attachment.open(address, [LOOKUP_LAYOUT], MODEL, {}, Greeting("bench")), keys_of(arguments.keys)
        order: dict[str, Callable[[], object]] = {
            "lookup": partial(client.lookup, keys, prefix=True, hold=False),
            "peers": partial(peers.run_round, ("lookup",)),
        }
        compared = medians(interleave(order, arguments.rounds))
        client.goodbye()
    return rows, {"lookup": compared["lookup"]}


def _in_process(count: int, seconds: float) -> list[float]:
    """The daemon's own look-up, called."""
    config = PagerConfig(device_bytes=0, host_bytes=2 * count * LOOKUP_LAYOUT.block_bytes, host_prefault=False)
    store = SharedStore.open((LOOKUP_LAYOUT,), config, model_fingerprint=MODEL, about={})
    try:
        client, keys, group = store.attach(_owner()), keys_of(count), store.core.groups[0]
        blocks = group.directory.create(np.arange(count), owner_tag("default"))
        group.directory.bind_many(blocks, keys, np.full(count, LOOKUP_LAYOUT.block_size))
        slots = group.host.take_free(count)
        group.host.stage(slots, blocks)
        group.directory.host_slot[blocks] = slots
        group.host.publish(slots)
        group.note_new(blocks)
        spent, until_s = [], time.monotonic() + seconds
        while time.monotonic() < until_s:
            started_s = time.perf_counter()
            found = store.lookup(client, keys, prefix=True, hold=False, counts=False)
            spent.append(time.perf_counter() - started_s)
            assert found.shape == (1, count)
        return spent
    finally:
        store.close()


def fill(address: str, count: int, layout: KVLayout = LOOKUP_LAYOUT) -> None:
    """Store blocks under the keys that will be asked for."""
    client = Attachment.open(address, [layout], MODEL, {}, Greeting("bench"))
    keys, done = keys_of(count), 0
    while done < count:
        rows, _ = client.reserve(0, min(4096, count - done), 10.0)
        part = keys[done : done + len(rows)]
        client.commit(0, rows, stamps_of(part, layout), [b""] * len(part))
        client.release(0, rows)
        done += len(rows)
    client.goodbye()


def _ask(address: str, clients: int, count: int, seconds: float) -> list[float]:
    """Seconds of every look-up of that many processes at once."""
    start_s = time.time() + 2.0 + 0.3 * clients
    command = [
        sys.executable,
        "-m",
        "kvtier.tools.bench.daemon_client",
        address,
        str(count),
        repr(start_s),
        str(seconds),
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    found: list[float] = []
    for process in running:
        out, _ = process.communicate(timeout=seconds + 60)
        if process.returncode:
            raise TierUnavailableError(f"a client of the benchmark ended with {process.returncode}")
        found += json.loads(out)
    return found


# ---------------------------------------------------------------------- blocks
def _copies(folder: Path, arguments: argparse.Namespace, peers: Peers) -> tuple[list[Row], dict[str, float]]:
    """Rows, and seconds of put and get by the client in the rounds in which the peers do theirs."""
    blocks, batch, rounds = arguments.blocks, min(arguments.batch, arguments.blocks), arguments.rounds
    host_bytes = max(3 * blocks, SLAB_BATCHES * batch) * BLOCKS.block_bytes
    moved_gb, case = blocks * BLOCKS.block_bytes * 1e-9, f"{blocks} blocks of 2 MiB, {batch} a message"
    rows: list[Row] = []
    kinds: list[tuple[type[ByClient | ByDaemon], str]] = [(ByClient, ""), (ByDaemon, ", copied by the daemon")]
    for kind, said in kinds:
        with _daemon(folder, host_bytes=host_bytes, options=("--allow-ipc",)) as daemon:
            copies = kind(daemon.address, BLOCKS, blocks, batch)
            rows += rows_of(measure(copies, rounds), case + said, moved_gb, rounds)
            if kind is ByClient:  # in rounds of their own
                compared = medians(
                    interleave(
                        {"put": copies.put, "get": copies.get, "peers": partial(peers.run_round, ("put", "get"))},
                        rounds,
                    )
                )
            copies.close()
    one_layer, count = replace(BLOCKS, num_layers=1), max(SLICES)
    with _daemon(folder, host_bytes=SLAB_BATCHES * count * one_layer.block_bytes, options=("--allow-ipc",)) as daemon:
        ordering = ByDaemon(daemon.address, one_layer, count, count)
        rows += slices(ordering, np.ones((count, BLOCKS.block_bytes), np.uint8), rounds)
        ordering.close()
    return rows, compared


# ---------------------------------------------------------------------- parts
def _daemon(folder: Path, *, host_bytes: int, options: Sequence[str] = ()) -> DaemonProcess:
    """A pagerd of its own, on memory only."""
    return DaemonProcess(folder / f"{time.monotonic_ns()}.sock", ["--host-bytes", str(host_bytes), *options])


def _owner() -> Tenant:
    found = OwnerOnly().find(os.getuid(), "")
    assert found is not None
    return found
