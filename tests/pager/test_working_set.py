"""Sequences that run in turns and fill a tier to the last page: none of them makes room for another."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import LAYOUT, WINDOWED, Rig


def filled(tmp_path, *, host: int, pages: int = 8, **options) -> tuple[Rig, int, int, int]:
    """Two sequences of three blocks, and a third one of two blocks that was used last; all of them also on nvme."""
    rig = Rig(1, pages=pages, host=host, path=str(tmp_path / "store"), nvme_bytes="1MiB", policy="lru", **options)
    seqs = []
    for start, length in ((0, 12), (100, 12), (200, 8)):
        seqs.append(rig.start(list(range(start, start + length))))
        rig.prefill(seqs[-1])
    rig.pager.persist(seqs)
    rig.settle()
    return (rig, *seqs)


def missing(rig: Rig, seq: int) -> int:
    group = rig.pager._core.groups[0]
    ids = rig.pager._core.sequence(seq).tables[0].ids
    return int((~group.directory.in_device(ids)).sum())


@pytest.mark.parametrize("in_turns", [True, False])
def test_a_page_of_who_runs_in_turns_leaves_last(tmp_path, in_turns):
    rig, a, b, idle = filled(tmp_path, host=16)
    group = rig.pager._core.groups[0]
    group.evict(rig.pager._core.sequence(a).tables[0].ids[-1:], "pressure")
    rig.prefill(rig.start([300, 301]))  # the last free page
    rig.settle()
    group.touch(rig.pager._core.sequence(idle).tables[0].ids)
    rig.pager.take_turns([a, b] if in_turns else [])
    while rig.pager.bring_up(a):
        rig.settle()
    assert missing(rig, a) == 0
    assert (missing(rig, b), missing(rig, idle)) == ((0, 1) if in_turns else (1, 0))
    rig.close()


@pytest.mark.parametrize("in_turns", [True, False])
def test_what_was_read_on_its_way_up_stays_in_the_host_tier(tmp_path, in_turns):
    """Reads of one do not take the slots of what another one has read, and has not brought up yet."""
    rig, a, b, idle = filled(tmp_path, host=4)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    for seq in (a, b):
        rig.pager.demote(seq)
    rig.settle()
    group.leave_host(group.host.block[group.host.block >= 0])
    with core.lock:  # two blocks of a, read and not promoted yet; then the other two slots
        first = core.sequence(a).tables[0].ids[:2]
        group.cold.read(first, group.take_host_slots(2), "demand")
    rig.settle()
    with core.lock:
        rest = core.sequence(idle).tables[0].ids
        group.cold.read(rest, group.take_host_slots(2), "demand")
    rig.settle()
    group.touch(rest)
    rig.pager.take_turns([a, b] if in_turns else [])
    victims = group.leaving.first_host_copies(2, True, None)
    assert set(victims.tolist()) == set((rest if in_turns else first).tolist())
    if in_turns:
        assert (
            group.leaving.host_room(keep_clean=True) == 2 and group.leaving.host_room() == 4
        )  # a page that has to go down may
        assert group.leaving.first_host_copies(4, False, None)[:2].tolist() == victims.tolist()
    rig.close()


@pytest.mark.parametrize("in_turns", [True, False])
def test_two_who_fill_the_tier_come_up_without_a_block_that_is_read_twice(tmp_path, in_turns):
    """As an engine does it: one after the other before each step, while a third one was used last."""
    rig, a, b, idle = filled(tmp_path, host=4)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    for seq in (a, b):
        rig.pager.demote(seq)
    rig.settle()
    group.leave_host(group.host.block[group.host.block >= 0])
    rig.prefill(rig.start([300, 301]))  # the tier is full then but for five pages
    rig.settle()
    rig.pager.take_turns([a, b] if in_turns else [])
    asked = {"direction": "nvme_to_host", "reason": "demand"}
    before, rounds = rig.pager.counters.get("moved_blocks", **asked), 0
    while rig.pager.bring_up(a) + rig.pager.bring_up(b) and rounds < 20:
        rounds += 1
        rig.settle()
        with core.lock:
            group.touch(core.sequence(idle).tables[0].ids)
    is_up, was_read = missing(rig, a) + missing(rig, b) == 0, rig.pager.counters.get("moved_blocks", **asked) - before
    assert (is_up and was_read == 6) == in_turns
    rig.close()


def test_the_working_set_is_what_the_next_tokens_read():
    rig = Rig(0, pages=16, host=8, layouts=[WINDOWED])
    seq = rig.start(list(range(24)))
    rig.prefill(seq)
    rig.settle()
    group = rig.pager._core.groups[0]
    assert not group.working.holds(group.pages.block).any()
    rig.pager.take_turns([seq])
    held = group.pages.block[group.working.holds(group.pages.block)]
    assert sorted(group.directory.depth[held].tolist()) == [3, 4, 5]  # a window of ten tokens before the twenty-fifth
    rig.pager.finish(seq)
    assert not group.working.holds(group.pages.block).any()  # who has ended reads nothing
    rig.close()


@pytest.mark.parametrize("in_turns", [True, False])
def test_who_is_sent_to_wait_leaves_a_shared_prefix_to_those_who_go_on(tmp_path, in_turns):
    second_layout = dataclasses.replace(LAYOUT, name="other")
    rig = Rig(
        1,
        pages=8,
        host=16,
        layouts=[LAYOUT, second_layout],
        path=str(tmp_path / "store"),
        nvme_bytes="1MiB",
        policy="lru",
    )
    first = rig.start(list(range(12)))
    rig.prefill(first)
    second = rig.start([*range(12), *range(100, 108)])
    rig.prefill(second)
    rig.pager.persist([first, second])
    rig.settle()
    rig.pager.take_turns([first] if in_turns else [])
    rig.pager.demote(second)
    rig.settle()
    for index, group in enumerate(rig.pager._core.groups):
        shared, whole = (rig.pager._core.sequence(seq).tables[index].ids for seq in (first, second))
        assert group.directory.in_device(shared).all() == in_turns
        assert not group.directory.in_device(whole[len(shared) :]).any() and len(whole) == 5
        assert group.directory.is_demoted[shared].any() != in_turns
    rig.close()
