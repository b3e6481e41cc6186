"""Slices that a step picks: never stale, never read before they are there, held below, counted, and a miss when corrupt."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.lease import Span
from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.selecting import MIN_SLICES, SliceCache
from kvtier.pager.sizing import plan_selection, summary_bytes
from kvtier.tiers.errors import BlockMissError, ConfigError, TierFullError
from kvtier.tiers.layout import KVLayout, parse_bytes

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, Rig, compare, values

PAGES, SLICES = 10, 16
SELECTION = 2 * SLICES * LAYOUT.layer_bytes
EXTRA = -(-SELECTION // LAYOUT.block_bytes)


def make_rig(seed: int = 0, *, rules: Rules = ALL_RULES, pages: int = PAGES, **options) -> Rig:
    return Rig(seed, pages=pages + EXTRA, staging=4, rules=rules, selection_bytes=SELECTION, **options)


def selected_step(rig: Rig, seq: int, picks: list[list[int]]) -> None:
    """One token over these whole blocks of each layer, every slice compared with what was written there."""
    pager, start = rig.pager, rig.pager.num_computed(seq)
    wanted, found = values(pager.token_ids(seq)), []
    with pager.lease([Span(seq, start, start + 1)], selected=True) as lease:
        selection = lease.groups[0].selection
        ids = selection.spans[0]
        assert len(ids) == start // BLOCK
        for layer, logical in enumerate(picks):
            rig._write(lease, 0, layer)
            below = np.array([i for i in logical if selection.pages[0][i] < 0], np.int64)
            for picked in lease.pick(0, layer, ids[below]):
                at = np.array([int(np.flatnonzero(ids == block)[0]) for block in picked.blocks])
                check(rig, picked.rows, picked.row_ids.copy(), at, wanted, layer, found)
            selection.guess(layer + 1, ids[below])
        lease.commit()
        rig._counted.append(found)


def check(rig, rows, row_ids, logical, wanted, layer, found) -> None:
    def kernel() -> None:
        seen = rows[row_ids].view(np.float32).reshape(len(row_ids), 2, BLOCK, LAYOUT.head_dim)
        positions = (logical[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        compare(seen.transpose(0, 2, 1, 3).reshape(-1, 2, 4), wanted[positions] + layer, f"layer {layer}", found)

    rig.backend.compute.run(kernel)


def long_sequence(rig: Rig, num_blocks: int, seed: int) -> tuple[int, random.Random]:
    rng = random.Random(seed)
    seq = rig.start([rng.randrange(1000) for _ in range(num_blocks * BLOCK + 1)])
    rig.prefill(seq)
    return seq, rng


def picking(seed: int, rules: Rules, path=None) -> Rig:
    """Steps that pick other blocks each time, more than the cache holds."""
    rig = make_rig(seed, rules=rules, host=12 if path else 60, path=path)
    seq, rng = long_sequence(rig, 30, seed)
    for _ in range(8):
        rig.pager.append(seq, [rng.randrange(1000)])
        picks = [sorted(rng.sample(range(30), 12)) for _ in range(LAYOUT.num_layers)]
        selected_step(rig, seq, picks)
    rig.settle()
    return rig


def test_every_slice_is_what_was_written(tmp_path):
    for seed in range(6):
        for path in (None, tmp_path / f"s{seed}"):
            rig = picking(seed, ALL_RULES, path)
            assert rig.wrong == []
            moved = rig.pager.counters.get("moved_slices", direction="host_to_device", reason="select")
            assert 0 < moved < 8 * 2 * 12 * 2
            assert (rig.pager.counters.get("moved_slices", direction="nvme_to_host", reason="select") > 0) == bool(path)
            rig.pager.check_integrity()
            assert not rig.pager._core.groups[0].host.holds.any()
            assert not rig.pager._core.groups[0].directory.nvme_holds.any()
            rig.close()


def test_a_row_that_is_filled_again_waits_for_its_reader():
    """Rule 12: without it some seed overwrites slices that are still being computed on."""
    wrong = []
    for seed in range(12):
        rig = picking(seed, Rules.without(Rule.STAGING_RING_HAS_EVENTS))
        wrong += rig.wrong
        rig.close()
    assert wrong


def test_what_was_fetched_serves_the_next_step():
    rig = make_rig(host=60)
    seq, _ = long_sequence(rig, 30, 0)
    for step in range(3):
        rig.pager.append(seq, [step])
        selected_step(rig, seq, [[1, 2, 3, 4], [5, 6, 7, 8]])
    count = rig.pager.counters.get("moved_slices", direction="host_to_device", reason="select")
    below = int((rig.pager._core.sequences[seq].tables[0].ids[1:9] >= 0).sum())
    assert 0 < count <= 2 * below, "fetched once, and perhaps guessed once"
    rig.close()


def test_the_id_of_a_block_that_ended_serves_no_slice_of_it(monkeypatch):
    """Without the serial number the cache would hand out the old block's bytes under the reused id."""

    def stale_slices() -> list[str]:
        rig = make_rig(host=60)
        for number in range(3):
            seq, rng = long_sequence(rig, 20, number)
            for _ in range(3):
                rig.pager.append(seq, [rng.randrange(1000)])
                selected_step(rig, seq, [list(range(12))] * LAYOUT.num_layers)
            with rig.pager._core.lock:  # forget it all: ids are used again
                group = rig.pager._core.groups[0]
                for block in group.directory.live().tolist():
                    group.directory.unbind(block)
            rig.pager.release(seq)
            rig.settle()
        wrong = list(rig.wrong)
        rig.close()
        return wrong

    assert stale_slices() == []
    blind = SliceCache.find

    def without_serial(self, layer, blocks):
        held = self._row_at[layer, blocks]
        at = np.maximum(held, 0)
        self._serial[at] = np.where(held >= 0, self._directory.serial[blocks], self._serial[at])
        return blind(self, layer, blocks)

    monkeypatch.setattr(SliceCache, "find", without_serial)
    assert stale_slices() != []


def test_a_corrupt_slice_is_a_miss(tmp_path):
    rig = make_rig(host=12, path=tmp_path / "s")
    seq, _ = long_sequence(rig, 30, 0)
    rig.pager.persist([seq])
    rig.settle()
    rig.pager.append(seq, [1])
    core, start = rig.pager._core, rig.pager.num_computed(seq)
    group = core.groups[0]
    with pytest.raises(BlockMissError) as miss, rig.pager.lease([Span(seq, start, start + 1)], selected=True) as lease:
        ids = core.sequences[seq].tables[0].ids
        (cold,) = [i for i in range(30) if group.directory.host_slot[ids[i]] < 0 and group.directory.page[ids[i]] < 0][
            :1
        ]
        stamps = group.cold.tier.stamps

        def other_stamps(index, slots):
            found = stamps(index, slots).copy()
            found["generation"] += 1
            return found

        group.cold.tier.stamps = other_stamps
        list(lease.pick(0, 0, ids[[cold]]))
    assert miss.value.seq == seq and miss.value.num_valid == cold * BLOCK
    group.cold.tier.stamps = stamps
    assert rig.pager.num_computed(seq) == cold * BLOCK
    rig.prefill(seq)
    rig.settle()
    assert rig.wrong == []
    rig.pager.check_integrity()
    rig.close()


def test_a_step_that_is_given_up_leaves_nothing_unproven_in_the_cache():
    rig = make_rig(host=60)
    seq, _ = long_sequence(rig, 30, 0)
    rig.pager.append(seq, [1])
    start, cache = rig.pager.num_computed(seq), rig.pager._core.slice_caches[0]
    with rig.pager.lease([Span(seq, start, start + 1)], selected=True) as lease:
        selection = lease.groups[0].selection
        below = selection.spans[0][selection.pages[0] < 0][:4]
        assert sum(len(picked.blocks) for picked in lease.pick(0, 0, below)) == 4
        assert (cache.find(0, below) >= 0).all()
        with pytest.raises(TierFullError):
            rig.pager.lease([Span(rig.start([1, 2, 3]), 0, 3)], selected=True)
    assert (cache.find(0, below) < 0).all()
    rig.close()


def test_copies_below_stay_while_a_step_may_pick_them(tmp_path):
    """Rule 7, and its like on nvme: other sequences need room meanwhile, and none of it comes from these blocks."""
    rig = make_rig(host=12, path=tmp_path / "s")
    seq, _ = long_sequence(rig, 30, 0)
    rig.pager.persist([seq])
    rig.settle()
    rig.pager.append(seq, [1])
    start, group = rig.pager.num_computed(seq), rig.pager._core.groups[0]
    d, wanted, found = group.directory, values(rig.pager.token_ids(seq)), []
    with rig.pager.lease([Span(seq, start, start + 1)], selected=True) as lease:
        selection = lease.groups[0].selection
        below = selection.spans[0][selection.pages[0] < 0]
        hosted = below[d.in_host(below)]
        slots = d.host_slot[hosted].copy()
        assert len(hosted) > 2 and len(below) > len(hosted)
        taken = group.take_host_slots(group.leaving.host_room())  # all that others could have
        group.host.stage(taken, d.create(np.zeros(len(taken), np.int64), 0))
        group.slab.rows[taken] = 0
        assert np.array_equal(d.host_slot[hosted], slots) and not np.isin(taken, slots).any()
        for picked in lease.pick(0, 0, hosted):
            at = np.array([int(np.flatnonzero(selection.spans[0] == block)[0]) for block in picked.blocks])
            check(rig, picked.rows, picked.row_ids.copy(), at, wanted, 0, found)
        group.host.drop(taken)
        assert (d.nvme_holds[below[~d.in_host(below)]] > 0).all()
    rig.settle()
    assert found == []
    rig.close()


def test_selection_needs_memory_of_its_own():
    rig = Rig(pages=8)
    seq = rig.start([1, 2, 3])
    with pytest.raises(ConfigError, match="selection_bytes"):
        rig.pager.lease([Span(seq, 0, 3)], selected=True)
    rig.close()


def test_groups_of_different_depths_select_from_one_budget():
    """As many summaries of each group, and slices by the layers that pick; what is too little says how much is enough."""
    deep, flat = KVLayout(6, 2, 64, 16), KVLayout(2, 1, 64, 16, name="flat")
    summaries, slices = plan_selection([deep, flat], 1 << 20)
    assert summaries[0] == summaries[1] == (1 << 19) // (summary_bytes(deep) + summary_bytes(flat))
    assert slices[0] // slices[1] == 3
    assert sum(n * layout.layer_bytes for n, layout in zip(slices, (deep, flat), strict=True)) <= 1 << 19
    with pytest.raises(ConfigError, match="at least") as refused:
        plan_selection([deep, flat], 100 << 10)
    enough = parse_bytes(re.search(r"at least ([0-9.]+ .iB)", str(refused.value))[1].replace(" ", ""))
    assert min(plan_selection([deep, flat], enough)[1]) >= MIN_SLICES
