"""Steps over the pages of the step before: taken wherever nothing has to move, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager import lease_in_place
from kvtier.pager.lease import Span
from kvtier.pager.states import PageState
from kvtier.tiers.errors import InvariantError, TierFullError

sys.path.insert(0, str(Path(__file__).parent))
from harness import WINDOWED, Rig


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def in_place(monkeypatch):
    """How often a layer group was filled in place (True) and not."""
    found, fill = [], lease_in_place.fill_in_place

    def spy(*given):
        held = fill(*given)
        found.append(held is not None)
        return held

    monkeypatch.setattr("kvtier.pager.leasing.fill_in_place", spy)
    return found


def begun(rig: Rig, num_tokens: int, first: int = 0) -> int:
    seq = rig.start(list(range(first, first + num_tokens)))
    rig.prefill(seq)
    return seq


def test_steps_within_a_block_are_filled_in_place_and_read_what_was_written(in_place):
    for seed in range(4):
        rig = Rig(seed)
        a, b = begun(rig, 9), begun(rig, 5, 100)
        in_place.clear()
        for token in range(7):
            rig.pager.append(a, [token])
            rig.pager.append(b, [token])
            rig.step([(a, 1), (b, 1)])
        rig.settle()
        # a is 9 to 16 long and b 5 to 12: both begin blocks at the fourth step, and do nothing else
        assert in_place == [True] * 3 + [False] + [True] * 3
        assert not rig.wrong


def test_more_tokens_than_the_block_has_room_for_take_a_page(in_place):
    rig = Rig()
    seq = begun(rig, 6)
    in_place.clear()
    rig.say(seq, [1])
    rig.say(seq, [2, 3, 4])
    rig.say(seq, [5, 6, 7, 8, 9])
    rig.settle()
    assert in_place[0] and not any(in_place[1:]) and not rig.wrong


def test_a_tail_that_others_refer_to_or_that_has_a_name_is_copied(in_place):
    rig = Rig()
    seq = begun(rig, 6)
    child = rig.pager.fork(seq)
    in_place.clear()
    rig.say(seq, [1])
    assert in_place == [False], "a fork reads the same block"
    rig.say(child, [2])
    assert in_place == [False, True], "the last one may write to it"
    rig.pager.seal(child)
    rig.say(child, [3])
    assert not in_place[-1], "somebody may find it by its name"
    rig.settle()
    assert not rig.wrong


def test_blocks_that_left_the_device_tier_are_brought_up_again():
    for seed in range(6):
        rig = Rig(seed, pages=8, host=32)
        a = begun(rig, 14)
        rig.say(a, [1])  # remembered
        table, group = rig.pager._core.sequences[a].tables[0], rig.pager._core.groups[0]
        assert table.known_row(group.pages.num_left) is not None and rig.pager.bring_up(a) == 0
        rig.pager.demote(a)
        rig.pager.drain()
        begun(rig, 26, 500)  # all its pages go to somebody else
        assert table.known_row(group.pages.num_left) is None and rig.pager.bring_up(a) > 0
        rig.say(a, [2])
        rig.settle()
        assert not rig.wrong


def test_a_table_that_changed_is_looked_at_again(in_place):
    rig = Rig()
    seq = begun(rig, 11)
    rig.say(seq, [1])
    rig.pager.truncate(seq, 6)
    in_place.clear()
    rig.say(seq, [7])  # in a copy of a block that has a name
    rig.pager.append(seq, [8])
    with rig.pager.lease([Span(seq, 7, 8)]) as lease:
        assert in_place == [False, True]
        assert lease.tables[0].shape == (1, 2) and lease.kv_lens[0].tolist() == [8]
        rig.compute(lease)
        lease.commit()
    rig.settle()
    assert not rig.wrong


def test_a_table_cannot_be_changed_behind_its_back():
    rig = Rig()
    seq = begun(rig, 6)
    table = rig.pager._core.sequences[seq].tables[0]
    with pytest.raises(ValueError, match="read-only"):
        table.ids[0] = 3
    rig.say(seq, [1])
    rig.pager.check_integrity()
    table._ids[[0, 1]] = table._ids[[1, 0]]
    with pytest.raises(InvariantError, match="remembered places"):
        rig.pager.check_integrity()
    table._ids[[0, 1]] = table._ids[[1, 0]]
    before = table.version
    table.put(0, int(table.ids[0]))
    table.extend(np.empty(0, np.int64))
    table.trim(2)
    assert table.version == before + 3


def test_its_pages_are_pinned_while_it_is_held():
    """Rule 6: who needs room does not get it from a step that is being computed."""
    rig = Rig(pages=8, host=32)
    a = begun(rig, 14)
    rig.pager.append(a, [1])
    with rig.pager.lease([Span(a, 14, 15)]) as lease:
        assert (rig.pager._core.groups[0].pages.pins[lease.tables[0][0]] == 1).all()
        rig.pager.demote(rig.pager.fork(begun(rig, 6, 300)))
        with pytest.raises(TierFullError):
            rig.prefill(rig.start(list(range(600, 626))), chunk=26, allow_streaming=False)
        rig.compute(lease)
        lease.commit()
    assert not rig.pager._core.groups[0].pages.pins.any()
    rig.settle()
    assert not rig.wrong


def test_an_append_makes_copies_below_stale(in_place):
    """What was written back before is no copy of the block any more."""
    for seed in range(4):
        rig = Rig(seed, pages=8, host=32)
        seq, group = begun(rig, 5), rig.pager._core.groups[0]
        tail = rig.pager._core.sequences[seq].tables[0].ids[-1:]
        rig.settle()
        rig.pager._core.write_back_blocks(group, tail, "writeback")
        rig.pager.drain()
        assert group.pages.state[group.directory.page[tail[0]]] == PageState.RESIDENT
        in_place.clear()
        rig.say(seq, [1])
        assert in_place == [True]
        assert (
            group.pages.state[group.directory.page[tail[0]]] == PageState.DIRTY
            and group.directory.host_slot[tail[0]] < 0
        )
        rig.settle()
        rig.pager.demote(seq)
        begun(rig, 26, 500)
        rig.say(seq, [2])
        rig.settle()
        assert not rig.wrong


def test_windows_streams_and_steps_that_only_write_go_the_other_way(in_place):
    rig = Rig(layouts=[WINDOWED])
    seq = begun(rig, 9)
    rig.say(seq, [1])
    assert not any(in_place)
    rig = Rig()
    seq = begun(rig, 6)
    rig.pager.append(seq, [1])
    in_place.clear()
    for options in (dict(window=4), {}):
        with rig.pager.lease([Span(seq, 6, 7, **options)], write_only=not options):
            assert in_place.pop() is False


def test_recency_is_told_now_and_then(in_place, monkeypatch):
    clock = Clock()
    rig = Rig(clock=clock)
    seq, group, told = begun(rig, 5), rig.pager._core.groups[0], []
    monkeypatch.setattr(group, "touch", lambda blocks, *_: told.append(blocks.tolist()))
    for now_s in (10.0, 10.0 + 0.9 * lease_in_place.TOUCH_EVERY_S, 10.0 + 1.1 * lease_in_place.TOUCH_EVERY_S):
        clock.now_s = now_s
        rig.say(seq, [1])
    assert in_place[-3:] == [True] * 3 and told == [rig.pager._core.sequences[seq].tables[0].ids.tolist()] * 2
