"""Hints over the protocol: what one client gives up leaves the daemon's tiers first, and what another refers to stays."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.keys import owner_tag
from kvtier.pager.quota import NamespaceQuota

from ..pager.harness import LAYOUT
from .inside import InsideDaemon
from .running import Pagerd, wait_for
from .test_clients import all_shared, client

SIZE = LAYOUT.block_bytes
OVER, KEPT = list(range(1000, 1032)), list(range(2000, 2032))


@pytest.fixture
def daemon(tmp_path):
    with Pagerd(tmp_path, host_bytes=32 * SIZE) as running:
        yield running


def stored(rig, token_ids: list[int]) -> int:
    seq = rig.start(token_ids)
    rig.prefill(seq)
    wait_for(lambda: all_shared(rig))
    return seq


def crowd(rig, chains: int) -> None:
    for start in range(10_000, 10_000 + 100 * chains, 100):
        rig.pager.finish(stored(rig, list(range(start, start + 32))))


def keys_of(rig, token_ids: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    rig.pager._core.chain("default").extend(keys, token_ids)
    return keys


def held_by_daemon(rig, token_ids: list[int]) -> int:
    """Asked of the daemon itself: the client may know of a block longer."""
    found = rig.pager._remote._tier.attachment.lookup(keys_of(rig, token_ids), prefix=True, hold=False)
    return int(np.count_nonzero(found[0]))


def test_a_released_chain_leaves_the_daemon_first(daemon):
    rig = client(daemon, pages=12)
    rig.pager.finish(stored(rig, KEPT))
    rig.pager.release(stored(rig, OVER))
    crowd(rig, 3)
    wait_for(lambda: held_by_daemon(rig, OVER) < 8)
    assert held_by_daemon(rig, KEPT) == 8
    rig.close()


def test_what_another_client_refers_to_is_not_given_up(daemon):
    first, second = client(daemon, pages=12), client(daemon, pages=12)
    seq = stored(first, OVER)
    other = second.start([*OVER, 1])
    second.prefill(other)
    wait_for(lambda: all_shared(second))
    first.pager.release(seq)
    crowd(first, 4)
    assert held_by_daemon(first, OVER) == 8
    assert not first.wrong and not second.wrong
    first.close()
    second.close()


def test_a_daemon_without_the_feature_is_told_nothing(daemon, monkeypatch):
    rig = client(daemon, pages=12)
    attachment = rig.pager._remote._tier.attachment
    said = []
    monkeypatch.setattr(attachment.connection, "call_patiently", lambda *a, **k: said.append(a))
    attachment.connection.welcome.features.remove("hints")
    attachment.hint([b"\1" * 32], "release")
    assert said == []
    monkeypatch.undo()
    rig.close()


def test_an_unknown_hint_changes_nothing(daemon):
    rig = client(daemon, pages=12)
    rig.pager.finish(stored(rig, KEPT))
    attachment = rig.pager._remote._tier.attachment
    attachment.hint(keys_of(rig, KEPT), "bake")
    assert held_by_daemon(rig, KEPT) == 8
    rig.close()


# ---------------------------------------------------------------------- pins, demotion and prefetch
def pinned(store) -> int:
    d = store.core.groups[0].directory
    return int(((d.pinned_until > store.core.clock()) & d.is_live).sum())


def store_of(inside):
    [store] = inside.models._stores.values()
    return store


def test_a_pinned_chain_outlives_its_sequence_in_the_daemon_and_dies_with_its_process(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig, other = client(inside, pages=12), client(inside, pages=12)
        seq = stored(rig, KEPT)
        rig.pager.pin(seq, 1000.0)
        rig.pager.release(seq)
        wait_for(lambda: rig.pager.poll() or pinned(store_of(inside)) == 8)
        crowd(other, 6)
        assert held_by_daemon(other, KEPT) == 8
        inside.models._stores[1].check_integrity()
        rig.close()
        wait_for(lambda: pinned(store_of(inside)) == 0)
        crowd(other, 12)
        wait_for(lambda: held_by_daemon(other, KEPT) < 8)
        other.close()


def test_a_pin_that_is_told_before_its_blocks_are_there_waits_for_them(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig = client(inside, pages=12)
        seq = rig.start(KEPT)
        rig.prefill(seq)
        rig.pager.pin(seq, 1000.0)  # nothing has been offered yet, or is on its way
        wait_for(lambda: rig.pager.poll() or pinned(store_of(inside)) == 8)
        rig.close()


def test_a_pin_ends_with_its_time(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig = client(inside, pages=12)
        attachment = rig.pager._remote._tier.attachment
        rig.pager.finish(stored(rig, KEPT))
        keys = keys_of(rig, KEPT)
        attachment.hint(keys, "pin", 3_000)
        assert pinned(store_of(inside)) == 8
        wait_for(lambda: pinned(store_of(inside)) == 0)
        crowd(rig, 8)
        wait_for(lambda: held_by_daemon(rig, KEPT) < 8)
        rig.close()


def test_of_two_who_pinned_the_one_that_stays_keeps_it(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        first, second = client(inside, pages=12), client(inside, pages=12)
        first.pager.finish(stored(first, KEPT))
        keys = keys_of(first, KEPT)
        first.pager._remote._tier.attachment.hint(keys, "pin", 1_000_000)
        second.pager._remote._tier.attachment.hint(keys[:3], "pin", 500_000)
        first.close()
        wait_for(lambda: pinned(store_of(inside)) == 3)
        second.close()


def test_pins_keep_to_half_of_the_memory_and_to_the_quota(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig = client(inside, pages=24)
        attachment = rig.pager._remote._tier.attachment
        keys = keys_of(rig, KEPT + OVER)
        rig.pager.finish(stored(rig, KEPT + OVER[:28]))
        store = store_of(inside)
        attachment.hint(keys, "pin", 1_000_000)
        assert pinned(store) == 15
        core = store.core
        with core.lock:
            for one in store.clients:
                one.holdings[0]._pins.clear()
            core.groups[0].directory.pinned_until[:] = 0
            core.quotas.update({"default": NamespaceQuota(pins=5)})
        wait_for(lambda: core.quotas.pins_left(owner_tag("default")) == 5)
        attachment.hint(keys, "pin", 1_000_000)
        assert pinned(store) == 5 and core.quotas.pins_left(owner_tag("default")) == 0
        first = core.groups[0].directory.find(keys[:5])
        assert (core.groups[0].directory.pinned_until[first] > core.clock()).all()  # from the root on
        with core.lock:
            core.quotas.update({})
        rig.close()


def test_what_is_demoted_leaves_the_daemons_memory_first(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as inside:
        rig = client(inside, pages=12)
        rig.pager.finish(stored(rig, KEPT))
        seq = stored(rig, OVER)
        rig.pager.demote(seq)
        store = store_of(inside)
        kept = keys_of(rig, KEPT)
        over = keys_of(rig, OVER)
        d = store.core.groups[0].directory
        wait_for(lambda: rig.pager.poll() or d.is_demoted[d.find(over)].all())
        wait_for(lambda: d.nvme_valid[d.find(over)].all())  # written down before anybody needs the room
        wait_for(lambda: rig.pager.poll() or (store.core.groups[0].host.holds == 0).all())
        with store.core.lock:
            first = store.core.groups[0].leaving.first_host_copies(8, False, None)
        assert set(first.tolist()) == set(d.find(over).tolist())
        assert d.in_host(d.find(kept)).all()
        rig.close()


def test_what_the_queue_will_read_comes_into_the_daemons_memory_before_anybody_asks(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as inside:
        rig = client(inside, pages=12)
        rig.pager.finish(stored(rig, KEPT))
        crowd(rig, 8)
        store = store_of(inside)
        d = store.core.groups[0].directory
        keys = keys_of(rig, KEPT)
        wait_for(lambda: d.nvme_valid[d.find(keys)].all())
        with store.core.lock:
            blocks = d.find(keys)
            up = blocks[d.in_host(blocks) & (store.core.groups[0].host.holds[d.host_slot[blocks]] == 0)]
            store.core.groups[0].drop_host_copies(up, "pressure")
        assert not d.in_host(d.find(keys)).any()
        queued = client(inside, pages=12)  # which has never asked for these
        seq = queued.pager.begin()
        queued.pager.append(seq, [*KEPT, 1])
        queued.pager.prefetch(seq)
        wait_for(lambda: d.in_host(d.find(keys)).any())
        queued.close()
        rig.close()


def test_a_foreign_namespaces_pin_and_an_absent_one_change_nothing_and_look_alike(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig = client(inside, pages=12)
        rig.pager.finish(stored(rig, KEPT))
        store = store_of(inside)
        keys = keys_of(rig, KEPT)
        [one] = store.clients
        stranger = store.attach(Tenant("stranger", {"other": b""}))
        for hint in ("pin", "demote", "release", "prefetch"):
            assert store.hint(stranger, keys, hint, 100.0) is None
        d = store.core.groups[0].directory
        assert pinned(store) == 0 and not d.is_demoted.any() and not d.is_released.any()
        assert not any(holdings.pinned().size for holdings in stranger.holdings)
        store.hint(one, keys, "pin", 100.0)
        assert pinned(store) == 8
        store.detach(stranger)
        assert pinned(store) == 8
        rig.close()


def test_a_daemon_without_marks_is_told_neither_pins_nor_demotion(daemon, monkeypatch):
    rig = client(daemon, pages=12)
    attachment = rig.pager._remote._tier.attachment
    said = []
    attachment.connection.welcome.features.remove("marks")
    monkeypatch.setattr(attachment.connection, "call_patiently", lambda message, *_: said.append(message.hint))
    for hint in ("pin", "demote", "release"):
        attachment.hint([b"\1" * 32], hint, 5)
    assert said == ["release"]
    monkeypatch.undo()
    rig.close()


def test_a_pin_is_told_again_to_the_daemon_that_comes_after(tmp_path):
    rig = None
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        rig = client(inside, pages=12)
        seq = stored(rig, KEPT)
        rig.pager.pin(seq, 1000.0)
        wait_for(lambda: rig.pager.poll() or pinned(store_of(inside)) == 8)
    wait_for(lambda: not rig.pager._remote.is_up)
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as inside:
        wait_for(lambda: rig.pager._remote.is_up)
        wait_for(lambda: rig.pager.poll() or (inside.models._stores and pinned(store_of(inside)) == 8))
        rig.close()
