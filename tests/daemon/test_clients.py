"""Pagers of several clients over one real daemon: what one computed is a hit for all, and nothing wrong is ever read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.pager.client.connection import DaemonConnection
from kvtier.pager.config import PagerConfig
from kvtier.pager.pager import Pager
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import Busy, ConfigError, TierUnavailableError, UnknownSessionError

from ..pager.harness import BLOCK, LAYOUT, WINDOWED, Rig
from .running import Pagerd, wait_for

TOKENS = list(range(100, 180))
SIZE = LAYOUT.block_bytes


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Pagerd]:
    with Pagerd(tmp_path, host_bytes=64 * SIZE, nvme_bytes=2000 * SIZE) as running:
        yield running
        if running.process is not None and running.process.poll() is None:
            assert "Traceback" not in running.log, running.log


@pytest.fixture(params=["slab", "bytes"])
def options(request: pytest.FixtureRequest) -> dict[str, int]:
    return {} if request.param == "slab" else {"private_host": 16}


def client(daemon: Pagerd, *, poison: bool = True, **options) -> Rig:
    return Rig(daemon=daemon.address, backend=CpuBackend(poison=poison), **({"pages": 32} | options))


def all_shared(rig: Rig) -> bool:
    """Whether every named block of this client is in the daemon."""
    rig.pager.poll()
    directories = [group.directory for group in rig.pager._core.groups]
    return all(d.nvme_valid[d.is_named & d.is_live].all() for d in directories)


def test_what_one_client_computed_is_a_hit_for_the_next(daemon, options):
    first, second = client(daemon, **options), client(daemon, **options)
    assert first.prefill(first.start(TOKENS)) == len(TOKENS)
    wait_for(lambda: all_shared(first))
    seq = second.start(TOKENS)
    assert second.prefill(seq) == BLOCK  # the last token is computed for its logits
    second.say(seq, [1, 2, 3])
    assert not first.wrong and not second.wrong
    for rig in (first, second):
        rig.pager.check_integrity()
        rig.close()


def test_a_context_larger_than_the_device_streams_from_the_daemon(daemon, options):
    first = client(daemon, pages=8, staging=2, **options)
    seq = first.start(TOKENS)
    assert first.prefill(seq) == len(TOKENS)
    first.say(seq, [1, 2, 3])
    wait_for(lambda: all_shared(first))
    first.close()
    second = client(daemon, pages=8, staging=2, **options)
    again = second.start(TOKENS)
    second.prefill(again)
    second.say(again, [1, 2, 3, 4])
    assert not first.wrong and not second.wrong
    second.close()


def test_layer_groups_with_windows_are_shared_too(daemon, options):
    layouts = [LAYOUT, WINDOWED]
    first, second = (client(daemon, layouts=layouts, **options) for _ in range(2))
    first.prefill(first.start(TOKENS))
    wait_for(lambda: all_shared(first))
    seq = second.start(TOKENS)
    assert second.prefill(seq) <= 2 * BLOCK
    second.say(seq, [1, 2, 3])
    assert not first.wrong and not second.wrong
    first.close()
    second.close()


def test_a_session_moves_from_process_to_process(daemon, options):
    first, second = client(daemon, **options), client(daemon, **options)
    seq = first.start(TOKENS)
    first.prefill(seq)
    first.say(seq, [1, 2])  # a partial tail block
    first.pager.checkpoint("chat", seq, {"n": 1})
    with pytest.raises(Busy, match="active in another process"):
        second.pager.resume("chat")
    first.pager.park("chat", seq, {"n": 2})
    resumed, parked = second.pager.resume("chat")
    assert parked.num_computed == len(TOKENS) + 2 and parked.extra == {"n": 2}
    assert second.pager.num_computed(resumed) == len(TOKENS) + 2
    second.say(resumed, [3, 4, 5])
    assert second.pager.sessions()["chat"]["is_active"] and first.pager.sessions()["chat"]["is_active"]
    assert all(one.pager.session("chat") == one.pager.sessions()["chat"] for one in (first, second))
    assert second.pager.session("nobody") is None
    second.pager.finish(resumed)
    assert not first.pager.sessions()["chat"]["is_active"]
    first.pager.forget("chat")
    with pytest.raises(UnknownSessionError):
        second.pager.resume("chat")
    assert not first.wrong and not second.wrong
    first.close()
    second.close()


def test_pins_are_the_leases_and_end_with_the_clients(daemon, options):
    rig = client(daemon, pages=8, staging=2, **options)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    rig.pager.release(seq)
    wait_for(lambda: daemon.status()["daemon"]["pinned_slots"] == 0)
    rig.close()
    wait_for(lambda: daemon.status()["daemon"]["attached_processes"] == 0)
    assert daemon.status()["tiers"]["host"]["pinned_bytes"] == 0


def test_what_a_live_sequence_refers_to_stays(tmp_path):
    """Without a disk: others fill the slab several times, the blocks of a sequence that is still there stay in it."""
    with Pagerd(tmp_path, host_bytes=64 * SIZE) as daemon:
        first, second = client(daemon, pages=12, staging=2), client(daemon, pages=32)
        seq = first.start(TOKENS)
        first.prefill(seq)
        wait_for(lambda: all_shared(first))
        for start in range(1000, 9000, 400):
            other = second.start(list(range(start, start + 100)))
            second.prefill(other)
            second.pager.release(other)
        wait_for(lambda: all_shared(second))
        computed = first.pager.counters.get("computed_tokens")
        first.say(seq, [1, 2, 3])
        assert first.pager.counters.get("computed_tokens") == computed + 3
        assert not first.wrong and not second.wrong
        first.close()
        second.close()


def test_a_client_outlives_its_daemon_and_finds_it_again(daemon, options):
    rig = client(daemon, **options)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    rig.pager.persist([seq])
    daemon.kill()
    rig.say(seq, list(range(10)))  # goes on with what the device has
    wait_for(lambda: not rig.pager.status()["tiers"]["daemon"]["is_attached"])
    started_s = time.monotonic()
    with pytest.raises(TierUnavailableError):
        rig.pager.park("chat", seq)
    assert time.monotonic() - started_s < 110.0  # no use in trying until its timeout, two minutes
    other = rig.start(list(range(500, 530)))
    rig.prefill(other)
    daemon.start()
    wait_for(lambda: rig.pager.status()["tiers"]["daemon"]["is_attached"])
    rig.say(seq, [7, 8, 9])
    rig.pager.park("chat", seq)
    rig.pager.check_integrity()
    second = client(daemon, **options)
    resumed, _ = second.pager.resume("chat")
    assert second.pager.num_computed(resumed) == len(TOKENS) + 13
    second.say(resumed, [1, 2])
    assert not rig.wrong and not second.wrong
    rig.close()
    second.close()


def test_what_was_persisted_is_found_after_a_crash_of_the_daemon(daemon, options):
    first = client(daemon, **options)
    seq = first.start(TOKENS)
    first.prefill(seq)
    first.pager.park("chat", seq)
    daemon.kill()
    first.close()
    daemon.start()
    second = client(daemon, **options)
    assert second.pager.match(TOKENS).tokens == len(TOKENS)
    resumed, parked = second.pager.resume("chat")
    assert parked.num_computed == second.pager.num_computed(resumed) == len(TOKENS)
    second.say(resumed, [1, 2, 3])
    assert not second.wrong
    second.close()


def test_a_graceful_end_writes_the_slab_down(daemon):
    rig = client(daemon)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    wait_for(lambda: all_shared(rig))
    assert daemon.stop() == 0
    rig.close()
    daemon.start()
    second = client(daemon)
    assert second.pager.match(TOKENS).tokens == len(TOKENS)
    second.close()


def test_namespaces_do_not_share(daemon):
    first, second = client(daemon), client(daemon)
    first.prefill(first.start(TOKENS, "one"))
    wait_for(lambda: all_shared(first))
    assert second.pager.match(TOKENS, "two").tokens == 0
    assert second.pager.match(TOKENS, "one").tokens == len(TOKENS)
    first.close()
    second.close()


def test_refusals_name_what_is_wrong(daemon, tmp_path):
    config = PagerConfig(32 * SIZE, backend="cpu")
    with pytest.raises(TierUnavailableError, match="no daemon answers"):
        Pager.connect(f"unix://{tmp_path}/none.sock", LAYOUT, config)
    with pytest.raises(ConfigError, match="absolute path"):
        Pager.connect("unix://relative.sock", LAYOUT, config)
    with pytest.raises(ConfigError, match="the daemon keeps the store"):
        Pager.connect(daemon.address, LAYOUT, PagerConfig(32 * SIZE, SIZE, nvme_path=tmp_path, backend="cpu"))
    connection = DaemonConnection.open(daemon.address)
    connection.close()
