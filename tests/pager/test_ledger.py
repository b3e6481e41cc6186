from __future__ import annotations

import pytest

from kvtier.pager.ledger import RequestLedger


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_lines_sum_to_the_time_to_first_token():
    clock = Clock()
    ledger = RequestLedger(clock)
    with ledger.phase("prefill"):
        clock.now_s += 2
        with ledger.phase("wait_for_blocks"):
            clock.now_s += 3
        clock.now_s += 1
    clock.now_s += 0.5
    ledger.first_token()
    clock.now_s += 50
    lines = ledger.to_dict()
    assert lines == {"prefill": 3.0, "wait_for_blocks": 3.0, "unexplained": 0.5, "ttft_s": 6.5}
    assert ledger.ttft_s == 6.5


def test_time_after_the_first_token_is_not_booked():
    clock = Clock()
    ledger = RequestLedger(clock)
    ledger.first_token()
    with ledger.phase("decode"):
        clock.now_s += 5
    assert ledger.to_dict()["ttft_s"] == 0.0


def test_a_phase_that_fails_is_booked_too():
    clock = Clock()
    ledger = RequestLedger(clock)
    with pytest.raises(RuntimeError), ledger.phase("prefill"):
        clock.now_s += 2
        raise RuntimeError
    ledger.first_token()
    assert ledger.to_dict()["prefill"] == 2.0
