"""A daemon whose disk is full, or broken, for a while: clients go on, nothing wrong is read, nothing acknowledged is lost."""

from __future__ import annotations

import time

import pytest

from .loading import LoadClient
from .raw import SIZE
from .running import Pagerd, wait_for
from .test_kills import check_end, end_all

ROUNDS = 3


def promised(client: LoadClient) -> int:
    return sum(line.startswith(("ack", "kept")) for line in client.lines)


def refuse_for_a_while(tmp_path, rounds: int, error: str) -> None:
    flag = tmp_path / "refuse"
    sizes = {"host_bytes": 96 * SIZE, "nvme_bytes": 128_000 * SIZE}
    with Pagerd(tmp_path, **sizes, options=("--no-prefault",), failing=flag) as daemon:
        clients = [LoadClient(daemon, 10), LoadClient(daemon, 11, "private")]
        for client in clients:
            client.wait_ready()
        for _ in range(rounds):
            before = [promised(client) for client in clients]
            wait_for(lambda before=before: all(promised(c) > b for c, b in zip(clients, before, strict=True)), 120.0)
            flag.write_text(error)
            wait_for(lambda: not daemon.status()["tiers"]["nvme"]["takes_writes"])
            time.sleep(0.5)
            assert daemon.process.poll() is None
            assert "No space" in str(daemon.status()["tiers"]["nvme"]["last_write_error"]) or error != "ENOSPC"
            flag.unlink()
            wait_for(lambda: daemon.status()["tiers"]["nvme"]["takes_writes"])
        wait_for(lambda: all(promised(client) > 1 for client in clients), 120.0)
        acknowledged = end_all(clients, "client")
        assert len(acknowledged) > 2
        daemon.kill()  # what counts is on the disk
        daemon.start()
        check_end(daemon, acknowledged)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses_for_a_while_costs_nothing_that_was_promised(tmp_path, error):
    refuse_for_a_while(tmp_path, ROUNDS, error)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses_a_hundred_times(tmp_path, error):
    refuse_for_a_while(tmp_path, 100, error)
