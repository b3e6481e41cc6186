from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from kvtier.pager.config import PagerConfig, load_config
from kvtier.pager.lease import Span
from kvtier.pager.pager import Pager
from kvtier.tiers.errors import Busy, ConfigError, StoreLockedError, StoreMismatchError, TierFullError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.identity import stored_geometries
from kvtier.tiers.nvme.maintenance import stored_identity

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, WINDOWED, Rig


def ids(n: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(1000) for i in range(n)]


@pytest.fixture
def rig():
    rig = Rig(0, pages=12, host=40)
    yield rig
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []


def test_a_second_sequence_shares_the_prefix(rig):
    first = rig.start(ids(17))
    assert rig.prefill(first) == 17
    second = rig.start([*ids(17), 5])
    assert rig.pager.num_computed(second) == 16
    assert rig.prefill(second) == 2
    assert rig.pager.counters.get("hit_tokens", tier="device") == 16


def test_the_whole_prompt_cached_still_leaves_a_token_to_compute(rig):
    rig.prefill(rig.start(ids(16)))
    again = rig.start(ids(16))
    assert rig.pager.num_computed(again) == 12
    assert rig.prefill(again) == 4


def test_match_says_which_tier_holds_the_prefix_and_changes_nothing(rig):
    seq = rig.start(ids(16))
    rig.prefill(seq)
    assert rig.pager.match(ids(16)).device_tokens == 16
    rig.pager.demote(seq)
    rig.settle()
    rig.pager.demote(seq)
    match = rig.pager.match(ids(16))
    assert (match.device_tokens, match.host_tokens) == (0, 16)
    assert rig.pager.counters.get("hit_tokens") == 0


def test_namespaces_do_not_see_each_other(rig):
    rig.prefill(rig.start(ids(16)))
    assert rig.pager.match(ids(16), "other").tokens == 0


def test_fork_copies_on_write_only_the_tail(rig):
    seq = rig.start(ids(10))
    rig.prefill(seq)
    child = rig.pager.fork(seq)
    rig.say(child, [1, 2])
    rig.say(seq, [3])
    assert rig.pager.counters.get("copy_on_write_blocks") == 1  # the second writer is the only owner left
    assert rig.pager.token_ids(child) == [*ids(10), 1, 2]


def test_rollback_into_a_shared_full_block_copies_it(rig):
    seq = rig.start(ids(16))
    rig.prefill(seq)
    assert rig.pager.truncate(seq, 10) == 10
    rig.say(seq, [7, 7, 7])
    assert rig.pager.match(ids(16)).tokens == 16  # the named block is still what it was


def test_rollback_of_a_windowed_model_takes_blocks_back_by_key():
    rig = Rig(0, pages=14, host=80, layouts=[LAYOUT, WINDOWED])
    seq = rig.start(ids(40))
    rig.prefill(seq)
    assert rig.pager.truncate(seq, 20) == 20
    rig.say(seq, [1, 2, 3])
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []


def test_released_without_commit_leaves_the_sequence_as_it_was(rig):
    seq = rig.start(ids(10))
    rig.prefill(seq)
    rig.pager.append(seq, [1, 2, 3, 4, 5])
    rig.pager.lease([Span(seq, 10, 15)]).release()
    assert rig.pager.num_computed(seq) == 10
    rig.pager.check_integrity()
    rig.prefill(seq)


def test_a_leased_sequence_cannot_be_leased_forked_or_ended(rig):
    seq = rig.start(ids(6))
    with rig.pager.lease([Span(seq, 0, 6)]):
        for verb in (rig.pager.fork, rig.pager.finish, rig.pager.demote):
            with pytest.raises(Busy, match="leased"):
                verb(seq)


@pytest.mark.parametrize("span", [(0, 0), (1, 4), (0, 99)])
def test_a_span_must_start_where_the_sequence_ends_and_stay_within_its_tokens(rig, span):
    seq = rig.start(ids(6))
    with pytest.raises(ConfigError, match="lease"):
        rig.pager.lease([Span(seq, *span)])
    rig.pager.check_integrity()


def test_too_many_spans_at_once_say_so_and_pin_nothing(rig):
    seqs = [rig.start(ids(24, seed)) for seed in range(3)]
    with pytest.raises(TierFullError, match="fewer sequences"):
        rig.pager.lease([Span(seq, 0, 24) for seq in seqs])
    rig.pager.check_integrity()
    assert not rig.pager._core.groups[0].pages.pins.any()


def test_the_device_alone_drops_unreferenced_cache_and_keeps_what_is_used():
    rig = Rig(0, pages=8, host=0)
    keep = rig.start(ids(8))
    rig.prefill(keep)
    for seed in range(1, 5):
        seq = rig.start(ids(16, seed))
        rig.prefill(seq)
        rig.pager.finish(seq)
    rig.say(keep, [1])
    rig.settle()
    assert rig.wrong == [] and rig.pager.counters.get("evicted_blocks", tier="device") > 0
    assert rig.pager.match(ids(16, 1)).ghost_tokens > 0


def test_pinned_blocks_outlive_their_sequence_until_the_ttl_ends():
    rig = Rig(0, pages=8, host=0)
    seq = rig.start(ids(8))
    rig.prefill(seq)
    rig.pager.pin(seq, ttl_s=3600)
    rig.pager.release(seq)
    for seed in range(1, 4):
        other = rig.start(ids(16, seed))
        rig.prefill(other)
        rig.pager.finish(other)
    assert rig.pager.match(ids(8)).tokens == 8


def test_what_is_appended_after_attach_is_named_by_itself(rig):
    """attach is given more than it finds; a sequence that goes on otherwise must not take over the keys of that."""
    seq = rig.pager.begin("default")
    rig.pager.attach(seq, ids(16, 1))
    rig.pager.append(seq, ids(16, 2))
    rig.prefill(seq)
    rig.pager.finish(seq)
    assert rig.pager.match(ids(16, 1)).tokens == 0 and rig.pager.match(ids(16, 2)).tokens == 16


def test_pinned_pages_are_no_room_though_they_are_clean(rig):
    seq = rig.start(ids(16))
    rig.prefill(seq)
    core, group = rig.pager._core, rig.pager._core.groups[0]
    with core.locked():
        core.write_back(group, 4, "pressure")
    rig.settle()
    assert group.leaving.clean_pages() == 4
    rig.pager.pin(seq, ttl_s=3600)
    assert group.leaving.clean_pages() == 0 and group.take_pages(len(group.pages)) is None
    rig.pager.release(seq)


def test_tiers_never_hold_more_than_their_caps(rig):
    for seed in range(6):
        rig.prefill(rig.start(ids(30, seed)))
        for name in ("device", "host"):
            tier = rig.pager.status()["tiers"][name]
            assert tier["used_bytes"] <= tier["peak_bytes"] <= tier["capacity_bytes"]
    assert rig.pager.status()["tiers"]["device"]["capacity_bytes"] == 12 * LAYOUT.block_bytes


def test_a_parked_session_survives_a_restart_without_recomputing(tmp_path):
    rig = Rig(0, pages=8, host=12, path=tmp_path / "store", staging=1)
    seq = rig.start(ids(50))
    rig.prefill(seq)
    rig.pager.park("chat", seq, {"note": "x"})
    rig.close()
    again = Rig(1, pages=8, host=12, path=tmp_path / "store", staging=1)
    seq, parked = again.pager.resume("chat")
    assert parked.num_computed == 50 and parked.token_ids == ids(50) and parked.extra == {"note": "x"}
    again.say(seq, [1, 2, 3])
    assert again.pager.counters.get("computed_tokens") == 3
    again.settle()
    again.pager.check_integrity()
    assert again.wrong == []
    again.close()


def test_a_flipped_byte_in_the_store_is_a_miss_and_only_that_block_is_computed_again(tmp_path):
    rig = Rig(0, pages=8, host=12, path=tmp_path / "store")
    seq = rig.start(ids(28))
    rig.prefill(seq)
    rig.pager.park("chat", seq)
    rig.close()
    store = tmp_path / "store"
    number, offset = stored_geometries(store, stored_identity(store))[0].place(2)
    segment = next((store / "blocks.zarr" / "g0").glob(f"c.{number}.*"))
    raw = bytearray(segment.read_bytes())
    raw[offset + 5] ^= 1
    segment.write_bytes(raw)
    again = Rig(1, pages=8, host=12, path=tmp_path / "store")
    seq, _ = again.pager.resume("chat")
    again.say(seq, [1])
    assert again.pager.counters.get("corrupt_blocks") == 1
    assert again.pager.counters.get("computed_tokens") == BLOCK + 1
    again.settle()
    again.pager.check_integrity()
    assert again.wrong == []
    again.close()


def test_a_store_of_another_model_or_in_use_is_refused_and_untouched(tmp_path):
    path = tmp_path / "store"
    rig = Rig(0, path=path)
    config = PagerConfig(device_bytes="1MiB", host_bytes="1MiB", nvme_path=path, nvme_bytes="8MiB", backend="cpu")
    with pytest.raises(StoreLockedError, match="in use by process"):
        Pager.open(LAYOUT, config, model_fingerprint="rig")
    rig.close()
    before = sorted((p.name, p.stat().st_size) for p in path.rglob("*"))
    with pytest.raises(StoreMismatchError, match="model_fingerprint"):
        Pager.open(LAYOUT, config, model_fingerprint="another")
    with pytest.raises(StoreMismatchError, match="layouts"):
        Pager.open(KVLayout(2, 1, 8, 4, "float32"), config, model_fingerprint="rig")
    assert sorted((p.name, p.stat().st_size) for p in path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_bytes": 0}, "device_bytes"),
        ({"device_bytes": "8 potatoes"}, "potatoes"),
        ({"device_bytes": 100}, "at least 4 are needed"),
        ({"device_bytes": "1MiB", "policy": "mru"}, "policy"),
        ({"device_bytes": "1MiB", "low_watermark": 0.9}, "low_watermark"),
        ({"device_bytes": "1MiB", "nvme_path": "/proc/nowhere/x"}, "host_bytes"),
        ({"device_bytes": "1MiB", "host_bytes": "1MiB", "nvme_path": "/proc/nowhere/x"}, "cannot be written"),
        ({"device_bytes": "1MiB", "backend": "tpu"}, "backend"),
        ({"device_bytes": "1MiB", "namespace_secrets": {"a": "zz"}}, "hexadecimal"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        Pager.open(LAYOUT, PagerConfig(**({"backend": "cpu"} | settings)))


def test_config_comes_from_override_environment_file_and_default_in_that_order(tmp_path):
    file = tmp_path / "kvtier.toml"
    file.write_text('device_bytes = "1GiB"\nhost_bytes = "2GiB"\npolicy = "lru"\n')
    config = load_config(file, env={"KVTIER_HOST__BYTES": "3GiB", "KVTIER_SINKS": "7"}, device_bytes="4GiB")
    assert (config.device_size, config.host_size, config.sinks) == (4 << 30, 3 << 30, 7)
    file.write_text('device_byte = "1GiB"\n')
    with pytest.raises(ConfigError, match="'device_byte' is an unknown setting; did you mean 'device_bytes'"):
        load_config(file, env={})


def test_a_codec_is_for_all_groups_for_each_or_by_name(tmp_path):
    def chosen(value, groups=("full", "window")):
        return PagerConfig("1MiB", "1MiB", nvme_path=tmp_path, nvme_codec=value).validate().codecs(groups)

    assert chosen(None) is None and chosen("zstd") == ["zstd", "zstd"]
    assert chosen(["lz4", "none"]) == chosen("lz4, none") == ["lz4", "none"]
    assert chosen({"window": "split"}) == chosen("window=split") == ["none", "split"]
    for value, said in (
        ("gzip", r"nvme_codec='gzip' is unknown; choose none, lz4, zstd, split"),
        ({"window": 3}, "nvme_codec=3 is unknown"),
        (7, "nvme_codec=7: give a codec, a list"),
        ("zstd,full=none", "mixes codecs with and without"),
        (["zstd"], r"names 1 codecs; this model has 2 layer groups \(full, window\)"),
        ("half=zstd", "there is no layer group 'half'; this model has full, window"),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen(value)
    with pytest.raises(ConfigError, match="nvme_codec='zstd' without nvme_path"):
        PagerConfig("1MiB", nvme_codec="zstd").validate()
    file = tmp_path / "kvtier.toml"
    file.write_text('device_bytes = "1GiB"\nhost_bytes = "1GiB"\nnvme_path = "s"\n[nvme_codec]\nfull = "zstd"\n')
    assert load_config(file, env={}).codecs(["full", "window"]) == ["zstd", "none"]
    assert load_config(file, env={"KVTIER_NVME_CODEC": "lz4"}).codecs(["full"]) == ["lz4"]


def test_a_pager_uses_the_codec_of_the_store_that_it_finds(tmp_path, caplog):
    rig = Rig(0, path=tmp_path / "s", nvme_codec="split", layouts=[LAYOUT, WINDOWED])
    seq = rig.start(ids(16))
    rig.prefill(seq)
    rig.pager.park("a", seq)
    rig.settle()
    assert rig.pager.status()["tiers"]["nvme"]["codecs"] == ["split", "split"]
    rig.pager.close()
    again = Rig(0, path=tmp_path / "s", nvme_codec="lz4", layouts=[LAYOUT, WINDOWED])
    assert "array g0 was made with codec='split'" in caplog.text
    assert again.pager.status()["tiers"]["nvme"]["codecs"] == ["split", "split"]
    again.pager.close()


@pytest.mark.parametrize("codec", [None, "lz4", "full=split"])
def test_real_threads_do_the_same(tmp_path, codec):
    from kvtier.tiers.cpu import CpuBackend

    backend = CpuBackend(poison=True, delay_s=0.0005)
    rig = Rig(0, pages=8, host=12, path=tmp_path / "s", staging=1, backend=backend, nvme_codec=codec)
    seqs = [rig.start(ids(30, seed)) for seed in range(3)]
    for _ in range(3):
        for seq in seqs:
            rig.prefill(seq)
            rig.say(seq, ids(5))
    long = rig.start(ids(120, 9))
    rig.prefill(long)
    rig.pager.park("long", long)
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    rig.close()


def test_a_streamed_step_whose_copy_failed_does_not_count():
    rig = Rig(0, pages=6, host=30, staging=1)
    seq = rig.start(ids(40))
    rig.prefill(seq)
    assert rig.pager.counters.get("moved_slices", reason="stream") > 0
    rig.settle()
    rig.pager.append(seq, [1])
    rig.backend.fail_next("promote", OSError(5, "a copy failed"))
    assert rig.step([(seq, 1)]) == 0 and rig.pager.num_computed(seq) == 40
    assert rig.prefill(seq) == 1
    rig.settle()
    assert rig.wrong == []
    rig.pager.check_integrity()
    rig.close()


def test_a_checkpoint_survives_a_crash_and_the_sequence_goes_on(tmp_path):
    rig = Rig(0, pages=8, host=12, path=tmp_path / "store", staging=1)
    seq = rig.start(ids(26))
    rig.prefill(seq)
    rig.pager.checkpoint("chat", seq, {"turn": 1})
    rig.say(seq, [1, 2, 3])
    rig.pager.checkpoint("chat", seq, {"turn": 2})
    rig.say(seq, [4, 5])  # never checkpointed
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == [] and rig.pager.sessions()["chat"]["is_active"]
    assert rig.pager.session("chat") == rig.pager.sessions()["chat"] and rig.pager.session("nobody") is None
    rig.close()  # nothing is written at the end but what was: the store is as a crash would leave it
    again = Rig(1, pages=8, host=12, path=tmp_path / "store", staging=1)
    seq, parked = again.pager.resume("chat")
    assert parked.token_ids == [*ids(26), 1, 2, 3] and parked.num_computed == 29 and parked.extra == {"turn": 2}
    again.say(seq, [7])
    assert again.pager.counters.get("computed_tokens") == 1
    again.pager.park("chat", seq)
    again.settle()
    again.pager.check_integrity()
    assert again.wrong == []
    again.close()


def test_an_active_session_is_not_checkpointed_from_another_sequence(rig):
    first, second = rig.start(ids(9)), rig.start(ids(9, 1))
    rig.prefill(first)
    rig.prefill(second)
    rig.pager.checkpoint("chat", first)
    with pytest.raises(ConfigError, match="active in another sequence"):
        rig.pager.checkpoint("chat", second)
    rig.pager.park("chat", first)
    with pytest.raises(ConfigError, match="sequence"):
        rig.pager.checkpoint("chat", first)
    rig.pager.finish(second)
