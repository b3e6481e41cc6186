"""Kills without mercy: the daemon under load and in mid-copy, clients in mid-copy. Nothing wrong is read, nothing that was
acknowledged is lost, and what the dead held is free again within two seconds.

Longer: pytest -m soak tests/daemon/test_kills.py; one of them again: -k NAME --seed N, with the seed that it printed less 1.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from ..pager.harness import LAYOUT
from .loading import LoadClient, check_acknowledged
from .running import Pagerd, wait_for

SIZE = LAYOUT.block_bytes


def running(tmp_path: Path) -> Pagerd:
    options = ("--no-prefault", "--allow-ipc")
    return Pagerd(tmp_path, host_bytes=96 * SIZE, nvme_bytes=8000 * SIZE, options=options)


def kill_daemons(tmp_path: Path, kills: int, seed: int) -> None:
    choose = random.Random(seed)
    with running(tmp_path) as daemon:
        clients = [LoadClient(daemon, seed * 10), LoadClient(daemon, seed * 10 + 1, "private")]
        for client in clients:
            client.wait_ready()
        for _ in range(kills):
            time.sleep(choose.choice([0.1, 0.5, 1.0, 1.5]) * choose.uniform(0.8, 1.2))
            daemon.kill()
            daemon.start()
        told = [len(client.lines) for client in clients]
        wait_for(lambda: all(len(client.lines) > lines for client, lines in zip(clients, told, strict=True)))
        for client in clients:
            client.end()
        acknowledged = clients[0].acknowledged | clients[1].acknowledged
        print(f"seed {seed}: {kills} kills, {len(acknowledged)} sessions, {[c.lines[-1] for c in clients]}")
        assert not clients[0].wrong + clients[1].wrong
        wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
        assert check_acknowledged(daemon, acknowledged) > 0
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log, daemon.log[-3000:]


def kill_clients(tmp_path: Path, kills: int, seed: int) -> None:
    choose = random.Random(seed)
    with running(tmp_path) as daemon:
        witness = LoadClient(daemon, seed)
        witness.wait_ready()
        acknowledged: dict[str, int] = {}
        for number in range(kills):
            client = LoadClient(daemon, 1000 * (seed + 1) + number % 3)
            client.wait_ready()
            time.sleep(choose.uniform(0.0, 0.4))
            client.kill()
            assert not client.wrong
            acknowledged |= client.acknowledged
        wait_for(lambda: daemon.status()["daemon"]["attached_processes"] == 1)
        witness.end()
        assert not witness.wrong
        wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
        print(f"seed {seed}: {kills} kills, {len(acknowledged)} sessions, {witness.lines[-1]}")
        check_acknowledged(daemon, acknowledged | witness.acknowledged)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log, daemon.log[-3000:]


def kill_engines_in_copies(tmp_path: Path, kills: int, seed: int) -> None:
    """Each dies with half a copy done, between its pages and the slab, one way or the other; every second one in a copy
    that the daemon makes for it."""
    choose, slowest_s = random.Random(seed), 0.0
    with running(tmp_path) as daemon:
        daemon.kill()
        daemon.start(dies_at=0)
        acknowledged: dict[str, int] = {}
        for number in range(kills):
            options = ("ipc",) * (number % 2)
            client = LoadClient(daemon, 1000 * (seed + 1) + number % 3, f"dies={choose.randrange(3, 120)}", *options)
            client.wait_killed()
            killed_s = time.monotonic()
            assert not client.wrong
            acknowledged |= client.acknowledged
            wait_for(lambda: daemon.status()["daemon"]["attached_processes"] == 0)
            if options:  # and behind the last copy that it ordered
                wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
            assert daemon.status()["daemon"]["pinned_slots"] == 0  # pins are leases of processes that live
            slowest_s = max(slowest_s, time.monotonic() - killed_s)
        print(f"seed {seed}: {kills} kills in copies, pins gone in {slowest_s:.2f} s, {len(acknowledged)} sessions")
        check_acknowledged(daemon, acknowledged)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log, daemon.log[-3000:]


def kill_daemons_in_copies(tmp_path: Path, kills: int, seed: int) -> None:
    """Each dies with half a call done: of the disk, the journal, a block from a socket, or a copy between a page of a client's
    and a slot; three engines go on meanwhile."""
    choose, slowest_s = random.Random(seed), 0.0
    with running(tmp_path) as daemon:
        kinds = ((), ("private",), ("ipc",))
        clients = [LoadClient(daemon, seed * 10 + number, *kind) for number, kind in enumerate(kinds)]
        for client in clients:
            client.wait_ready()
        daemon.kill()
        for _ in range(kills):
            daemon.start(dies_at=choose.randrange(1, 60))
            assert daemon.process is not None and daemon.process.wait(240) == -signal.SIGKILL, daemon.log[-3000:]
        started_s = time.monotonic()
        daemon.start()
        wait_for(lambda: daemon.status()["daemon"]["connections"] == len(clients))
        slowest_s = time.monotonic() - started_s
        for client in clients:
            client.end()
        acknowledged = {name: tokens for client in clients for name, tokens in client.acknowledged.items()}
        print(f"seed {seed}: {kills} kills in copies, {len(acknowledged)} sessions, all back in {slowest_s:.2f} s")
        assert not [wrong for client in clients for wrong in client.wrong]
        wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
        check_acknowledged(daemon, acknowledged)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log, daemon.log[-3000:]


def test_engines_killed_in_the_middle_of_copies(tmp_path, seed):
    kill_engines_in_copies(tmp_path, 4, seed + 1)


def test_daemons_killed_in_the_middle_of_copies(tmp_path, seed):
    kill_daemons_in_copies(tmp_path, 5, seed + 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_engines_killed_in_copies(tmp_path, seed):
    kill_engines_in_copies(tmp_path, 100, seed + 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_daemons_killed_in_copies(tmp_path, seed):
    kill_daemons_in_copies(tmp_path, 100, seed + 1)


def test_a_killed_daemon_costs_nothing_but_time(tmp_path, seed):
    kill_daemons(tmp_path, 4, seed + 1)


def test_a_killed_client_leaves_nothing_behind(tmp_path, seed):
    kill_clients(tmp_path, 5, seed + 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_hundred_killed_daemons(tmp_path, seed):
    kill_daemons(tmp_path, 300, seed + 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_hundred_killed_clients(tmp_path, seed):
    kill_clients(tmp_path, 300, seed + 1)
