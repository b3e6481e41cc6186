"""Hints reach every tier: a released chain leaves first and is not copied down, a demoted one leaves the device alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager import hints
from kvtier.pager.policies.registry import NAMES

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

DISK_BLOCK = 4096  # what a block of the rig takes on disk
POLICIES = [name for name in NAMES if name != "sliding_window"]


def tokens(start: int, blocks: int = 4) -> list[int]:
    return list(range(start, start + BLOCK * blocks))


def computed(rig: Rig, token_ids: list[int]) -> int:
    seq = rig.start(token_ids)
    rig.prefill(seq)
    rig.settle()
    return seq


def held(rig: Rig, token_ids: list[int]) -> int:
    return rig.pager.match(token_ids).tokens // BLOCK


def closed(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert not rig.wrong
    rig.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_released_chain_leaves_the_device_first_though_it_was_used_last(policy):
    rig = Rig(0, pages=12, host=0, policy=policy)
    rig.pager.finish(computed(rig, tokens(0)))
    rig.pager.release(computed(rig, tokens(1000)))
    rig.pager.finish(computed(rig, tokens(2000, 8)))  # needs the four pages of one of them
    assert (held(rig, tokens(0)), held(rig, tokens(1000))) == (4, 0)
    closed(rig)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_released_chain_leaves_the_host_tier_first(policy):
    rig = Rig(0, pages=8, host=8, policy=policy)
    kept, over = computed(rig, tokens(0)), computed(rig, tokens(1000))
    for seq in (kept, over):
        for _ in range(3):
            rig.pager.demote(seq)
            rig.settle()
    assert (rig.pager.residency(kept).host_tokens, rig.pager.residency(over).host_tokens) == (16, 16)
    rig.pager.finish(kept)
    rig.pager.release(over)
    for start in (2000, 3000):
        rig.pager.finish(computed(rig, tokens(start)))
    rig.pager.finish(computed(rig, tokens(4000, 1)))
    assert held(rig, tokens(0)) == 4 and held(rig, tokens(1000)) < 4
    closed(rig)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_released_chain_leaves_nvme_first(tmp_path, policy):
    rig = Rig(0, pages=8, host=8, path=tmp_path, nvme_bytes=24 * DISK_BLOCK, policy=policy)

    def parked(start: int, *, released: bool = False) -> list[int]:
        rig.pager.park("passing", computed(rig, tokens(start)))
        rig.pager.forget("passing", released=released)
        rig.settle()
        return tokens(start)

    kept = [parked(1000 * i) for i in range(2)]
    over = parked(7000, released=True)
    later = [parked(1000 * i) for i in range(10, 13)]  # six chains of four, and two segments are to be clean
    assert held(rig, over) < 4 and [held(rig, chain) for chain in (*kept, *later)] == [4] * 5
    closed(rig)


def test_a_released_chain_is_not_worth_a_copy(tmp_path):
    """Its dirty pages are dropped where room is needed, and what the host holds of it goes to no disk."""
    rig = Rig(0, pages=8, host=8, path=tmp_path, nvme_bytes=64 * DISK_BLOCK)
    over = computed(rig, tokens(0, 2))
    rig.pager.demote(over)
    rig.settle()
    dirty = computed(rig, tokens(1000, 2))
    rig.pager.release(over)
    rig.pager.release(dirty)
    marks = rig.pager._core.groups[0].directory.is_released
    assert marks.sum() == 4
    core = rig.pager._core
    assert (core.groups[0].host.block >= 0).any() and core.sink(core.groups[0], 10, "writeback") == 0
    for start in (2000, 3000, 4000, 5000):
        rig.pager.finish(computed(rig, tokens(start)))
    assert held(rig, tokens(0, 2)) == 0 and held(rig, tokens(1000, 2)) == 0
    assert rig.pager.counters.get("evicted_blocks", tier="device", reason="released") >= 2
    written = rig.pager.counters.get("moved_blocks", direction="host_to_nvme")
    assert written <= 4 * 4  # of the others alone
    closed(rig)


def test_what_others_begin_with_too_is_not_released():
    rig = Rig(0, pages=16, host=0)
    first, second = computed(rig, tokens(0, 2) + tokens(1000, 2)), computed(rig, tokens(0, 2) + tokens(2000, 2))
    rig.pager.finish(second)
    blocks = rig.pager._core.sequences[first].tables[0].ids.copy()
    rig.pager.release(first)
    assert rig.pager._core.groups[0].directory.is_released[blocks].tolist() == [False, False, True, True]
    closed(rig)


def test_a_chain_that_somebody_has_continued_is_not_released():
    rig = Rig(0, pages=16, host=0)
    short = computed(rig, tokens(0, 2))
    longer = computed(rig, tokens(0, 2) + tokens(1000, 1))
    rig.pager.finish(longer)
    rig.pager.release(short)
    assert not rig.pager._core.groups[0].directory.is_released.any()
    closed(rig)


def test_a_new_use_takes_a_release_back():
    rig = Rig(0, pages=12, host=0)
    rig.pager.release(computed(rig, tokens(0)))
    rig.pager.finish(computed(rig, [*tokens(0), 7]))
    rig.pager.finish(computed(rig, tokens(1000)))
    assert not rig.pager._core.groups[0].directory.is_released.any()
    rig.pager.finish(computed(rig, tokens(2000, 1)))
    assert held(rig, tokens(0)) == 4
    closed(rig)


def test_a_pin_is_stronger_than_a_release(tmp_path):
    rig = Rig(0, pages=8, host=4, path=tmp_path, nvme_bytes=64 * DISK_BLOCK)
    seq = computed(rig, tokens(0, 2))
    rig.pager.pin(seq, ttl_s=3600)
    rig.pager.release(seq)
    for start in (2000, 3000, 4000, 5000):
        rig.pager.finish(computed(rig, tokens(start)))
    assert held(rig, tokens(0, 2)) == 2
    closed(rig)


def test_a_demoted_sequence_gives_its_pages_up_and_keeps_its_place_below(tmp_path):
    rig = Rig(0, pages=12, host=8, path=tmp_path, nvme_bytes=64 * DISK_BLOCK)
    old = computed(rig, tokens(0))
    older = rig.pager._core.sequences[old].tables[0].ids.copy()
    rig.pager.finish(old)
    new = computed(rig, tokens(1000))
    for _ in range(3):
        rig.pager.demote(new)
        rig.settle()
    assert rig.pager.residency(new).device_tokens == 0
    d, group = rig.pager._core.groups[0].directory, rig.pager._core.groups[0]
    blocks = rig.pager._core.sequences[new].tables[0].ids
    assert d.is_demoted[blocks].all() and not d.is_released[blocks].any()
    both = np.concatenate([blocks, older])
    assert set(group.policy.victims(4, both).tolist()) == set(older.tolist())  # recency decides below
    closed(rig)


def test_own_end_of_a_chain():
    rig = Rig(0, pages=16, host=0)
    seq = computed(rig, tokens(0, 3))
    d = rig.pager._core.groups[0].directory
    chain = rig.pager._core.sequences[seq].tables[0].ids.copy()
    assert hints.own_end(d, chain).tolist() == chain.tolist()
    d.note_child(int(chain[0]), b"\1" * 32)
    assert hints.own_end(d, chain).tolist() == chain[1:].tolist()
    d.note_child(int(chain[2]), b"\2" * 32)
    assert not len(hints.own_end(d, chain))
    closed(rig)


def test_pages_that_a_pin_keeps_are_not_counted_as_room_for_others():
    now = [100.0]
    rig = Rig(3, pages=12, host=16, clock=lambda: now[0])
    kept, other = computed(rig, tokens(0)), computed(rig, tokens(100))
    assert rig.pager.pages_needed([(other, 1)]) == [(5, 12)]
    rig.pager.pin(kept, ttl_s=60)
    assert rig.pager.pages_needed([(other, 1)]) == [(5, 8)]
    assert rig.pager.pages_needed([(other, 1), (kept, 1)]) == [(10, 12)]  # who reads them has them
    rig.pager.finish(kept)
    assert rig.pager.pages_needed([(other, 1)]) == [(5, 8)]
    now[0] += 61
    assert rig.pager.pages_needed([(other, 1)]) == [(5, 12)]
    closed(rig)
