"""COMMIT names many blocks at once; each of them still gets the answer that it would get alone."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.config import PagerConfig
from kvtier.pager.daemon.store import SharedStore
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.keys import owner_tag
from kvtier.pager.wire.messages import HELD_ALREADY, IS_HELD, REFUSED, TAKEN

from .raw import LAYOUT, SIZE, key

OWNER = owner_tag("default")


@pytest.fixture
def store():
    config = PagerConfig(device_bytes=0, host_bytes=64 * SIZE, host_prefault=False)
    opened = SharedStore.open((LAYOUT,), config, model_fingerprint="commits", about={})
    yield opened
    opened.check_integrity()
    opened.close(5)


def attach(store):
    return store.attach(Tenant("default", {"default": b"s" * 32}, maps_slab=True))


def commit(store, client, slots, numbers, parents=None, *, tokens=4, owner=OWNER, hold=False):
    count = len(numbers)
    before = [bytes(32) if parent is None else key(parent) for parent in parents or [None] * count]
    words = np.full(count, tokens), np.full(count, owner, np.uint32)
    return store.commit(client, 0, np.asarray(slots), [key(n) for n in numbers], before, *words, hold=hold)


def block_of(store, number):
    return int(store.core.groups[0].directory.find([key(number)])[0])


def test_what_is_taken_and_held_says_so_up_to_the_clients_limit(store):
    client = attach(store)
    client.holdings[0].hold_limit = 3
    slots, _ = store.reserve(client, 0, 5)
    results, _ = commit(store, client, slots, [1, 2, 3, 4, 5], hold=True)
    assert results.tolist() == [TAKEN + IS_HELD] * 3 + [TAKEN] * 2
    refs = store.core.groups[0].directory.refs[[block_of(store, n) for n in range(1, 6)]]
    assert refs.tolist() == [1, 1, 1, 0, 0]
    store.release(client, 0, slots)
    store.unhold(client, 0, [key(n) for n in (1, 2, 3)])
    assert not store.core.groups[0].directory.refs.any() and store.pinned_slots() == 0


def test_twins_in_one_message_and_before_it_keep_their_slots_reserved(store):
    one, two = attach(store), attach(store)
    (first,), _ = store.reserve(two, 0, 1)
    commit(store, two, [first], [7])
    slots, _ = store.reserve(one, 0, 4)
    results, _ = commit(store, one, slots, [7, 8, 8, 9], hold=True)
    assert results.tolist() == [HELD_ALREADY + IS_HELD, TAKEN + IS_HELD, HELD_ALREADY + IS_HELD, TAKEN + IS_HELD]
    assert one.holdings[0].reserved[slots].tolist() == [True, False, True, False]
    assert commit(store, one, [slots[0]], [7])[0].tolist() == [HELD_ALREADY]  # a message of nothing else


def test_a_slot_counts_once_and_only_for_who_reserved_it(store):
    one, two = attach(store), attach(store)
    (mine,), _ = store.reserve(one, 0, 1)
    (other,), _ = store.reserve(two, 0, 1)
    results, _ = commit(store, one, [mine, mine, other], [1, 2, 3])
    assert results.tolist() == [TAKEN, REFUSED, REFUSED]
    assert one.holdings[0].leased[mine] == 1 and two.holdings[0].reserved[other]


def test_a_chain_that_comes_in_one_message_is_as_deep_as_one_that_comes_block_by_block(store):
    client = attach(store)
    slots, _ = store.reserve(client, 0, 7)
    commit(store, client, slots[:4], [1, 2, 3, 4], [None, 1, 2, 2])
    for slot, number, parent in zip(slots[4:], (5, 6, 7), (4, 5, None), strict=True):
        commit(store, client, [slot], [number], [parent])
    d = store.core.groups[0].directory
    assert d.depth[[block_of(store, n) for n in range(1, 8)]].tolist() == [0, 1, 2, 2, 3, 4, 0]
    assert d.is_fork[block_of(store, 2)] and not d.is_fork[block_of(store, 1)]


def test_a_private_block_without_a_hold_is_forgotten_with_its_lease(store):
    client = attach(store)
    slots, _ = store.reserve(client, 0, 2)
    results, _ = commit(store, client, slots, [1, 2], tokens=0)
    assert results.tolist() == [TAKEN, TAKEN] and block_of(store, 1) == block_of(store, 2) == -1
    store.release(client, 0, slots)
    assert store.core.groups[0].host.num_free == 64


def test_a_name_whose_block_was_lost_goes_to_the_next_who_has_it(store):
    one, two = attach(store), attach(store)
    (slot,), _ = store.reserve(one, 0, 1)
    commit(store, one, [slot], [1], hold=True)
    store.release(one, 0, np.array([slot]))
    lost, group = block_of(store, 1), store.core.groups[0]
    group.leave_host(np.array([lost]))
    (again,), _ = store.reserve(two, 0, 1)
    results, _ = commit(store, two, [again], [1])
    assert results.tolist() == [TAKEN] and block_of(store, 1) not in (-1, lost)
