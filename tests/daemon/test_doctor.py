"""What is planted in a real pagerd is what its doctor names; a daemon that is well has no finding."""

from __future__ import annotations

import time

import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.inspection.asking import Target
from kvtier.pager.inspection.doctor import findings
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import Busy, TierUnavailableError
from kvtier.tiers.nvme.calls import SystemCalls

from ..pager.harness import LAYOUT, Rig
from . import service_process
from .inside import InsideDaemon
from .running import Pagerd, wait_for
from .test_tenants import BOB, random_keys, two_tenants

SIZE = LAYOUT.block_bytes


def work(daemon: Pagerd, prompts: int, times: int, tokens: int = 80, **options) -> None:
    """A client computes so many prompts, in turn and again; it can keep none of them itself."""
    rig = Rig(daemon=daemon.address, backend=CpuBackend(), **({"pages": 24} | options))
    for _ in range(times):
        for number in range(prompts):
            seq = rig.start([1000 * number + i for i in range(tokens)])
            rig.prefill(seq)
            rig.pager.demote(seq)
            rig.pager.drain(10.0)
            rig.pager.finish(seq)
    rig.close()


def found(daemon: Pagerd, *, with_neighbours: bool = False) -> dict[str, str]:
    """What is more than information, by name; stores of other tests on this disk are not meant."""
    findings = Target.find(str(daemon.socket), timeout_s=60.0).ask("doctor")["findings"]
    serious = {one["name"]: one["what"] for one in findings if one["severity"] != "info"}
    return {name: what for name, what in serious.items() if with_neighbours or name != "two stores on one disk"}


def test_a_daemon_that_is_well_has_no_finding(tmp_path):
    with Pagerd(tmp_path, host_bytes=400 * SIZE, options=("--no-prefault",)) as daemon:
        work(daemon, prompts=4, times=3)
        assert found(daemon) == {}


def test_a_tiny_host_tier_is_named(tmp_path):
    with Pagerd(tmp_path, host_bytes=12 * SIZE, options=("--no-prefault",)) as daemon:
        work(daemon, prompts=5, times=4)
        assert set(found(daemon)) == {"host tier too small"}


def test_a_tiny_host_tier_over_nvme_is_named_by_what_is_read_again(tmp_path):
    with Pagerd(tmp_path, host_bytes=16 * SIZE, nvme_bytes=4000 * SIZE, options=("--no-prefault",)) as daemon:
        work(daemon, prompts=5, times=6)
        assert "had been read before" in found(daemon)["host tier too small"]


def test_two_stores_on_one_disk_are_named(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    with Pagerd(folders[0], host_bytes=64 * SIZE, nvme_bytes=400 * SIZE) as one:
        work(one, prompts=1, times=1)
        with Pagerd(folders[1], host_bytes=64 * SIZE, nvme_bytes=400 * SIZE) as other:
            work(other, prompts=1, times=1)
            assert "more open store(s)" in found(one, with_neighbours=True)["two stores on one disk"]


def test_a_quota_that_is_hit_is_named_with_its_tier(tmp_path):
    block = service_process.BLOCK
    with service_process.Pagerd(tmp_path, two_tenants(tmp_path, "", f"host_ceiling = {8 * block}")).ready() as daemon:
        bob = daemon.connect(BOB[0]).open()
        assert found(daemon) == {}
        bob.put(random_keys(12), [b"\x02" * block] * 12, "bob")
        assert "namespace 'bob' holds" in found(daemon)["quota hit"] and "on host" in found(daemon)["quota hit"]
        assert daemon.end() == 0


def test_a_slow_disk_is_named(tmp_path, monkeypatch):
    """The daemon's service on a thread of this process, whose calls to the kernel take long."""
    real = SystemCalls.pwritev

    def slow(self, fd, buffers, offset):
        time.sleep(0.05)
        return real(self, fd, buffers, offset)

    monkeypatch.setattr(SystemCalls, "pwritev", slow)
    store = {"nvme_path": tmp_path / "nvme", "nvme_bytes": 4000 * SIZE}
    with InsideDaemon(tmp_path, host_bytes=16 * SIZE, **store) as daemon:
        work(daemon, prompts=4, times=1)
        assert {finding.name for finding in findings(daemon.store.core, quick=True)} >= {"slow disk"}


def test_starved_write_back_is_named(tmp_path):
    """Two clients keep all slots reserved, so a third one gets no room for what it has computed."""
    with Pagerd(tmp_path, host_bytes=16 * SIZE, options=("--no-prefault",)) as daemon:
        clients = [Attachment.open(daemon.address, [LAYOUT], "m", {}, Greeting("test")) for _ in range(3)]
        for client in clients[:2]:
            assert len(client.reserve(0, 8, 60.0)[0]) == 8
        assert found(daemon) == {}

        def is_starved() -> bool:  # refused often enough for the daemon to say so
            with pytest.raises((Busy, TierUnavailableError)):  # its last try may end unanswered
                clients[2].reserve(0, 4, 1.2)
            return "write-back starved" in found(daemon)

        wait_for(is_starved)
        assert "of 16 slots" in found(daemon)["write-back starved"]
        assert "16 are being written to" in found(daemon)["write-back starved"]
        clients[0].goodbye()
        assert found(daemon) == {}  # there is room again
        for client in clients[1:]:
            client.goodbye()


def test_a_session_that_hogs_is_named(tmp_path):
    with Pagerd(tmp_path, host_bytes=40 * SIZE, options=("--no-prefault",)) as daemon:
        rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=64)
        seq = rig.start(list(range(100)))
        rig.prefill(seq)
        rig.pager.park("hog", seq)
        work(daemon, prompts=1, times=1, tokens=40)
        assert "one session hogs the host tier" not in found(daemon)
        work(daemon, prompts=4, times=1, tokens=40)
        assert found(daemon)["one session hogs the host tier"].startswith("session hog (namespace default) holds")
        rig.close()


@pytest.mark.parametrize("depth", [0, 3])
def test_a_changed_template_is_named_with_the_block_where_it_changed(tmp_path, depth):
    """A daemon knows prompts by what its clients say that they used."""
    name, block = "key mismatch after a changed template", LAYOUT.block_size
    with Pagerd(tmp_path, host_bytes=400 * SIZE, options=("--no-prefault",)) as daemon:
        rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=64)

        def ask(prompts: list[list[int]]) -> None:
            target, before = Target.find(str(daemon.socket), timeout_s=30.0), rig.pager._core.observer.num_lookups
            for prompt in prompts:
                rig.pager.finish(rig.start(prompt))
            told = rig.pager._core.observer.num_lookups
            assert told == before + len(prompts)
            wait_for(lambda: target.ask("status")["lookups"] == told)

        old = list(range(100, 100 + 6 * block))
        ask([[*old, *[5000 + n] * 10] for n in range(12)])
        assert found(daemon) == {}
        new = [7 if i == depth * block + 2 else token for i, token in enumerate(old)]
        ask([[*new, *[6000 + n] * 10] for n in range(8)])
        assert f"another block {depth} (tokens from {depth * block})" in found(daemon)[name]
        rig.close()


def test_unpinned_memory_is_no_trouble_in_a_daemon(tmp_path):
    """Clients with a GPU pin what they map; the daemon itself needs none."""
    with Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault",)) as daemon:
        work(daemon, prompts=1, times=1)
        findings = {
            one["name"]: one for one in Target.find(str(daemon.socket), timeout_s=30.0).ask("doctor")["findings"]
        }
        assert findings["unpinned memory"]["severity"] == "info"
