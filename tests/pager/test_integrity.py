"""Each relation that `check_integrity` walks is broken on purpose in a pager at rest, and named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Rig

from kvtier.pager.inspection.checks import SAYS, check
from kvtier.pager.states import PageState, SlotState
from kvtier.tiers.errors import InvariantError


def first(column, state) -> int:
    return int((column == state).nonzero()[0][0])


def forget_free_page(group):
    group.pages.num_free -= 1


def reference_nobody_has(group):
    group.directory.refs[5] += 1


def page_of_another_block(group):
    group.directory.page[group.pages.block[first(group.pages.state, PageState.RESIDENT)]] += 1


def pin_a_free_page(group):
    group.pages.pins[first(group.pages.state, PageState.FREE)] = 1


def copy_without_a_move(group):
    group.pages.copies[first(group.pages.state, PageState.RESIDENT)] = 1


def filling_without_a_move(group):
    group.pages.state[first(group.pages.state, PageState.RESIDENT)] = PageState.FILLING


def slot_of_another_block(group):
    group.directory.host_slot[group.host.block[first(group.host.state, SlotState.VALID)]] += 1


def staging_without_a_move(group):
    group.host.state[first(group.host.state, SlotState.VALID)] = SlotState.STAGING
    group.directory.nvme_valid[:] = True  # so that only the slot is wrong


def copy_below_that_left(group):
    group.host.state[:] = SlotState.NONE
    group.host.num_free = len(group.host)


def key_of_another_block(group):
    key = next(iter(group.directory.by_key))
    group.directory.by_key[key] += 1


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (forget_free_page, "free pages"),
        (reference_nobody_has, "references"),
        (page_of_another_block, "page <-> block"),
        (pin_a_free_page, "pins or copies of free pages"),
        (copy_without_a_move, "copies left over"),
        (filling_without_a_move, "moving page without a move"),
        (slot_of_another_block, "host slot <-> block"),
        (staging_without_a_move, "staging slot without a move"),
        (copy_below_that_left, "RESIDENT without a copy below"),
        (key_of_another_block, "key <-> block"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_contradiction_is_named(plant, named):
    rig = Rig(pages=8)
    seq = rig.start([1, 2, 3] * 8)
    rig.prefill(seq)
    rig.pager.demote(seq)
    rig.settle()
    rig.pager.check_integrity()
    plant(rig.pager._core.groups[0])
    with pytest.raises(InvariantError, match=f"{named} do not agree"):
        rig.pager.check_integrity()


def test_people_are_told_the_same_list_of_facts():
    """One list, two readers: every fact has words for people, and a broken one is told as it is raised."""
    rig = Rig()
    rig.prefill(rig.start(list(range(24))))
    rig.settle()
    core = rig.pager._core
    known = {fact.rule for _, fact in core.facts()}
    assert known <= set(SAYS) and set(SAYS) - known <= {"B7"}  # links exist where the host tier keeps fewer bits
    assert {row["rule"] for row in check(core)["checks"]} >= known and check(core)["findings"] == 0
    core.groups[0].directory.refs[5] += 1
    (row,) = (row for row in check(core)["checks"] if row["verdict"] != "ok")
    assert row["rule"] == "B3" and "references, first [5]" in row["detail"]
    core.groups[0].directory.refs[5] -= 1
    rig.close()
