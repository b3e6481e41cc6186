"""Pagers, engines and their clients come and go, hundreds of times: descriptors, threads, pins and memory stay flat."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from kvtier.pager.client.asynchronous import AsyncDaemonConnection
from kvtier.pager.client.connection import Greeting
from kvtier.pager.clients import Clients
from kvtier.pager.config import PagerConfig
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.lease import Span
from kvtier.pager.pager import Pager
from kvtier.pager.protocol import fetch_status
from kvtier.tiers.layout import KVLayout

from ..daemon import raw
from ..daemon.inside import InsideDaemon
from ..daemon.running import wait_for

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
MOST_GROWTH_BYTES = 16 << 20
WARM_UP = 10  # rounds in which caches fill
SETTLE_S = 10.0  # threads and descriptors of what has ended go a little later
LATE_THREADS = 4  # a pool starts a thread when all it has are busy, which may first happen after the warm-up


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    descriptors: int
    threads: int
    resident_bytes: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors = len(os.listdir("/proc/self/fd"))
        return cls(descriptors, threading.active_count(), pages * os.sysconf("SC_PAGESIZE"))

    def counts_no_more_than(self, before: Held) -> bool:
        return self.descriptors <= before.descriptors and self.threads <= before.threads + LATE_THREADS


def stays_flat(once: Callable[[int], None], rounds: int, warm_up: int = WARM_UP) -> Held:
    """Run so often; what is held after the warm-up is held at the end: memory within a bound, threads but for a pool's last."""
    assert rounds > LATE_THREADS  # a thread left per round must show
    for number in range(warm_up):
        once(number)
    before = Held.now()
    for number in range(rounds):
        once(number)
    after, deadline_s = Held.now(), time.monotonic() + SETTLE_S
    while not after.counts_no_more_than(before) and time.monotonic() < deadline_s:
        time.sleep(0.05)
        after = Held.now()
    print(f"{rounds} rounds: {before} -> {after}")
    assert after.counts_no_more_than(before), (before, after)
    assert after.resident_bytes - before.resident_bytes < MOST_GROWTH_BYTES, (before, after)
    return after


def one_pager(path: Path, number: int) -> None:
    """Opens the store that the one before left, computes, parks, resumes, is looked at, and goes."""
    size = LAYOUT.block_bytes
    config = PagerConfig(
        device_bytes=40 * size, host_bytes=40 * size, nvme_path=path, nvme_bytes="4MiB", backend="cpu", staging_bytes=0
    )
    with Pager.open(LAYOUT, config, model_fingerprint="churn") as pager:
        if number % WARM_UP:
            seq, parked = pager.resume("s")
            assert parked.num_computed == len(parked.token_ids)
        else:
            if "s" in pager.sessions():
                pager.forget("s")
            seq = pager.begin()
        start = pager.num_computed(seq)
        pager.append(seq, [number + i for i in range(20)])
        with pager.lease([Span(seq, start, start + 20)]) as lease:
            rows = pager.device_rows(0)
            pager.backend.compute.run(lambda pages=lease.tables[0][0]: rows[pages].fill(1))
            lease.commit()
        assert fetch_status(str(path))["version"] == 1
        pager.park("s", seq)
        pager.check_integrity()
        group = pager._core.groups[0]
        assert pager.drain(10.0)  # a session that comes back often is fetched as soon as it is parked
        assert not group.pages.pins.any() and not group.host.holds.any()


def one_refusal(path: Path, number: int) -> None:
    """A pager that cannot be opened leaves nothing behind."""
    from kvtier.tiers.errors import ConfigError

    config = PagerConfig(device_bytes=40 * LAYOUT.block_bytes, host_bytes=1 << 16, nvme_path=path, backend="cpu")
    with pytest.raises(ConfigError):
        Pager.open(LAYOUT, config, model_fingerprint=f"another {number}")


def one_crowd(number: int) -> None:
    """Client processes attach, hold something and are killed."""
    held: set[int] = set()
    clients = Clients()
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        client = clients.attach(process.pid)
        held.add(client)
        clients.hold(client, partial(held.remove, client))
        clients.disconnected(client)
    assert clients.reap() == 0 and len(held) == 3
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
    assert clients.reap() == 3 and not held and len(clients) == 0


class Visitors:
    """One who maps the slab, and one who does not."""

    def find(self, uid: int, token: str, gids: Collection[int] = ()) -> Tenant | None:
        return Tenant("default", {"default": b"s" * 32}, maps_slab=token == "maps")


def one_visit(daemon: InsideDaemon, number: int) -> None:
    """Connections that end with a word, without one, and in the middle of a frame; this process lives on."""
    silent, polite = (raw.attach(daemon.address, token=token) for token in ("", "maps"))
    raw.put(silent, [2 * number], keep=True)
    raw.put(polite, [2 * number + 1])
    silent.connection.close()
    assert polite.goodbye()

    async def ask() -> None:
        await (await AsyncDaemonConnection.open(daemon.address, Greeting("churn"))).close()

    asyncio.run(ask())
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(daemon.address.removeprefix("unix://"))
        peer.sendall(b"half")
    wait_for(lambda: not daemon.service._connections and not len(daemon.service.processes))
    assert not daemon.service.attachments.left and daemon.store.pinned_slots() == 0


class Ended:
    """Listens to one submission."""

    def __init__(self) -> None:
        self.tokens, self.is_over = 0, threading.Event()

    def on_token(self, index: int, token: int, logprob: object) -> bool:
        self.tokens += 1
        return False

    def on_end(self, index: int, output: object, error: BaseException | None) -> None:
        self.is_over.set()


def make_engines() -> Callable[[int], None]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kvtier import Engine, SamplingParams
    from kvtier.engine.loop import EngineLoop

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    def one(number: int) -> None:
        engine = Engine.from_model(model, PagerConfig(device_bytes="1MiB", host_bytes="1MiB", backend="cpu"))
        loop, heard = EngineLoop(engine), [Ended() for _ in range(3)]
        for i, listener in enumerate(heard):
            loop.submit([1, 2, 3 + i], SamplingParams(max_tokens=3), listener)
        assert all(listener.is_over.wait(60) and listener.tokens == 3 for listener in heard)
        loop.close()
        engine.close()

    return one


def test_pagers_come_and_go(tmp_path):
    stays_flat(lambda number: one_pager(tmp_path / "store", number), 60, warm_up=4 * WARM_UP)  # the heap fills slowly


def test_pagers_that_are_refused(tmp_path):
    one_pager(tmp_path / "store", 0)
    stays_flat(lambda number: one_refusal(tmp_path / "store", number), 100)


def test_clients_come_and_go():
    stays_flat(one_crowd, 20)


def test_connections_of_a_daemon_come_and_go(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=16 * raw.SIZE, tenants=Visitors()) as daemon:
        stays_flat(partial(one_visit, daemon), 40)


def test_engines_come_and_go():
    stays_flat(make_engines(), 15)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_connections_of_a_daemon_for_a_long_time(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=16 * raw.SIZE, tenants=Visitors()) as daemon:
        stays_flat(partial(one_visit, daemon), 3000)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("what", ["pagers", "refusals", "clients", "engines"])
def test_for_a_long_time(tmp_path, what):
    one_pager(tmp_path / "store", 0)
    once = {
        "pagers": lambda: lambda number: one_pager(tmp_path / "store", number),
        "refusals": lambda: lambda number: one_refusal(tmp_path / "store", number),
        "clients": lambda: one_crowd,
        "engines": make_engines,
    }[what]()
    stays_flat(once, 500)
