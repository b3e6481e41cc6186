"""Counters are read by whoever wants to know, while the pager's own threads go on counting."""

from __future__ import annotations

from kvtier.pager.accounting import Counters


class Meanwhile(str):
    """A name at whose every comparison another thread counts something new."""

    def __new__(cls, name: str, counters: Counters) -> Meanwhile:
        made = super().__new__(cls, name)
        made.counters = counters
        return made

    def __eq__(self, other: object) -> bool:
        self.counters.add(f"new {len(self.counters.to_list())}", 1.0)
        return super().__eq__(other)

    __hash__ = str.__hash__


def test_a_sum_is_told_while_others_count_what_was_never_counted_before():
    counters = Counters()
    counters.add("moved", 2.0, way="up")
    counters.add("moved", 3.0, way="down")
    assert counters.get("moved") == 5.0 and counters.get("moved", way="up") == 2.0
    assert counters.get(Meanwhile("moved", counters)) == 5.0
    assert len(counters.to_list()) > 2
