"""Siblings of a demanded read: one call for what is asked for and what the same client will ask for, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from .inside import InsideDaemon
from .running import wait_for
from .test_clients import client
from .test_hints import KEPT, OVER, SIZE, store_of, stored


@pytest.fixture
def cold(tmp_path):
    """A daemon whose blocks of two chains lie on disk alone: one that its client refers to, one that nobody does."""
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as inside:
        rig = client(inside, pages=24)
        stored(rig, KEPT)
        rig.pager.finish(stored(rig, OVER))
        store = store_of(inside)
        group, chain = store.core.groups[0], rig.pager._core.chain("default")
        chain.extend(kept := [], KEPT)
        chain.extend(over := [], OVER)
        with store.core.lock:
            store.core.sink_blocks(group, group.directory.find(kept + over), "writeback")
        wait_for(lambda: group.directory.nvme_valid[group.directory.find(kept + over)].all())
        wait_for(lambda: rig.pager.poll() or not store.pinned_slots())  # leased, or reserved for what comes next
        wait_for(lambda: rig.pager.poll() or not group.directory.refs[group.directory.find(over)].any())
        with store.core.lock:
            hosted = group.directory.find(kept + over)
            group.drop_host_copies(hosted[group.directory.in_host(hosted)], "pressure")
        calls: list[int] = []
        read = group.cold.tier.read
        group.cold.tier.read = lambda index, slots, *rest: calls.append(len(slots)) or read(index, slots, *rest)
        yield store, next(iter(store.clients)), group, kept, over, calls
        store.check_integrity()
        rig.close()


def lease(store, client, keys):
    request = store.lease(client, 0, keys, 60.0)
    wait_for(lambda: store.advance() or not request._waits.any())
    assert (request.slots >= 0).all()
    store.release(client, 0, request.slots)


def told(store, outcome: str) -> float:
    return store.core.counters.get("prefetched_bytes", tier="host", outcome=outcome)


def test_what_the_client_will_ask_for_next_comes_with_the_same_read(cold):
    store, holder, group, kept, _, calls = cold
    lease(store, holder, kept[2:4])
    assert calls == [8] and group.directory.in_host(group.directory.find(kept)).all()
    assert told(store, "started") == 6 * SIZE
    lease(store, holder, kept)
    assert calls == [8] and told(store, "useful") == 6 * SIZE and told(store, "wasted") == 0


def test_what_nobody_refers_to_stays_where_it_is(cold):
    store, holder, _, _, over, calls = cold
    lease(store, holder, over[:1])
    assert calls == [1] and told(store, "started") == 0


def test_a_sibling_that_nobody_read_counts_as_wasted_when_it_leaves(cold):
    store, holder, group, kept, _, _ = cold
    lease(store, holder, kept[:2])
    with store.core.lock:
        group.drop_host_copies(group.directory.find(kept[2:]), "pressure")
    assert told(store, "wasted") == 6 * SIZE


def test_siblings_take_half_of_what_is_free_and_nobodys_place(cold):
    store, holder, group, kept, _, calls = cold
    with store.core.lock:
        taken = group.host.take_free(group.host.num_free - 5)  # 5 are left: one is asked for, of four the half
        group.host.stage(taken, np.full(len(taken), -1))
    try:
        lease(store, holder, kept[:1])
        assert calls == [3]
    finally:
        with store.core.lock:
            group.host.drop(taken)


def test_large_blocks_come_alone(cold, monkeypatch):
    store, holder, _, kept, _, calls = cold
    monkeypatch.setattr("kvtier.pager.siblings.MAX_READ_BYTES", SIZE)
    lease(store, holder, kept[:1])
    assert calls == [1]
