"""The protocol of pages and host slots, every interleaving within a bound: right with all rules, wrong without any one."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.rules import Rule
from kvtier.pager.states import (
    PAGE_STEPS,
    SLOT_STEPS,
    HostSlots,
    Pages,
    PageState,
    SlotState,
    page_may_step,
    slot_may_step,
)
from kvtier.tiers.errors import InvariantError

sys.path.insert(0, str(Path(__file__).parent))
import checker
import model_steps


@pytest.mark.parametrize("bound", checker.BOUNDS, ids=lambda bound: bound.name.replace(" ", "-"))
def test_with_all_rules_nothing_goes_wrong(bound):
    result = checker.Search(bound).run()
    print(result)
    assert not result.violation and result.states > 1000, str(result)


@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)
def test_without_the_rule_something_goes_wrong(rule):
    result = checker.without(rule)
    print(result)
    assert result.violation and "coming to rest" not in result.violation, str(result)
    assert result.trace, "a violation comes with the way to it"


def test_every_legal_step_is_taken(monkeypatch):
    taken: set[tuple[object, object]] = set()

    def noting(may_step):
        def asked(source, to, **options):
            taken.add((source, to))
            return may_step(source, to, **options)

        return asked

    monkeypatch.setattr(model_steps, "page_may_step", noting(page_may_step))
    monkeypatch.setattr(model_steps, "slot_may_step", noting(slot_may_step))
    checker.Search(checker.BOUNDS[2]).run()
    rows = {(source, to) for table in (PAGE_STEPS, SLOT_STEPS) for source in table for to in table[source]}
    assert rows <= taken, rows - taken


def test_the_array_code_allows_what_the_tables_allow():
    for source, to, pins, copies in product(PageState, PageState, (0, 1), (0, 1)):
        pages = Pages(1)
        pages.state[0], pages.pins[0], pages.copies[0] = source, pins, copies
        is_allowed = _passes(lambda pages=pages, to=to: pages.step(np.array([0]), to))
        assert is_allowed == page_may_step(source, to, is_idle=not (pins or copies)), (source, to, pins, copies)
    for source, to, holds in product(SlotState, SlotState, (0, 1)):
        slots = HostSlots(1)
        slots.state[0], slots.holds[0] = source, holds
        steps = {SlotState.STAGING: _stage, SlotState.VALID: _publish, SlotState.LINKED: _link}
        is_allowed = _passes(lambda slots=slots, to=to, steps=steps: steps.get(to, _drop)(slots))
        assert is_allowed == slot_may_step(source, to, is_held=holds > 0), (source, to, holds)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bound", checker.DEEP_BOUNDS, ids=lambda bound: bound.name.replace(" ", "-"))
def test_deeper(bound):
    result = checker.Search(bound).run()
    print(result)
    assert not result.violation, str(result)


def _publish(slots: HostSlots) -> None:
    slots.publish(np.array([0]))


def _stage(slots: HostSlots) -> None:
    slots.stage(np.array([0]), np.array([5]))


def _link(slots: HostSlots) -> None:
    slots.take_along(np.array([0]), np.array([5]))


def _drop(slots: HostSlots) -> None:
    slots.drop(np.array([0]))


def _passes(step) -> bool:
    try:
        step()
    except InvariantError:
        return False
    return True
