"""Leases that are given up: what they queued still runs, and nothing may be copied away before it has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Rig

from kvtier.pager.lease import Span

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tail_that_was_copied_for_a_step_is_written_back_after_its_copy(seed):
    """Found by the simulation: the copy-out overtook the copy on write, and the host tier held bytes of nobody."""
    rig = Rig(seed, pages=10, host=20)
    seq = rig.start(list(range(1, 9)))
    rig.prefill(seq)
    rig.pager.truncate(seq, 6)  # into a block that is named by all its tokens: the next token copies it
    rig.pager.append(seq, [1, 2])
    rig.settle()
    rig.pager.lease([Span(seq, 6, 8)]).release()
    rig.pager.demote(seq)
    while rig.pager._core.in_flight():
        rig.backend.run_one()
        rig.pager.poll()
    rig.pager.demote(seq)  # clean by now: its pages go
    rig.prefill(seq)
    rig.settle()
    rig.pager.check_integrity()
    assert rig.pager.counters.get("copy_on_write_blocks") and rig.wrong == []
