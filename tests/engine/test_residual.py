"""Newest tokens that a packed device tier keeps in full precision: optional wherever they are, and never in anybody's way."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.pager.sizing import MIN_PAGES
from kvtier.tiers.errors import ConfigError

from .test_families import tiny
from .test_packed import BLOCK, ONE, check_next, open_packed
from .test_scheduler import prompt_of

KEPT = 3  # blocks
RESIDUAL = KEPT * BLOCK
NOTHING = SamplingParams(max_tokens=0)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def kept_by(engine, session) -> int:
    """Whole blocks in its tail."""
    return int((engine.pager._core.sequences[session.seq].tables[1].ids[: session.num_computed // BLOCK] >= 0).sum())


def push_down(engine, group, blocks, *, alone: bool) -> None:
    """Write these to nvme, and keep them there alone or not."""
    core = engine.pager._core
    with core.locked():
        core.write_back_blocks(group, blocks, "test")
    engine.pager.drain(10.0)
    with core.locked():
        core.sink_blocks(group, blocks, "park")
    engine.pager.drain(10.0)
    assert group.directory.nvme_valid[blocks].all()
    if alone:
        with core.locked():
            group.evict(blocks, "test")
            group.drop_host_copies(blocks, "test")


def test_what_is_lost_of_it_is_read_packed_and_nothing_is_computed_again(llama, tmp_path):
    with open_packed(llama, "int4", residual=RESIDUAL, path=tmp_path / "s") as engine:
        session = engine.session("a")
        session.send(prompt_of(7 * BLOCK + 5, 1), NOTHING)
        assert kept_by(engine, session) == KEPT
        group = engine.pager._core.groups[1]
        lost = engine.pager._core.sequences[session.seq].tables[1].ids[[5]]
        push_down(engine, group, lost, alone=True)
        with engine.pager._core.locked():
            group.cold.lose_copies(lost)
        computed = engine.pager.counters.get("computed_tokens")
        session.send([3], NOTHING)
        assert engine.pager.counters.get("computed_tokens") == computed + 1
        assert kept_by(engine, session) == 1, "the one behind it; those before a gap are no use"
        check_next(engine, session, 7)
        engine.pager.check_integrity()


@pytest.mark.parametrize("place", ["host and nvme", "nvme"])
def test_what_went_down_before_it_had_a_name_comes_back_or_is_read_packed(llama, tmp_path, place):
    with open_packed(llama, "int4", residual=RESIDUAL, path=tmp_path / "s") as engine:
        session, core = engine.session("a"), engine.pager._core
        session.send(prompt_of(7 * BLOCK + 5, 2), NOTHING)
        group, early = core.groups[1], core.sequences[session.seq].tables[1].ids[[5]]
        push_down(engine, group, early, alone=place == "nvme")
        session.park()
    with open_packed(llama, "int4", residual=RESIDUAL, path=tmp_path / "s") as engine:
        session = engine.session("a")
        assert session.num_computed == 7 * BLOCK + 5
        assert kept_by(engine, session) == (1 if place == "nvme" else KEPT)
        session.send([3], NOTHING)
        check_next(engine, session, 7)
        engine.pager.check_integrity()


def test_it_takes_no_room_from_sessions_that_are_parked(llama, tmp_path):
    """What they kept is cache: there are as many of them as without."""
    with open_packed(llama, "int4", residual=RESIDUAL, path=tmp_path / "s") as engine:
        slots = engine.pager._core.nvme.num_slots(1)
        count = slots // 2
        assert count * (1 + KEPT) > slots
        for number in range(count):
            session = engine.session(f"s{number}")
            session.send(prompt_of(4 * BLOCK + 5, 100 + number), NOTHING)
            session.park()
        newest, oldest = engine.session(f"s{count - 1}"), engine.session("s0")
        assert kept_by(engine, newest) == KEPT and kept_by(engine, oldest) == 0
        for session in (newest, oldest):
            assert session.num_computed == 4 * BLOCK + 5
            session.send([3], NOTHING)
            check_next(engine, session, 7)
        engine.pager.check_integrity()


def test_who_finds_a_prefix_reads_it_packed_whoever_has_parked_there(llama):
    prompt, found = prompt_of(5 * BLOCK, 3), []
    for is_parked in (False, True):
        with open_packed(llama, "int4", residual=RESIDUAL) as engine:
            session = engine.session("a")
            session.send(prompt, NOTHING)
            if is_parked:
                session.park()
            else:
                session.close()
            out = engine.generate([[*prompt, 5, 6]], ONE)[0]
            assert out.usage.recomputed_tokens == 0 and out.usage.device_tokens == 5 * BLOCK
            found.append(out.margins[0])
    assert found[0] == found[1]


def test_a_device_tier_has_room_to_stream_beside_it(llama):
    """Or says at once that it has none."""
    kept, sizes = 8, []
    for blocks in range(16, 30):
        try:
            with open_packed(llama, "int4", residual=kept * BLOCK, blocks=blocks, staging_bytes=1 << 14) as engine:
                pages = len(engine.pager._core.groups[0].pages)
                sizes.append(pages)
                assert engine.pager.max_span_tokens() <= (pages - kept - 1) * BLOCK
                if len(sizes) == 1:
                    session = engine.session("a")
                    session.send(prompt_of((pages + 6) * BLOCK, 4), NOTHING)
                    assert engine.pager.counters.get("attended_slices", tier="host", reason="stream") > 0
                    assert session.num_computed == (pages + 6) * BLOCK
                    engine.pager.check_integrity()
        except ConfigError as error:
            assert "are needed: give" in str(error) and not sizes
    assert MIN_PAGES + kept <= sizes[0] < 2 * kept
