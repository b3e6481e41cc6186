"""What the views show: pages of long lists, and only the rows that are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.pager.inspection import views
from kvtier.pager.inspection.events import KIND
from kvtier.pager.inspection.inspector import Inspector
from kvtier.tiers.errors import ConfigError

from .harness import LAYOUT, WINDOWED, Rig


def a_rig() -> Rig:
    """Blocks in two layer groups, some used at the same time as others."""
    rig = Rig(0, pages=40, host=8, layouts=[LAYOUT, WINDOWED])
    for first in (0, 1000):
        rig.prefill(rig.start(list(range(first, first + 40))))
        rig.settle()
    return rig


@pytest.mark.parametrize("sort", views.BLOCK_SORTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_pages_of_blocks_go_on_where_the_one_before_ended_and_make_only_their_rows(monkeypatch, sort, reverse):
    rig, made = a_rig(), []
    row = views._block_row
    monkeypatch.setattr(views, "_block_row", lambda *place: made.append(place) or row(*place))

    def page(limit: int, offset: int) -> list[tuple[int, int]]:
        told = views.blocks(rig.pager._core, sort=sort, reverse=reverse, limit=limit, offset=offset)
        assert told["total"] == sum(told["by_tier"].values()) > 20
        return [(one["group"], one["block"]) for one in told["blocks"]]

    whole = page(1000, 0)
    assert {group for group, _ in whole} == {0, 1} and len(set(whole)) == len(whole)
    made.clear()
    assert [one for offset in range(0, len(whole), 7) for one in page(7, offset)] == whole
    assert len(made) == len(whole)
    assert page(7, 10**6) == []
    rig.close()


@pytest.mark.parametrize("verb", ["blocks", "sessions"])
@pytest.mark.parametrize(("name", "value"), [("offset", -1), ("limit", 0), ("limit", -1), ("limit", 1001)])
def test_a_page_that_cannot_be_is_refused(verb, name, value):
    rig = a_rig()
    with pytest.raises(ConfigError, match=f"{name}={value}: need "):
        Inspector(rig.pager._core).answer({"verb": verb, name: value})
    rig.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"verb": "explain", "about": "00000000", "limit": 0}, "limit=0: need 1"),
        ({"verb": "explain", "about": "00000000", "limit": -1}, "limit=-1: need 1"),
        ({"verb": "why", "slowest": -1}, "slowest=-1: need 1"),
    ],
)
def test_fewer_rows_than_one_are_refused(body, message):
    rig = a_rig()
    with pytest.raises(ConfigError, match=message):
        Inspector(rig.pager._core).answer(body)
    rig.close()


def test_decisions_of_one_kind_are_looked_for_in_the_whole_ring():
    rig = a_rig()
    group, ring = rig.pager._core.groups[0], rig.pager._core.observer.events
    for number in range(60):
        kind = "evicted" if number < 8 else "promoted"
        ring.note(KIND[kind], 1, 0, group.directory, np.array([0]), f"r{number}")
    asked = Inspector(rig.pager._core).answer
    told = asked({"verb": "trace", "types": "evicted", "limit": 5})
    assert [row["reason"] for row in told["events"]] == ["r3", "r4", "r5", "r6", "r7"]
    assert told["next"] == ring.num_written and told["lost"] == 0
    assert [row["reason"] for row in asked({"verb": "trace", "limit": 2})["events"]] == ["r58", "r59"]
    rig.close()


def test_sizes_of_advice_are_those_of_all_layer_groups():
    rig = a_rig()
    for _ in range(3):
        rig.pager.finish(rig.start(list(range(41))))
    sizes = {row["factor"]: row["tier_bytes"] for row in Inspector(rig.pager._core).answer({"verb": "advise"})["rows"]}
    whole = sum(len(group.host) * group.tier_bytes("host") for group in rig.pager._core.groups)
    assert len(rig.pager._core.groups) == 2 and sizes[1.0] == whole and sizes[2.0] == 2 * whole
    rig.close()
