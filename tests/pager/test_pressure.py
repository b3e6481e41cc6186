"""Predicted pressure: copies made early, so that a step's new pages need not wait for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvtier.pager.pressure import Pressure

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

STEP_BLOCKS = 6


def waited(monkeypatch, *, foresees: bool, seed: int = 0) -> float:
    """Virtual seconds that leases waited: a millisecond per look at copies under way; steps give copies time to end."""
    if not foresees:
        monkeypatch.setattr(Pressure, "foreseen", lambda self: 0)
    now = [0.0]
    rig = Rig(seed, pages=40, host=400, low_watermark=0.05, high_watermark=0.1, clock=lambda: now[0])
    look = rig.backend.wait_any

    def wait_any(timeout_s: float) -> object:
        now[0] += 0.001
        return look(timeout_s)

    monkeypatch.setattr(rig.backend, "wait_any", wait_any)
    for start in range(0, 4000, 100):
        seq = rig.start(list(range(start, start + 2 * STEP_BLOCKS * BLOCK)))
        for _ in range(2):
            rig.step([(seq, STEP_BLOCKS * BLOCK)])
            rig.pager.poll()
            before = now[0]
            rig.settle()  # the model computes
            now[0] = before
        rig.pager.finish(seq)
    assert rig.wrong == []
    rig.pager.check_integrity()
    return rig.pager.counters.get("lease_wait_seconds")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_waits_less_where_its_need_was_foreseen(monkeypatch, seed):
    with monkeypatch.context() as patched:
        without = waited(patched, foresees=False, seed=seed)
    with monkeypatch.context() as patched:
        foreseen = waited(patched, foresees=True, seed=seed)
    assert without > 0.05 and foreseen < 0.2 * without


def test_what_waits_in_the_queue_is_made_room_for_before_it_runs(monkeypatch):
    rig = Rig(3, pages=40, host=400, low_watermark=0.05, high_watermark=0.1)
    group = rig.pager._core.groups[0]
    for start in (0, 1000):
        seq = rig.start(list(range(start, start + 18 * BLOCK)))
        rig.prefill(seq, chunk=BLOCK)  # a page at a time: the steps alone foresee little
        rig.pager.finish(seq)
        rig.settle()
    waiting = rig.pager.begin()
    rig.pager.append(waiting, list(range(5000, 5000 + 16 * BLOCK)))
    ready = group.pages.num_free + group.leaving.clean_pages()
    assert ready < 16
    rig.pager.prefetch(waiting)
    rig.pager.poll()
    rig.settle()
    assert group.pages.num_free + group.leaving.clean_pages() >= 16
    rig.prefill(waiting)
    assert group.pressure.queued == 0 and rig.wrong == []


def test_a_forecast_is_forgotten_when_the_steps_grow_small_and_never_asks_for_more_than_its_share():
    pressure = Pressure(100)
    for _ in range(50):
        pressure.took(40)
        pressure.step()
    assert pressure.foreseen() == 25
    for _ in range(100):
        pressure.step()
    assert pressure.foreseen() == 0
    pressure.queued = 1000
    assert pressure.foreseen() == 50


def test_a_forecast_takes_nothing_from_a_full_host_tier():
    """What lies there alone stays as long as pages are not needed now."""
    rig = Rig(0, pages=40, host=20, low_watermark=0.05, high_watermark=0.1)
    group = rig.pager._core.groups[0]
    first = rig.start(list(range(20 * BLOCK)))
    rig.prefill(first, chunk=5 * BLOCK)
    for _ in range(4):
        rig.pager.demote(first)
        rig.settle()
    assert group.host.num_free == 0
    rig.pager.finish(first)
    seq = rig.start(list(range(5000, 5000 + 30 * BLOCK)))
    rig.prefill(seq, chunk=6 * BLOCK)  # leaves ten pages free
    assert group.pressure.foreseen() == 10
    group.pressure.queued = 20
    for _ in range(5):
        rig.pager.poll()
        rig.settle()
    assert rig.pager.match(list(range(20 * BLOCK))).tokens == 20 * BLOCK and rig.wrong == []
