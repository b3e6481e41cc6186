"""Slices that are streamed: in host slots they are read in place where computing can, and such slots stay."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.lease import Span
from kvtier.pager.rules import ALL_RULES, Rule
from kvtier.pager.streaming import StagingRing
from kvtier.tiers.cpu import CpuBackend

sys.path.insert(0, str(Path(__file__).parent))
from harness import PACKABLE, ROUNDED, Rig


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


def done(rig: Rig, what: str) -> int:
    return int(rig.pager.counters.get(f"{what}_slices", reason="stream"))


def test_host_slots_are_read_in_place_and_only_the_rest_takes_the_ring(tmp_path):
    rig = Rig(pages=8, host=14, backend=CpuBackend(poison=True), path=tmp_path / "s", staging=2)
    seq = rig.start(tokens(120))
    rig.prefill(seq)
    for turn in range(4):
        rig.say(seq, tokens(2, turn))
    rig.settle()
    assert rig.wrong == [] and done(rig, "attended") > 0 and done(rig, "moved") > 0
    rig.pager.check_integrity()
    rig.close()


@pytest.mark.parametrize("is_guarded", [True, False], ids=["as far as there is room", "one chunk further"])
def test_what_comes_from_nvme_is_computed_on_where_it_was_read_to(tmp_path, monkeypatch, is_guarded):
    """Rule 12: nothing is read over the chunk that is computed on."""
    if not is_guarded:
        monkeypatch.setattr(StagingRing, "reads_ahead", property(lambda ring: ring.num_slots + 1))
    rig = Rig(pages=6, host=4, backend=CpuBackend(), path=tmp_path / "s", staging=1, nvme_bytes=1 << 20)
    (ring,) = rig.pager._core.rings
    chunks_per_layer = 100 // ring.chunk_slices
    assert ring.num_slots < chunks_per_layer // 2, "each slot is read into again and again"
    seq = rig.start(tokens(400))
    for _ in range(1000):  # what is read over may also be found out, and computed again
        if rig.wrong or rig.pager.num_computed(seq) == 400:
            break
        rig.step([(seq, rig.pager.plan_prefill(seq, 8))])
    rig.settle()
    assert bool(rig.wrong) == (not is_guarded)
    count = rig.pager.counters.get
    assert count("moved_slices", reason="stream", direction="nvme_to_host") > 0
    assert count("moved_slices", reason="stream", direction="host_to_device") == 0
    rig.close()


@pytest.mark.parametrize("options", [{}, {"host_format": "int8"}], ids=["device of its own", "packed below"])
def test_what_computing_cannot_read_takes_the_ring(options):
    backend = CpuBackend(poison=True, reads_host=bool(options))
    rig = Rig(
        pages=8, host=40, backend=backend, staging=2, layouts=[PACKABLE], error=ROUNDED if options else 0.0, **options
    )
    seq = rig.start(tokens(20 * PACKABLE.block_size))
    rig.prefill(seq, chunk=PACKABLE.block_size)
    rig.settle()
    assert rig.wrong == [] and done(rig, "attended") == 0 and done(rig, "moved") > 0
    rig.close()


@pytest.mark.parametrize("is_guarded", [True, False], ids=["held", "rule 7 left out"])
def test_a_slot_that_is_read_in_place_is_not_given_to_another_block(tmp_path, is_guarded):
    rules = ALL_RULES if is_guarded else ALL_RULES.without(Rule.HOST_SLOT_HELD_WHILE_READ)
    rig = Rig(pages=8, host=12, backend=CpuBackend(), path=tmp_path / "s", staging=2, rules=rules)
    seq = rig.start(tokens(60))
    rig.prefill(seq)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    rig.pager.append(seq, [1])
    with rig.pager.lease([Span(seq, 60, 61)]) as lease:
        staged = next(chunk for chunk in lease.stream(0, 0) if chunk.slots is not None)
        with core.locked():
            core.make_host_room(group, 12)  # all of them have a copy on disk soon
        rig.pager.drain(60.0)
        with core.locked():
            others = group.take_host_slots(max(1, group.leaving.host_room()))
        assert (others is not None and bool(np.isin(staged.slots, others).any())) == (not is_guarded)
    if is_guarded:
        with core.locked():
            assert group.take_host_slots(group.leaving.host_room()) is not None
            assert not group.directory.in_host(staged.blocks).any(), "read: now others may have them"
    rig.pager.close()
