"""One meter: what loading and computing again were measured to take."""

from __future__ import annotations

import pytest

from kvtier.pager.accounting import Counters
from kvtier.pager.costs import USUAL_BYTES_PER_S, Costs


class Group:
    cold_bytes = 1000

    def tier_bytes(self, tier: str) -> int:
        assert tier == "host"
        return 500


def test_copies_have_the_usual_rate_until_they_were_measured():
    counters = Counters()
    costs = Costs(counters, 16)
    assert costs.load_s(1e9, "nvme_to_host") == pytest.approx(1e9 / USUAL_BYTES_PER_S["nvme_to_host"])
    for reason, nbytes in (("demand", 3e6), ("prefetch", 1e6)):
        counters.add("moved_bytes", nbytes, direction="nvme_to_host", reason=reason)
        counters.add("move_seconds", 1.0, direction="nvme_to_host", reason=reason)
    assert costs.load_s(1e6, "nvme_to_host") == pytest.approx(0.5)
    assert costs.load_s(1e6, "host_to_device") == pytest.approx(1e6 / USUAL_BYTES_PER_S["host_to_device"])


def test_the_last_steps_count_for_more():
    costs = Costs(Counters(), 16)
    assert costs.compute_s_per_token == 0.0
    costs.note_computing(40, 2.0)
    assert costs.compute_s_per_token == pytest.approx(0.05)
    costs.note_computing(40, 4.0)
    assert costs.compute_s_per_token == pytest.approx(5.6 / 72)


def test_loading_wins_until_computing_was_measured_to_be_quicker():
    counters = Counters()
    costs = Costs(counters, 16)
    costs.groups = [Group(), Group()]
    assert costs.is_load_quicker()
    counters.add("moved_bytes", 1000.0, direction="nvme_to_host", reason="demand")
    counters.add("move_seconds", 1.0, direction="nvme_to_host", reason="demand")
    costs.note_computing(16, 2.1)  # of both groups a block takes 2 s to read, and little to copy up
    assert costs.is_load_quicker()
    for _ in range(50):
        costs.note_computing(16, 1.9)
    assert not costs.is_load_quicker()
