"""A block that is appended to while its older copy goes from host to nvme: the older copy counts for nothing afterwards.

Both orders of events were found by the model checker (tests/model) before they were seen anywhere else.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import Rig

SEEDS = range(8)


def appended_during_its_write(path: Path, seed: int) -> tuple[Rig, int]:
    """The tail of a sequence is on its way from host to nvme, and has been appended to meanwhile."""
    rig, rng = Rig(seed, pages=10, host=20, path=path), random.Random(seed)
    seq = rig.start([rng.randrange(100) for _ in range(6)])
    rig.prefill(seq)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    blocks = core.sequences[seq].tables[0].ids.copy()
    core.write_back_blocks(group, blocks, "test")
    rig.settle()
    assert core.sink_blocks(group, blocks, "test") == 2
    rig.say(seq, [7])
    assert group.moves, "the write to nvme is still on its way"
    return rig, seq


def reads_right_from_below(rig: Rig, seq: int) -> None:
    """Bring the sequence to nvme alone and back, twice, then compute on."""
    for token in (8, 9):
        rig.pager.demote(seq)
        rig.settle()
        group = rig.pager._core.groups[0]
        blocks = rig.pager._core.sequences[seq].tables[0].ids
        rig.pager._core.sink_blocks(
            group, blocks[group.directory.in_host(blocks) & ~group.directory.nvme_valid[blocks]], "test"
        )
        rig.settle()
        rig.pager.check_integrity()
        group.evict(blocks[group.directory.in_device(blocks)], "test")
        group.drop_host_copies(blocks[group.directory.in_host(blocks)], "test")
        rig.pager.check_integrity()
        rig.say(seq, [token])
        rig.settle()
        assert rig.wrong == [] and not rig.pager.counters.get("lost_tokens")


@pytest.mark.parametrize("seed", SEEDS)
def test_it_goes_down_again_only_when_its_older_copy_is_given_back(tmp_path, seed):
    rig, seq = appended_during_its_write(tmp_path / "store", seed)
    rig.pager.demote(seq)
    rig.pager.check_integrity()
    rig.settle()
    rig.pager.check_integrity()
    reads_right_from_below(rig, seq)
    rig.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_its_older_copy_goes_when_the_mover_does(tmp_path, seed):
    rig, seq = appended_during_its_write(tmp_path / "store", seed)
    rig.pager.abandon_transfers()
    rig.pager.check_integrity()
    reads_right_from_below(rig, seq)
    rig.close()
