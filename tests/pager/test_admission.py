"""Admission: budgets hold back cache and no promise, and what is refused is in nobody's way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvtier.pager.accounting import Counters
from kvtier.pager.admission import DAY_S, Admission
from kvtier.pager.config import PagerConfig
from kvtier.pager.costs import Costs
from kvtier.tiers.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

DISK_BLOCK = 4096


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def tokens(start: int, blocks: int = 4) -> list[int]:
    return list(range(start, start + BLOCK * blocks))


def cache(rig: Rig, start: int) -> None:
    seq = rig.start(tokens(start))
    rig.prefill(seq)
    rig.pager.finish(seq)
    rig.settle()
    rig.pager.poll()
    rig.settle()


def opened(tmp_path, clock: Clock, **budget) -> Rig:
    return Rig(
        0,
        pages=12,
        host=12,
        path=tmp_path / "s",
        nvme_bytes=4000 * DISK_BLOCK,
        clock=clock,
        host_prefault=False,
        **budget,
    )


def written(rig: Rig) -> int:
    return int(rig.pager.counters.get("moved_blocks", direction="host_to_nvme")) * DISK_BLOCK


def closed(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert not rig.wrong
    rig.close()


@pytest.mark.parametrize("seconds", [1, 20])
def test_cache_keeps_to_the_budget_and_the_pager_goes_on(tmp_path, seconds):
    clock = Clock()
    rig = opened(tmp_path, clock, nvme_write_bytes_per_s=4 * DISK_BLOCK)
    for step in range(60):
        clock.now_s += seconds / 60
        cache(rig, 1000 * step)
    assert 0 < written(rig) <= (seconds + 1) * 4 * DISK_BLOCK + DISK_BLOCK
    assert rig.pager.counters.get("refused_blocks", tier="nvme", reason="budget") > 0
    closed(rig)


def test_without_a_budget_all_is_written(tmp_path):
    rig = opened(tmp_path, Clock())
    for step in range(20):
        cache(rig, 1000 * step)
    assert written(rig) > 40 * DISK_BLOCK and not rig.pager.counters.get("refused_blocks")
    closed(rig)


def test_a_parked_session_is_never_refused_and_is_charged(tmp_path):
    clock = Clock()
    rig = opened(tmp_path, clock, nvme_write_bytes_per_day=DISK_BLOCK * 24)
    for number in range(6):
        seq = rig.start(tokens(1000 * number))
        rig.prefill(seq)
        rig.pager.park(f"chat{number}", seq)
    assert all(one["is_durable"] for one in rig.pager.sessions().values())
    before = written(rig)
    for step in range(10):
        cache(rig, 100_000 + 1000 * step)
    assert written(rig) == before  # they used it up
    clock.now_s += DAY_S
    for step in range(10):
        cache(rig, 200_000 + 1000 * step)
    assert before < written(rig) <= before + 25 * DISK_BLOCK
    closed(rig)


def test_when_little_is_left_what_was_found_again_is_written_and_nothing_else(tmp_path):
    clock = Clock()
    rig = opened(tmp_path, clock, nvme_write_bytes_per_s=100 * DISK_BLOCK)
    group = rig.pager._core.groups[0]
    first = rig.start(tokens(0, 2))
    rig.prefill(first)
    rig.pager.finish(first)
    again = rig.start([*tokens(0, 2), 5])
    rig.pager.finish(again)
    fresh = rig.start(tokens(9000, 2))
    rig.prefill(fresh)
    rig.pager.finish(fresh)
    blocks = group.directory.live()
    reused = blocks[group.directory.is_reused[blocks]]
    assert 0 < len(reused) < len(blocks)
    assert group.admission.choose(group, blocks, "writeback").tolist() == blocks.tolist()
    group.admission.wrote(60 * DISK_BLOCK)
    assert group.admission.choose(group, blocks, "writeback").tolist() == reused.tolist()
    assert group.admission.choose(group, blocks, "park").tolist() == blocks.tolist()
    group.admission.wrote(60 * DISK_BLOCK)
    assert not len(group.admission.choose(group, blocks, "writeback"))
    closed(rig)


def test_what_is_computed_sooner_than_loaded_is_not_written_for_a_first_use(tmp_path):
    rig = opened(tmp_path, Clock(), nvme_write_bytes_per_s=100 * DISK_BLOCK)
    group, pager = rig.pager._core.groups[0], rig.pager
    first = rig.start(tokens(0, 2))
    rig.prefill(first)
    pager.finish(first)
    pager.finish(rig.start([*tokens(0, 2), 5]))
    fresh = rig.start(tokens(9000, 2))
    rig.prefill(fresh)
    pager.finish(fresh)
    blocks = group.directory.live()
    reused = blocks[group.directory.is_reused[blocks]]
    assert 0 < len(reused) < len(blocks)
    pager.note_computing(1000, 1e-9)
    assert group.admission.choose(group, blocks, "writeback").tolist() == reused.tolist()
    assert group.admission.choose(group, blocks, "park").tolist() == blocks.tolist()
    for _ in range(100):
        pager.note_computing(1000, 1e6)
    assert group.admission.choose(group, blocks, "writeback").tolist() == blocks.tolist()
    closed(rig)


def test_without_a_budget_a_quick_computer_changes_nothing(tmp_path):
    rig = opened(tmp_path, Clock())
    fresh = rig.start(tokens(0, 2))
    rig.prefill(fresh)
    rig.pager.finish(fresh)
    rig.pager.note_computing(1000, 1e-9)
    group = rig.pager._core.groups[0]
    blocks = group.directory.live()
    assert len(blocks) and group.admission.choose(group, blocks, "writeback").tolist() == blocks.tolist()
    closed(rig)


def test_both_budgets_hold():
    clock = Clock()
    both = Admission(1000, 24_000, clock, Costs(Counters(), BLOCK))
    both.wrote(1000)
    clock.now_s = 1.0
    assert both._level() < 0.01  # the day's has not come back
    clock.now_s = 3600.0
    assert both._level() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["nvme_write_bytes_per_s", "nvme_write_bytes_per_day"])
def test_a_budget_that_makes_no_sense_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}=0: give more than 0"):
        PagerConfig(1 << 20, 1 << 20, nvme_path=tmp_path, **{name: 0}).validate()
    with pytest.raises(ConfigError, match=f"{name}='1GiB' without nvme_path"):
        PagerConfig(1 << 20, **{name: "1GiB"}).validate()


def test_what_a_sequence_refers_to_is_written_and_what_is_refused_may_be_dropped(tmp_path):
    """Else the host tier fills up with what can neither go down nor leave."""
    rig = opened(tmp_path, Clock(), nvme_write_bytes_per_s=100 * DISK_BLOCK)
    group = rig.pager._core.groups[0]
    kept = rig.start(tokens(0, 2))
    rig.prefill(kept)
    passing = rig.start(tokens(9000, 2))
    rig.prefill(passing)
    for seq in (kept, passing):
        for _ in range(2):
            rig.pager.demote(seq)
            rig.settle()
    held, fresh = (rig.pager._core.sequences[seq].tables[0].ids.copy() for seq in (kept, passing))
    rig.pager.finish(passing)
    assert not group.directory.nvme_valid[fresh].any()
    assert not set(group.leaving.first_host_copies(4, False, None).tolist()) & set(
        fresh.tolist()
    )  # it waits to be written
    group.admission.wrote(200 * DISK_BLOCK)
    assert set(fresh.tolist()) <= set(group.leaving.first_host_copies(4, False, None).tolist())
    assert group.admission.choose(group, held, "writeback").tolist() == held.tolist()
    closed(rig)
