"""That every test here looks for leaks: what nobody holds is found after the test, and when a pager is closed."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.tiers.errors import InvariantError

from ..books import check_open
from .test_families import tiny
from .test_scheduler import open_engine, prompt_of


def opened():
    """An engine that has computed something and holds nothing; its layer group's books."""
    engine = open_engine(tiny("llama"))
    engine.generate([prompt_of(40, 1)], SamplingParams(max_tokens=2))
    check_open()
    return engine, engine.pager._core.groups[0]


def test_a_reference_that_nobody_holds_is_found_after_the_test_and_at_the_end():
    engine, group = opened()
    group.directory.refs[0] += 1
    with pytest.raises(InvariantError, match="references"):
        check_open()
    with pytest.raises(InvariantError, match="references"):
        engine.close()
    check_open()  # it was said, and it is closed


def test_a_pin_that_is_left_over_is_found_at_the_end():
    engine, group = opened()
    group.pages.pins[group.directory.page[group.directory.page >= 0][0]] += 1
    with pytest.raises(InvariantError, match="pins"):
        engine.close()
