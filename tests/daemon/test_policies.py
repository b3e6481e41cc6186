"""Policies in a real pagerd: rules under pressure from two clients, and what counts there as a use."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ..pager.harness import LAYOUT
from .running import Pagerd, wait_for
from .test_clients import client
from .test_hints import KEPT, OVER, held_by_daemon, stored

SIZE = LAYOUT.block_bytes


def daemon_under(policy: str, folder: Path, **sizes: int) -> Pagerd:
    (folder / "pagerd.toml").write_text(f'policy = "{policy}"\n')
    return Pagerd(folder, options=("--config", str(folder / "pagerd.toml")), **sizes)


@pytest.mark.parametrize("name", ["arc", "s3fifo", "wtinylfu"])
def test_two_clients_read_only_what_is_right_under_any_policy(name, tmp_path):
    pick = random.Random(3)
    with daemon_under(name, tmp_path, host_bytes=40 * SIZE, nvme_bytes=60 * 4096) as daemon:
        rigs = [client(daemon, pages=14) for _ in range(2)]
        for _ in range(30):
            rig, prompt = pick.choice(rigs), int(pick.paretovariate(1.0)) % 12
            seq = rig.start(list(range(100 * prompt, 100 * prompt + 24)))
            rig.prefill(seq)
            rig.pager.finish(seq)
        for rig in rigs:
            assert rig.wrong == []
            rig.pager.check_integrity()
            rig.close()
        told = daemon.status()
        assert told["policy"] == name
        assert sum(row["value"] for row in told["counters"] if row["name"] == "evicted_blocks") > 0
        assert "Traceback" not in daemon.log, daemon.log


def test_a_prompt_that_was_asked_for_again_outlives_those_that_were_only_stored(tmp_path):
    with daemon_under("lfu", tmp_path, host_bytes=32 * SIZE) as daemon:
        rig = client(daemon, pages=12)
        rig.pager.finish(stored(rig, KEPT))
        rig.pager.finish(stored(rig, OVER))
        rig.pager.finish(rig.start([*KEPT, 1]))  # found, and told to the daemon
        for start in range(10_000, 10_600, 100):
            rig.pager.finish(stored(rig, list(range(start, start + 32))))
        wait_for(lambda: held_by_daemon(rig, OVER) < 8)
        assert held_by_daemon(rig, KEPT) == 8
        rig.close()
