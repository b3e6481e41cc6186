"""Kills without mercy: the daemon under load and in mid-copy, clients in mid-copy. Nothing wrong is read, nothing that was
acknowledged is lost, and what the dead held is free again within two seconds.

Each loop runs twice: engines copy between their pages and the slab themselves, or the daemon does (transfer="ipc").
Longer: pytest -m soak tests/daemon/test_kills.py, where what is promised to take two seconds has to; what fails says how to
run it again.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from ..pager.harness import LAYOUT
from .loading import LoadClient, check_acknowledged
from .punctual import MOST_S, Stopwatch
from .running import Pagerd, wait_for

SIZE = LAYOUT.block_bytes
MOST_THREADS = 16  # of the pools that start threads when they are needed
KINDS = {"client": (), "daemon": ("ipc",)}  # of load clients, by who copies
by_both = pytest.mark.parametrize("copies", list(KINDS), ids="copied_by_{}".format)


def running(tmp_path: Path, copies: str) -> Pagerd:
    options = ("--no-prefault", "--allow-ipc")
    sizes = {"host_bytes": 96 * SIZE, "nvme_bytes": 128_000 * SIZE}  # a block takes 4 KiB there; no session ever goes
    return Pagerd(tmp_path, **sizes, options=options, slow_copies=copies == "daemon")


def end_all(clients: list[LoadClient], copies: str) -> dict[str, int]:
    """Let them finish. Returns what was acknowledged to them; engines whose daemon is to copy have one that does."""
    for client in clients:
        client.end()
        assert not client.wrong
    assert all(client.done["copies"] == copies for client in clients if client.kind == KINDS[copies])
    return {name: tokens for client in clients for name, tokens in client.acknowledged.items()}


def check_end(daemon: Pagerd, acknowledged: dict[str, int]) -> None:
    wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
    check_acknowledged(daemon, acknowledged)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log, daemon.log[-3000:]


def wait_for_more(clients: list[LoadClient]) -> None:
    """Until each has been told something since now."""
    told = [len(client.lines) for client in clients]
    wait_for(lambda: all(len(client.lines) > lines for client, lines in zip(clients, told, strict=True)), 120.0)


def kill_daemons(tmp_path: Path, kills: int, seed: int, copies: str) -> float:
    """Returns how long the slowest restart took until it served."""
    choose, watch = random.Random(seed), Stopwatch()
    with running(tmp_path, copies) as daemon:
        clients = [LoadClient(daemon, seed * 10, *KINDS[copies]), LoadClient(daemon, seed * 10 + 1, "private")]
        for client in clients:
            client.wait_ready()
        for _ in range(kills):
            time.sleep(choose.choice([0.1, 0.5, 1.0, 1.5]) * choose.uniform(0.8, 1.2))
            daemon.kill()
            watch.start()
            daemon.start()
            watch.stop()
        wait_for_more(clients)
        acknowledged = end_all(clients, copies)
        assert acknowledged
        print(f"seed {seed}: {kills} kills, {len(acknowledged)} sessions, {[c.done for c in clients]}")
        print(f"ready in {watch.slowest_s:.2f} s")
        check_end(daemon, acknowledged)
    return watch.slowest_s


def kill_clients(tmp_path: Path, kills: int, seed: int, copies: str) -> float:
    """Returns after how long the daemon had noticed the slowest death."""
    choose, watch = random.Random(seed), Stopwatch()
    with running(tmp_path, copies) as daemon:
        witness = LoadClient(daemon, seed, *KINDS[copies])
        witness.wait_ready()
        acknowledged: dict[str, int] = {}
        held_before = daemon.held_for_clients()
        for number in range(kills):
            client = LoadClient(daemon, 1000 * (seed + 1) + number % 3, *KINDS[copies])
            client.wait_ready()
            if number % 2:  # however slow it is, one that was promised something
                wait_for(lambda client=client: client.acknowledged)
            time.sleep(choose.uniform(0.0, 0.4))
            watch.start()
            client.kill()
            if number % 3 == 0 or number == kills - 1:  # the next one comes before most are noticed
                wait_for(lambda: daemon.status()["daemon"]["attached_processes"] == 1)
                watch.stop()
            assert not client.wrong
            acknowledged |= client.acknowledged
        assert acknowledged
        held = daemon.held_for_clients()  # as for the witness alone; threads come as there is work, so many and no more
        assert held[0] <= held_before[0] + 2 and held[1] <= held_before[1] + MOST_THREADS, (held_before, held)
        told = end_all([witness], copies)
        print(f"seed {seed}: {kills} kills, {len(acknowledged)} sessions, {witness.done}")
        print(f"noticed in {watch.slowest_s:.2f} s")
        check_end(daemon, acknowledged | told)
    return watch.slowest_s


def kill_engines_in_copies(tmp_path: Path, kills: int, seed: int, copies: str) -> float:
    """Each dies with half a copy between its pages and the slab done, one way or the other; or with one that the daemon
    makes for it just ordered. Returns how long the slowest one's pins outlived it."""
    choose, watch = random.Random(seed), Stopwatch()
    with running(tmp_path, copies) as daemon:
        acknowledged: dict[str, int] = {}
        for number in range(kills):
            dies = f"dies={choose.randrange(3, 120)}"
            client = LoadClient(daemon, 1000 * (seed + 1) + number % 3, dies, *KINDS[copies])
            client.wait_killed()
            watch.start()
            assert not client.wrong
            acknowledged |= client.acknowledged
            wait_for(lambda: daemon.status()["daemon"]["attached_processes"] == 0)
            if copies == "daemon":  # and behind the last copy that it ordered
                wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
            assert daemon.status()["daemon"]["pinned_slots"] == 0  # pins are leases of processes that live
            watch.stop()
        print(f"seed {seed}: {kills} kills, pins gone in {watch.slowest_s:.2f} s, {len(acknowledged)} sessions")
        check_end(daemon, acknowledged)
    return watch.slowest_s


def kill_daemons_in_copies(tmp_path: Path, kills: int, seed: int, copies: str) -> float:
    """Each dies with half a call done: of the disk, the journal, a block from a socket, or a copy between a page of a client's
    and a slot; three engines go on meanwhile. Returns how long the last restart took until it served."""
    choose, watch = random.Random(seed), Stopwatch()
    with running(tmp_path, copies) as daemon:
        kinds = (KINDS[copies], ("private",), KINDS[copies])
        clients = [LoadClient(daemon, seed * 10 + number, *kind) for number, kind in enumerate(kinds)]
        for client in clients:
            client.wait_ready()
        daemon.kill()
        for _ in range(kills):
            daemon.start(dies_at=choose.randrange(1, 60))
            assert daemon.process is not None and daemon.process.wait(240) == -signal.SIGKILL, daemon.log[-3000:]
        started_s = time.monotonic()
        watch.start()
        daemon.start()
        watch.stop()
        wait_for(lambda: daemon.status()["daemon"]["connections"] == len(clients))
        slowest_s = time.monotonic() - started_s
        wait_for_more(clients)
        acknowledged = end_all(clients, copies)
        died_in = dict(Counter(line.split("in=")[1] for line in daemon.log.splitlines() if "event=dies" in line))
        print(f"seed {seed}: {kills} kills in {died_in}, {len(acknowledged)} sessions, all back in {slowest_s:.2f} s")
        print([client.done for client in clients])
        assert sum(died_in.values()) == kills
        check_end(daemon, acknowledged)
    return watch.slowest_s


@by_both
def test_engines_killed_in_the_middle_of_copies(tmp_path, seed, copies):
    kill_engines_in_copies(tmp_path, 3, seed + 1, copies)


@by_both
def test_daemons_killed_in_the_middle_of_copies(tmp_path, seed, copies):
    kill_daemons_in_copies(tmp_path, 4, seed + 1, copies)


@by_both
def test_a_killed_daemon_costs_nothing_but_time(tmp_path, seed, copies):
    kill_daemons(tmp_path, 3, seed + 1, copies)


@by_both
def test_a_killed_client_leaves_nothing_behind(tmp_path, seed, copies):
    kill_clients(tmp_path, 3, seed + 1, copies)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@by_both
def test_a_hundred_engines_killed_in_copies(tmp_path, seed, copies):
    assert kill_engines_in_copies(tmp_path, 100, seed + 1, copies) < MOST_S


@pytest.mark.soak
@pytest.mark.timeout(7200)
@by_both
def test_a_hundred_daemons_killed_in_copies(tmp_path, seed, copies):
    assert kill_daemons_in_copies(tmp_path, 100, seed + 1, copies) < MOST_S


@pytest.mark.soak
@pytest.mark.timeout(7200)
@by_both
def test_three_hundred_killed_daemons(tmp_path, seed, copies):
    assert kill_daemons(tmp_path, 300, seed + 1, copies) < MOST_S


@pytest.mark.soak
@pytest.mark.timeout(7200)
@by_both
def test_three_hundred_killed_clients(tmp_path, seed, copies):
    assert kill_clients(tmp_path, 300, seed + 1, copies) < MOST_S
