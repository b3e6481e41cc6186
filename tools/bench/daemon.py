"""`kvtier bench daemon`: what it costs to ask a daemon instead of a pager of one's own.

Look-ups of a prompt's keys by clients in processes of their own, against the same look-up called in this process; blocks put
into and read from the daemon's slab, against a plain memcpy of as many bytes from and to the same memory, in the same rounds;
the same where the daemon does the copies (daemon_ordered.py).
A local Valkey or Redis and LMCache's own server do the same work in those rounds (daemon_peers.py). Every reply is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from kvtier import KVLayout

from ...pager.client.attachment import Attachment
from ...pager.client.connection import Greeting, Reply
from ...pager.config import PagerConfig
from ...pager.daemon.store import SharedStore
from ...pager.daemon.tenants import OwnerOnly, Tenant
from ...pager.keys import owner_tag
from ...pager.wire.messages import TAKEN, Slots
from ...tiers.errors import Busy, ConfigError, TierUnavailableError
from ...tiers.nvme.manifest import STAMP
from . import daemon_start
from .daemon_client import LOOKUP_LAYOUT, MODEL, keys_of
from .daemon_ordered import ordered_rows
from .daemon_peers import Peers
from .daemon_process import DaemonProcess
from .harness import Row, interleave, medians

BLOCKS = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 2 MiB
CLIENTS = (1, 8)
SLAB_BATCHES = 13  # one client may have a quarter of the slots, and has up to three batches


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
            ours_s |= copied_s
            batch = min(arguments.batch, arguments.blocks)
            ordered = ordered_rows(folder, BLOCKS, arguments.blocks, batch, arguments.rounds)
            return [*starts, *lookups, *copies, *ordered, *peers.rows(ours_s)]


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
        client.commit(0, rows, _stamps(part, layout.block_size), [b""] * len(part))
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
@dataclass(slots=True)
class _Copies:
    """Blocks of this process, into and out of the daemon's slab."""

    client: Attachment
    blocks: int
    batch: int
    source: np.ndarray
    target: np.ndarray
    round: int = 0
    ahead: Reply[Slots] | None = None  # room for the next batch, as a client's pager has some to spare

    def put(self, *, copies: bool = True) -> None:
        """While one batch is copied, room for the next, be it of the next round, is on its way and the one before is named."""
        self.round += 1
        said, done, counts = self.client, [], self._counts()
        ahead = self.ahead or said.begin_reserve(0, counts[0])
        for names, following in zip(self._batches(), [*counts[1:], counts[0]], strict=True):
            rows = self._reserved(ahead, len(names))
            self.ahead = ahead = said.begin_reserve(0, following)
            if copies:
                for row, source in zip(rows.tolist(), self._rows_of(names, self.source), strict=True):
                    np.copyto(said.rows[0][row], source)
            done.append(said.begin_commit(0, rows, _stamps(names, BLOCKS.block_size), [b""] * len(names)))
            said.begin_release(0, rows)  # served behind the commit
        for reply in done:
            assert set(reply.result().results) == {TAKEN}

    def get(self, *, copies: bool = True) -> None:
        """While one batch is copied, the next is leased."""
        said, batches = self.client, self._batches()
        ahead = said.begin_lease(0, b"".join(batches[0]), 10.0)
        for names, following in zip(batches, [*batches[1:], []], strict=True):
            leased = ahead.result()
            rows, generations = np.frombuffer(leased.slots, "<i4"), np.frombuffer(leased.generations, np.uint64)
            assert (rows >= 0).all(), "the slab is too small for this benchmark"
            if following:
                ahead = said.begin_lease(0, b"".join(following), 10.0)
            if copies:
                for row, target in zip(rows.tolist(), self._rows_of(names, self.target), strict=True):
                    np.copyto(target, said.rows[0][row])
            assert (said.generations[0][rows] == generations).all()
            said.begin_release(0, rows)

    def _reserved(self, reply: Reply[Slots], count: int) -> np.ndarray:
        """Rows to write to; asked for again where the daemon was busy."""
        try:
            rows = np.frombuffer(reply.result().slots, "<i4")
        except Busy:
            rows, _ = self.client.reserve(0, count, 10.0)
        assert len(rows) == count, "the slab is too small for this benchmark"
        return rows

    def _batches(self) -> list[list[bytes]]:
        names = [_name(self.round, i) for i in range(self.blocks)]
        return [names[first : first + self.batch] for first in range(0, self.blocks, self.batch)]

    def _counts(self) -> list[int]:
        return [len(names) for names in self._batches()]

    def _rows_of(self, names: list[bytes], memory: np.ndarray) -> np.ndarray:
        first = int.from_bytes(names[0][16:], "little")
        return memory[first : first + len(names)]

    def into_slab(self) -> None:
        """The copies of `put` alone."""
        for i in range(self.blocks):
            np.copyto(self.client.rows[0][i], self.source[i])

    def out_of_slab(self) -> None:
        for i in range(self.blocks):
            np.copyto(self.target[i], self.client.rows[0][i])


def _copies(folder: Path, arguments: argparse.Namespace, peers: Peers) -> tuple[list[Row], dict[str, float]]:
    """Rows, and seconds of put and get. The peers take their turns in the same rounds."""
    size = BLOCKS.block_bytes
    blocks, batch = arguments.blocks, min(arguments.batch, arguments.blocks)
    with _daemon(folder, host_bytes=max(2 * blocks, SLAB_BATCHES * batch) * size) as daemon:
        client = Attachment.open(daemon.address, [BLOCKS], MODEL, {}, Greeting("bench"))
        source = np.random.default_rng(0).integers(0, 256, (blocks, size), np.uint8)
        copies = _Copies(client, blocks, batch, source, np.ones((blocks, size), np.uint8))
        ours = {"put": copies.put, "get": copies.get}
        order: dict[str, Callable[[], object]] = {
            "put limit": copies.into_slab,
            **ours,
            "get limit": copies.out_of_slab,
            "put messages": partial(copies.put, copies=False),
            "get messages": partial(copies.get, copies=False),
            "peers": partial(peers.run_round, ("put", "get")),
        }
        if (populating := client.populate()) is not None:
            populating.wait(60.0)
        seconds = medians(interleave(order, arguments.rounds, warmup=3))  # every row was touched once
        copies.put()
        copies.get()
        assert (copies.target == source).all()
        client.goodbye()
    moved, case = blocks * size * 1e-9, f"{blocks} blocks of 2 MiB, {batch} a message"
    rows = [
        Row(
            case,
            name,
            moved / seconds[name],
            "GB/s",
            "limit: memcpy to or from the same memory",
            moved / seconds[f"{name} limit"],
            seconds[f"{name} limit"] / seconds[name],
            arguments.rounds,
        )
        for name in ours
    ]
    rows += [_messages(case, name, seconds, arguments.rounds) for name in ours]
    return rows, {name: seconds[name] for name in ours}


def _messages(case: str, name: str, seconds: Mapping[str, float], rounds: int) -> Row:
    """What asking takes where nothing is copied; with copies, most of it is under them."""
    asked_s, whole_s = seconds[f"{name} messages"], seconds[name]
    said = f"the whole {name}, same rounds"
    return Row(case, f"{name}_messages", asked_s * 1e3, "ms", said, whole_s * 1e3, whole_s / asked_s, rounds)


# ---------------------------------------------------------------------- parts
def _daemon(folder: Path, *, host_bytes: int) -> DaemonProcess:
    """A pagerd of its own, on memory only."""
    return DaemonProcess(folder / f"{time.monotonic_ns()}.sock", ["--host-bytes", str(host_bytes)])


def _owner() -> Tenant:
    found = OwnerOnly().find(os.getuid(), "")
    assert found is not None
    return found


def _stamps(keys: list[bytes], tokens: int) -> np.ndarray:
    found = np.zeros(len(keys), STAMP)
    found["key"] = np.frombuffer(b"".join(keys), "V32")
    found["tokens"], found["owner"] = tokens, owner_tag("default")
    return found


def _name(number: int, index: int) -> bytes:
    return number.to_bytes(16, "little") + index.to_bytes(16, "little")
