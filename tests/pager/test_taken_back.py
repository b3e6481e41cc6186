"""Sequences that were cut back into the middle of a block: what they still see, and what their sessions bring back."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.pager.lease import Span

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, WINDOWED, Rig

STORE = dict(pages=16, host=20)


def tokens(n: int) -> list[int]:
    return [random.Random(n).randrange(100) for _ in range(n)]


def computed(rig: Rig, n: int) -> int:
    seq = rig.start(tokens(n))
    rig.prefill(seq)
    return seq


def goes_on_after_a_restart(rig: Rig, path: Path, wanted: int) -> None:
    """The parked session "s" comes back with so many computed tokens in a new process, and reads them right."""
    layouts = rig.layouts
    rig.close()
    again = Rig(1, path=path, layouts=layouts, **STORE)
    seq, parked = again.pager.resume("s")
    assert parked.num_computed == again.pager.num_computed(seq) == wanted
    again.say(seq, [7, 7, 7])
    again.close()
    assert again.wrong == []


@pytest.mark.parametrize("left", [5, 6, 9])
def test_a_session_that_ends_in_a_block_whose_other_tokens_were_taken_back(tmp_path, left):
    """That block keeps the name of all its tokens, which the session's own do not lead to."""
    rig = Rig(0, path=tmp_path / "store", **STORE)
    seq = computed(rig, 12)
    rig.pager.truncate(seq, left)
    rig.pager.park("s", seq)
    goes_on_after_a_restart(rig, tmp_path / "store", left)


def test_a_session_that_ends_within_a_sealed_tail(tmp_path):
    rig = Rig(0, path=tmp_path / "store", **STORE)
    seq = computed(rig, 7)
    rig.pager.park("s", seq)
    seq, _ = rig.pager.resume("s")
    rig.pager.truncate(seq, 6)
    rig.pager.park("s", seq)
    goes_on_after_a_restart(rig, tmp_path / "store", 6)


@pytest.mark.parametrize("stays", ["device", "host", "nvme"])
def test_a_session_whose_tail_went_down_before_it_had_a_name(tmp_path, stays):
    """Under pressure, say. The store forgets at the next start what has no name there."""
    rig = Rig(0, path=tmp_path / "store", **STORE)
    seq = computed(rig, 6)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    blocks = core.sequences[seq].tables[0].ids
    core.write_back_blocks(group, blocks, "test")
    rig.settle()
    core.sink_blocks(group, blocks, "test")
    rig.settle()
    if stays != "device":
        group.evict(blocks, "test")
    if stays == "nvme":
        group.drop_host_copies(blocks, "test")
    rig.pager.park("s", seq)
    goes_on_after_a_restart(rig, tmp_path / "store", 6)


def test_a_windowed_session_needs_what_its_last_token_sees_and_no_more(tmp_path):
    """From the end of the tail the first block is out of the window; from the start of the tail it is not."""
    rig = Rig(0, path=tmp_path / "store", layouts=[LAYOUT, WINDOWED], **STORE)
    seq = computed(rig, 15)
    assert rig.pager._core.sequences[seq].tables[1].ids[0] == -1
    rig.settle()
    group = rig.pager._core.groups[1]  # the block that left the window is cache, and goes as cache does
    gone = group.directory.find(rig.pager.block_keys(seq, 0, BLOCK))
    group.directory.unbind(int(gone[0]))
    group.discard_dead(gone)
    rig.pager.park("s", seq)
    goes_on_after_a_restart(rig, tmp_path / "store", 15)


@pytest.mark.parametrize("left", range(1, 31))
def test_a_windowed_sequence_is_cut_anywhere(left):
    """Also into the middle of a block that its window has left behind."""
    rig = Rig(0, pages=24, host=40, layouts=[LAYOUT, WINDOWED])
    seq = computed(rig, 31)
    kept = rig.pager.truncate(seq, left)
    assert left - left % BLOCK <= kept <= left or kept < left
    rig.pager.check_integrity()
    rig.say(seq, [5, 6])
    rig.settle()
    assert rig.wrong == []


def test_a_window_without_its_sinks_is_not_taken_back(tmp_path):
    """They lie before the window, and are seen like what lies in it."""
    layout = replace(WINDOWED, sinks=BLOCK)
    rig = Rig(0, path=tmp_path / "store", layouts=[layout], **STORE)
    seq = rig.start(tokens(30))
    for end in (10, 20, 30):
        with rig.pager.lease([Span(seq, end - 10, end)]) as lease:
            lease.commit()
    rig.pager.checkpoint("s", seq)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    sinks = core.sequences[seq].tables[0].ids[[0]]
    assert sinks[0] >= 0
    rig.pager.finish(seq)
    rig.settle()
    with core.locked():
        for drop in (group.evict, group.drop_host_copies):
            drop(sinks, "test")
        group.cold.lose_copies(sinks)
    seq, parked = rig.pager.resume("s")
    assert parked.num_computed == rig.pager.num_computed(seq) == 0
    rig.pager.check_integrity()
    rig.close()
