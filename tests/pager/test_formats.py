"""A pager whose tiers keep fewer bits: near what was written, tails exact, nothing rounded twice, stores never mixed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.config import PagerConfig, load_config
from kvtier.pager.daemon.settings import load_daemon_config
from kvtier.pager.pager import Pager
from kvtier.pager.states import SlotState
from kvtier.tiers.errors import ConfigError, InvariantError, StoreMismatchError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.store import NvmeTier

sys.path.insert(0, str(Path(__file__).parent))
from harness import PACKABLE, ROUNDED, Rig

SIZE = PACKABLE.block_size
FORMATS = dict(layouts=[PACKABLE], host_format="int8", nvme="int4", error=ROUNDED)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 50, count).tolist()


def rig_of(path, seed: int = 0, **settings) -> Rig:
    return Rig(seed, path=path, **(dict(pages=8, host=8, nvme_bytes="1MiB", staging=2) | FORMATS | settings))


def group_of(rig: Rig):
    return rig.pager._core.groups[0]


def counted(rig: Rig, name: str, **labels) -> int:
    return int(rig.pager.counters.get(name, **labels))


@pytest.mark.parametrize("host", ["int8", "full"])
def test_a_context_three_times_the_device_is_read_near_what_it_was_through_its_precisions(tmp_path, seed, host):
    rig = rig_of(tmp_path / "s", seed, host_format=host)
    seq = rig.start(tokens(24 * SIZE + 5))
    rig.prefill(seq, SIZE)
    rig.pager.check_integrity()
    assert rig.wrong == [] and counted(rig, "corrupt_blocks", tier="nvme") == 0
    assert counted(rig, "moved_bytes", direction="host_to_nvme") > 0
    rig.close()


def test_layer_groups_have_formats_of_their_own(tmp_path):
    window = KVLayout(1, 1, 16, SIZE, "float32", window=40, name="window")
    rig = rig_of(tmp_path / "s", layouts=[PACKABLE, window], pages=12, host_format={"full": "int8"}, staging=0)
    assert [group.forms.text for group in rig.pager._core.groups] == ["int8/64", "full"]
    for number in range(3):
        seq = rig.start(tokens(7 * SIZE + 3, seed=number))
        rig.prefill(seq, SIZE)
        rig.pager.park(f"s{number}", seq)
    for number in range(3):
        seq, _ = rig.pager.resume(f"s{number}")
        rig.say(seq, [1, 2])
        rig.pager.release(seq)
    assert rig.wrong == []
    rig.close()


def test_a_torch_without_fp8_is_refused_by_name(monkeypatch):
    import torch

    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(ConfigError, match=r"host='fp8': torch .* has no float8_e4m3fn; use int8"):
        Pager.open(PACKABLE, PagerConfig("1MiB", "1MiB", host="fp8", backend="cpu"))


def test_the_same_without_any_room_for_error_would_show_it(tmp_path):
    """The harness sees rounding: with no error allowed it complains, so silence above means something."""
    rig = rig_of(tmp_path / "s", error=0.0)
    rig.prefill(rig.start(tokens(20 * SIZE)), SIZE)
    rig.settle()
    assert rig.wrong
    rig.close()


def test_host_slots_hold_more_blocks_in_the_same_bytes_and_tails_in_several(tmp_path):
    exact, packed = Rig(host=16, layouts=[PACKABLE]), Rig(host=16, layouts=[PACKABLE], host_format="int8")
    assert len(group_of(packed).host) * group_of(packed).forms.slot_bytes <= 16 * PACKABLE.block_bytes
    assert len(group_of(packed).host) > 2.5 * len(group_of(exact).host)  # float32 to int8, with scales and alignment
    exact.close()
    packed.close()


def test_a_tail_is_parked_and_resumed_exactly_and_takes_linked_slots(tmp_path):
    rig = rig_of(tmp_path / "s")
    seq = rig.start(tokens(2 * SIZE + 5))
    rig.prefill(seq, SIZE)
    rig.pager.park("a", seq)
    group = group_of(rig)
    linked = group.host.state == SlotState.LINKED
    assert linked.sum() == group.forms.most_slots - 1
    (tail,) = set(group.host.block[linked].tolist())
    seq, _ = rig.pager.resume("a")
    assert np.array_equal(
        group.forms.packed.read(group.directory.host_slot[[tail]])[0].view(np.float32)[:5], _tail(rig, seq)
    )
    rig.pager.check_integrity()
    rig.close()


def _tail(rig: Rig, seq: int) -> np.ndarray:
    """The first channel of K's first rows of layer 0 as the engine wrote them: one number per token, repeated."""
    from harness import values

    return np.repeat(values(rig.pager.token_ids(seq))[2 * SIZE :], PACKABLE.head_dim)[:5]


def test_parked_and_resumed_ten_times_a_session_is_the_same_bytes_on_disk_and_in_its_pages(tmp_path):
    """Fails where a block that is clean on disk is quantised again from what was read back."""
    path, pages, stored = tmp_path / "s", [], []
    for life in range(10):
        rig = rig_of(path, life)
        if life == 0:
            seq = rig.start(tokens(5 * SIZE + 3))
            rig.prefill(seq, SIZE)
        else:
            seq, _ = rig.pager.resume("a")
            assert rig.pager.num_computed(seq) == 5 * SIZE + 3
            rig.say(seq, [7])  # brings all of it up
            pages.append(_pages(rig, seq))
            rig.pager.truncate(seq, 5 * SIZE + 3)
        rig.pager.park("a", seq)
        stored.append(_frames(group_of(rig)))
        assert rig.wrong == [] and counted(rig, "rounded_again_blocks") == 0
        rig.close()
    assert all(np.array_equal(one, pages[0]) for one in pages[1:])
    whole = [{k: f for k, f in one.items() if len(f) < PACKABLE.block_bytes} for one in stored]
    assert len(whole[0]) == 5 and all(one == whole[0] for one in whole[1:])


def _pages(rig: Rig, seq: int) -> np.ndarray:
    rig.settle()
    group = group_of(rig)
    ids = rig.pager._core.sequences[seq].tables[0].ids[:5]
    return group.pool.rows[group.directory.page[ids]].copy()


def _frames(group) -> dict[bytes, bytes]:
    """What lies on disk, by key."""
    tier: NvmeTier = group.cold.tier
    slots, stamps = tier.recovered()[0]
    rows = tier.spare_rows(0, len(slots))
    ticket = tier.read(0, slots, rows, np.arange(len(slots)), stamps)
    assert ticket.event.wait(60) and ticket.ok.all()
    return {stamp["key"].tobytes(): row.frame.tobytes() for stamp, row in zip(stamps, rows, strict=True)}


def test_a_page_that_must_go_down_again_after_its_copy_is_gone_is_counted(tmp_path):
    rig = Rig(pages=6, host=8, layouts=[PACKABLE], host_format="int8", error=ROUNDED)
    seq = rig.start(tokens(4 * SIZE + 1))
    rig.prefill(seq, SIZE)
    group, ids = group_of(rig), rig.pager._core.sequences[seq].tables[0].ids[:4]
    for _ in range(2):
        rig.pager._core.write_back_blocks(group, ids[group.directory.host_slot[ids] < 0], "pressure")
        rig.settle()
        rig.pager.poll()
        resident = group.directory.in_device(ids) & group.directory.in_host(ids)
        group.evict(ids[resident], "pressure")
        rig.say(seq, [3])
        rig.settle()
        rig.pager.poll()
        hosted = ids[group.directory.in_host(ids)]
        group.drop_host_copies(hosted, "pressure")
    assert rig.wrong == [] and counted(rig, "rounded_again_blocks") > 0
    rig.pager.check_integrity()
    rig.close()


def test_values_that_a_format_cannot_hold_go_down_in_full_precision(tmp_path):
    rig = Rig(pages=6, host=12, layouts=[PACKABLE], host_format="int8")
    seq = rig.start(tokens(SIZE + 1))
    rig.prefill(seq, SIZE)
    rig.settle()
    group, ids = group_of(rig), rig.pager._core.sequences[seq].tables[0].ids[:1]
    page = int(group.directory.page[ids[0]])
    group.pool.rows[page].view(np.float32)[3] = np.nan
    wanted = group.pool.rows[page].copy()
    for _ in range(2):  # the first copy says which blocks, the second takes them as they are
        rig.pager._core.write_back_blocks(group, ids, "pressure")
        rig.settle()
        rig.pager.poll()
    assert group.directory.in_host(ids).all() and counted(rig, "unpackable_blocks") == 1
    assert np.array_equal(group.forms.packed.read(group.directory.host_slot[ids])[0], wanted)
    rig.pager.check_integrity()
    rig.close()


def test_many_tails_stay_within_the_disk_that_was_given(tmp_path):
    """A slot is counted as a packed block; fails where a tail is counted so too."""
    rig = rig_of(tmp_path / "s", nvme_bytes=24 * 4096, host=16)
    for i in range(30):
        seq = rig.start(tokens(5, seed=100 + i))
        rig.prefill(seq, SIZE)
        rig.pager.persist([seq])
        rig.pager.finish(seq)
        rig.pager.check_integrity()
    cold = group_of(rig).cold
    assert cold.tier.stored_bytes(0) <= 24 * 4096 and cold.room() >= 0
    rig.close()


def test_a_broken_link_is_noticed(tmp_path):
    rig = rig_of(tmp_path / "s")
    seq = rig.start(tokens(SIZE + 5))
    rig.prefill(seq, SIZE)
    rig.pager.park("a", seq)
    group = group_of(rig)
    begins = np.flatnonzero(group.forms.packed.is_whole(np.arange(len(group.host))))
    group.forms.packed._rest[begins[0], 0] = begins[0]
    with pytest.raises(InvariantError, match="links of host slots"):
        rig.pager.check_integrity()


@pytest.mark.parametrize(
    ("first", "then"), [("int4", "full"), ("full", "int4"), ("int4", "int2"), ("int4", "int4/32"), ("int4", None)]
)
def test_a_store_is_opened_only_with_the_rounding_that_it_has(tmp_path, first, then):
    def opened(nvme):
        config = PagerConfig("1MiB", "1MiB", nvme_path=tmp_path / "s", nvme_bytes="1MiB", nvme=nvme, backend="cpu")
        return Pager.open(PACKABLE, config)

    opened(first).close()
    with pytest.raises(StoreMismatchError, match="say nvme="):
        opened(then)
    opened(first).close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(device="int8"), "the device tier keeps full precision"),
        (dict(host="int3"), "'int3' is unknown"),
        (dict(host="int4", nvme="int8"), "regains nothing"),
        (dict(host="int8", nvme="full"), "regains nothing"),
        (dict(nvme="int4", nvme_codec="zstd"), "neither compressed further nor encrypted"),
        (dict(nvme="int4", nvme_codec="aes"), "neither compressed further nor encrypted"),
        (dict(host="bf16"), "this model's KV is float32"),
        (dict(host="hack8"), "32 tokens or more"),
    ],
)
def test_formats_that_cannot_be_are_refused_before_anything_is_made(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        Pager.open(PACKABLE, PagerConfig("1MiB", "1MiB", nvme_path=tmp_path / "s", backend="cpu", **settings))
    assert not (tmp_path / "s").exists()


def test_a_store_format_needs_a_store_and_formats_come_from_files_and_the_environment(tmp_path):
    with pytest.raises(ConfigError, match="without nvme_path"):
        PagerConfig("1MiB", "1MiB", nvme="int4").validate()
    file = tmp_path / "kvtier.toml"
    file.write_text('device_bytes = "1MiB"\nhost_bytes = "1MiB"\nhost = "int8; layers 0-1: full"\n')
    assert load_config(file, env={}).host == "int8; layers 0-1: full"
    assert load_config(file, env={"KVTIER_HOST": "fp8"}).host == "fp8"
    with pytest.raises(ConfigError, match="host='int9'"):
        load_config(file, env={"KVTIER_HOST": "int9"})


def test_a_daemon_and_its_clients_refuse_formats(tmp_path):
    file = tmp_path / "pagerd.toml"
    file.write_text('host_bytes = "1MiB"\nhost = "int8"\n')
    with pytest.raises(ConfigError, match="a daemon keeps blocks in full precision"):
        load_daemon_config(file, env={})
    with pytest.raises(ConfigError, match="a daemon keeps blocks in full precision"):
        Pager.connect(f"unix://{tmp_path}/none.sock", PACKABLE, PagerConfig("1MiB", "1MiB", host="int8", backend="cpu"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(host="int4"), r"host='int4' with host_bytes=0: there is no host tier.*host_bytes='1GiB'"),
        (dict(device="int8", host={"full": "int4"}), "host={'full': 'int4'} with host_bytes=0"),
        (dict(durability="alwys"), "durability='alwys' is unknown; choose none, batch, always"),
    ],
)
def test_settings_of_tiers_that_are_not_there_are_refused_too(settings, says):
    with pytest.raises(ConfigError, match=says):
        PagerConfig("1MiB", backend="cpu", **settings).validate()


def test_status_says_the_formats_and_counts_bytes_as_they_are(tmp_path):
    rig = rig_of(tmp_path / "s")
    seq = rig.start(tokens(8 * SIZE))
    rig.prefill(seq, SIZE)
    rig.pager.park("a", seq)
    tiers, forms = rig.pager.status()["tiers"], group_of(rig).forms
    assert [tiers[name]["formats"] for name in ("device", "host", "nvme")] == [["full"], ["int8/64"], ["int4/64"]]
    assert tiers["nvme"]["used_bytes"] == tiers["nvme"]["blocks"] * group_of(rig).cold.block_bytes
    assert counted(rig, "moved_bytes", direction="device_to_host", reason="park") % forms.slot_bytes == 0
    rig.close()


def test_without_formats_nothing_is_different(tmp_path):
    rig = Rig(layouts=[PACKABLE], path=tmp_path / "s", nvme_bytes="1MiB")
    group = group_of(rig)
    assert group.forms.packed is None and not group.cold.is_lossy and group.cold.tier.codecs == ["none"]
    assert {group.tier_bytes(tier) for tier in ("device", "host", "nvme")} == {PACKABLE.block_bytes}
    rig.close()
