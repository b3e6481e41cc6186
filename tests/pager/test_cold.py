"""The cold side of the pager: segments are kept clean, namespaces keep to their quotas, a bad disk stops nobody."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager import cold, reclaim
from kvtier.pager.config import PagerConfig, load_config
from kvtier.tiers.errors import ConfigError, TierFullError, TierUnavailableError
from kvtier.tiers.nvme.calls import SystemCalls

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, Rig

DISK_BLOCK = 4096  # what a block of LAYOUT takes on disk
MANY = 1000


def ids(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


def park(rig: Rig, name: str, tokens: list[int], namespace: str = "default") -> None:
    seq = rig.start(tokens, namespace)
    rig.prefill(seq)
    rig.pager.park(name, seq)


def cache(rig: Rig, tokens: list[int], namespace: str = "default") -> None:
    """Leave a prefix on disk that nobody refers to."""
    park(rig, "passing", tokens, namespace)
    rig.pager.forget("passing")


def finish(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    rig.close()


def nvme(rig: Rig) -> dict:
    return rig.pager.status()["tiers"]["nvme"]


def beats(rig: Rig) -> int:
    """How many heartbeats it takes until nothing moves; MANY if it never ends."""
    core = rig.pager._core
    for beat in range(MANY):
        with core.locked():
            core.advance()
        if not core.in_flight():
            return beat
        rig.backend.run_one()
    return MANY


# ---------------------------------------------------------------------- the ring
@pytest.mark.parametrize("seed", range(4))
def test_churn_leaves_segments_clean_and_what_is_referred_to_where_it_is(tmp_path, seed):
    rig = Rig(seed, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK)
    kept = {f"chat{i}": ids(5 * BLOCK, 900 + i) for i in range(6)}
    for i, (name, tokens) in enumerate(kept.items()):  # spread over as many segments as can be
        park(rig, name, tokens)
        for j in range(4):
            cache(rig, ids(6 * BLOCK, 1000 + 10 * i + j))
    for i in range(60):
        cache(rig, ids(6 * BLOCK, 5000 + 100 * seed + i))
        rig.settle()
        assert nvme(rig)["clean_segments"][0] >= 1  # the one being filled is not clean, the next one is
    assert nvme(rig)["clean_segments"][0] >= reclaim.CLEAN_SEGMENTS
    assert rig.pager.counters.get("reclaimed_segments") > 10
    assert 1.0 < nvme(rig)["write_amplification"] <= 1 / (1 - reclaim.MOVED_SHARE)
    computed = rig.pager.counters.get("computed_tokens")
    for name, tokens in kept.items():
        seq, parked = rig.pager.resume(name)
        assert parked.token_ids == tokens
        rig.say(seq, [1])
        rig.pager.finish(seq)
    assert rig.pager.counters.get("computed_tokens") == computed + len(kept)  # nothing of them was computed again
    finish(rig)


@pytest.mark.parametrize("seed", range(4))
def test_two_segments_are_clean_whenever_a_put_begins_however_fast_they_come(tmp_path, monkeypatch, seed):
    """Every put fills a segment, and what was read since is still being moved out of the one before."""
    monkeypatch.setattr(reclaim, "SEGMENTS_PER_AHEAD", 8)  # of a ring of 16
    looks = itertools.count()
    options = {"path": tmp_path / "s", "nvme_bytes": 256 * DISK_BLOCK, "clock": lambda: next(looks) * 1e-3}
    rig, pick = Rig(seed, pages=24, host=48, **options), random.Random(seed)
    for i in range(100):
        assert nvme(rig)["clean_segments"][0] >= 2
        cache(rig, ids(16 * BLOCK, i))
        if i % 2:
            seq = rig.start([*ids(16 * BLOCK, max(0, i - pick.randrange(8))), 1])
            rig.prefill(seq)
            rig.pager.finish(seq)
    assert rig.pager.counters.get("moved_blocks", direction="nvme_to_nvme") > 100
    finish(rig)


def test_a_moved_block_is_found_after_a_restart(tmp_path):
    path = tmp_path / "s"
    rig = Rig(0, pages=10, host=24, path=path, nvme_bytes=256 * DISK_BLOCK)
    park(rig, "chat", ids(3 * BLOCK, 1))
    for i in range(70):
        cache(rig, ids(6 * BLOCK, 100 + i))
        rig.settle()
    assert rig.pager.counters.get("moved_blocks", direction="nvme_to_nvme") > 0
    finish(rig)
    again = Rig(1, pages=10, host=24, path=path, nvme_bytes=256 * DISK_BLOCK)
    seq, parked = again.pager.resume("chat")
    assert parked.num_computed == 3 * BLOCK
    again.say(seq, [1])
    assert again.pager.counters.get("computed_tokens") == 1
    finish(again)


def test_blocks_that_were_read_outlive_those_that_were_not(tmp_path):
    rig = Rig(0, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK)
    hot = ids(3 * BLOCK, 1)
    cache(rig, hot)
    for i in range(120):
        cache(rig, ids(6 * BLOCK, 100 + i))
        if i % 10 == 9:
            seq = rig.start([*hot, 1])
            rig.prefill(seq)
            rig.pager.finish(seq)
        rig.settle()
    assert rig.pager.counters.get("reclaimed_segments") > 20
    assert rig.pager.match(hot).tokens == len(hot)
    assert rig.pager.match(ids(6 * BLOCK, 100)).tokens == 0
    finish(rig)


def test_a_segment_full_of_sessions_is_left_alone(tmp_path):
    rig = Rig(0, pages=10, host=24, path=tmp_path / "s", nvme_bytes=128 * DISK_BLOCK)
    for i in range(18):
        park(rig, f"chat{i}", ids(6 * BLOCK, i))  # 108 of 128 blocks
    for i in range(20):
        cache(rig, ids(3 * BLOCK, 100 + i))
        rig.settle()
    assert rig.pager.counters.get("evicted_blocks", tier="nvme") > 0
    for i in range(18):
        seq, _ = rig.pager.resume(f"chat{i}")
        assert rig.pager.num_computed(seq) == 6 * BLOCK
        rig.pager.finish(seq)
    finish(rig)


# ---------------------------------------------------------------------- quotas
def quota_rig(tmp_path, blocks: int, **options) -> Rig:
    quotas = {"small": blocks * DISK_BLOCK}
    room = {"nvme_bytes": 256 * DISK_BLOCK} | options
    return Rig(0, pages=10, host=24, path=tmp_path / "s", namespace_quotas=quotas, **room)


def test_a_namespace_at_its_quota_evicts_its_own_blocks_only(tmp_path):
    rig = quota_rig(tmp_path, 12)
    theirs = [ids(4 * BLOCK, i) for i in range(6)]
    for tokens in theirs:
        cache(rig, tokens, "other")
    for i in range(12):
        cache(rig, ids(4 * BLOCK, 100 + i), "small")
        rig.settle()
        assert nvme(rig)["namespaces"]["small"]["used_bytes"] <= 12 * DISK_BLOCK
    assert rig.pager.counters.get("evicted_blocks", tier="nvme", reason="quota") > 0
    assert all(rig.pager.match(tokens, "other").tokens == len(tokens) for tokens in theirs)
    assert rig.pager.match(ids(4 * BLOCK, 111), "small").tokens == 4 * BLOCK
    finish(rig)


def test_a_park_past_the_quota_names_it_and_the_sequence_goes_on(tmp_path):
    rig = quota_rig(tmp_path, 6)
    park(rig, "first", ids(5 * BLOCK, 1), "small")
    seq = rig.start(ids(5 * BLOCK, 2), "small")
    rig.prefill(seq)
    with pytest.raises(TierFullError, match=r"namespace_quotas\['small'\]"):
        rig.pager.park("second", seq, timeout_s=2.0)
    rig.say(seq, [1, 2])
    rig.pager.forget("first")
    rig.pager.truncate(seq, 5 * BLOCK)
    rig.pager.park("second", seq)
    finish(rig)


def test_a_namespace_at_its_quota_does_not_stop_the_others(tmp_path):
    rig = quota_rig(tmp_path, 4)
    park(rig, "mine", ids(4 * BLOCK, 1), "small")
    seqs = [rig.start(ids(4 * BLOCK, 10 + i), "small") for i in range(5)]  # 20 blocks that may not go down
    for seq in seqs:
        rig.prefill(seq)
    for i in range(10):
        park(rig, f"other{i}", ids(3 * BLOCK, 50 + i), "other")
    assert nvme(rig)["namespaces"]["small"]["used_bytes"] <= 4 * DISK_BLOCK
    for seq in seqs:
        rig.say(seq, [1])
        rig.pager.finish(seq)
    finish(rig)


def test_a_lowered_quota_holds_for_what_comes_and_loses_no_session(tmp_path):
    rig = quota_rig(tmp_path, 12)
    park(rig, "chat", ids(8 * BLOCK, 1), "small")
    rig.close()
    again = quota_rig(tmp_path, 4)
    assert nvme(again)["namespaces"]["small"]["used_bytes"] == 8 * DISK_BLOCK
    seq, parked = again.pager.resume("chat", "small")
    assert parked.num_computed == 8 * BLOCK
    again.say(seq, [1])
    assert again.pager.counters.get("computed_tokens") == 1
    finish(again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"namespace_quotas": {"a": "1GiB"}}, "nvme_path"),
        (
            {"nvme_path": "s", "host_bytes": "1MiB", "namespace_quotas": {"a": "many"}},
            r"namespace_quotas\['a'\]='many'",
        ),
        ({"nvme_path": "s", "host_bytes": "1MiB", "namespace_quotas": {"a": -1}}, r"namespace_quotas\['a'\]"),
        ({"nvme_path": "s", "host_bytes": "1MiB", "namespace_quotas": {"a b": 1}}, "namespace"),
        ({"nvme_path": "s", "host_bytes": "1MiB", "namespace_quotas": 7}, "namespace_quotas=7"),
    ],
)
def test_quotas_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PagerConfig(device_bytes="1MiB", **settings).validate()


def test_quotas_come_from_a_file_and_from_the_environment(tmp_path):
    file = tmp_path / "kvtier.toml"
    file.write_text(
        'device_bytes = "1MiB"\nhost_bytes = "1MiB"\nnvme_path = "s"\n[namespace_quotas]\na = "1GiB"\nb = 4096\n'
    )
    config = load_config(file, env={})
    assert (config.quota("a").nvme_ceiling, config.quota("b").nvme_ceiling) == (1 << 30, 4096)
    config = load_config(file, env={"KVTIER_NAMESPACE_QUOTAS": "a=2GiB,c=1MiB"})
    assert (config.quota("a").nvme_ceiling, config.quota("c").nvme_ceiling) == (2 << 30, 1 << 20)
    with pytest.raises(ConfigError, match="KVTIER_NAMESPACE_QUOTAS"):
        load_config(file, env={"KVTIER_NAMESPACE_QUOTAS": "a"})


# ---------------------------------------------------------------------- a disk that refuses
class Clock:
    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_writes_is_said_so_left_alone_and_tried_again(tmp_path, monkeypatch, caplog, code):
    clock = Clock()
    rig = Rig(0, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK, clock=clock)
    park(rig, "before", ids(4 * BLOCK, 1))
    with monkeypatch.context() as broken, caplog.at_level(logging.WARNING, "kvtier.pager"):

        def refuse(self, fd, buffers, offset):
            raise OSError(code, "injected")

        broken.setattr(SystemCalls, "pwritev", refuse)
        seqs = [rig.start(ids(5 * BLOCK, 10 + i)) for i in range(4)]
        for seq in seqs:
            rig.prefill(seq)
        with pytest.raises((TierUnavailableError, TierFullError)):
            rig.pager.park("lost", seqs[0], timeout_s=2.0)
        for i in range(6):
            cached = rig.start(ids(4 * BLOCK, 40 + i))
            rig.prefill(cached)
            rig.pager.finish(cached)
        rig.settle()
        status = nvme(rig)
        assert not status["takes_writes"] and "injected" in status["last_write_error"]
        assert rig.pager.counters.get("nvme_write_errors") >= cold.MAX_WRITE_ERRORS
        assert "going on without it" in caplog.text
        seq, parked = rig.pager.resume("before")  # it can still be read
        assert parked.num_computed == 4 * BLOCK
        rig.say(seq, [1])
        for seq in seqs:
            rig.say(seq, [2])
    clock.ahead_s += cold.RETRY_S + 1
    rig.pager.park("after", seqs[0])
    assert nvme(rig)["takes_writes"]
    finish(rig)


def test_a_full_disk_between_two_parks_loses_nothing_that_was_parked(tmp_path, monkeypatch):
    rig = Rig(3, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK)
    plain, choose, refused = SystemCalls.pwritev, np.random.default_rng(0), [0]

    def sometimes(self, fd, buffers, offset):
        if choose.random() < 0.2:
            refused[0] += 1
            raise OSError(errno.ENOSPC, "injected")
        return plain(self, fd, buffers, offset)

    monkeypatch.setattr(SystemCalls, "pwritev", sometimes)
    parked = []
    for i in range(20):
        try:
            park(rig, f"chat{i}", ids(5 * BLOCK, i))
            parked.append(i)
        except (TierUnavailableError, TierFullError):
            pass
    monkeypatch.undo()
    assert refused[0] > 3 and len(parked) > 10
    rig.close()
    again = Rig(4, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK)
    for i in parked:
        seq, _ = again.pager.resume(f"chat{i}")
        again.say(seq, [1])
        again.pager.finish(seq)
    assert again.pager.counters.get("computed_tokens") == len(parked)
    finish(again)


assert LAYOUT.block_bytes < DISK_BLOCK


def test_a_block_that_cannot_be_read_is_lost_when_it_should_move(tmp_path):
    """And not tried again for ever: its segment becomes clean."""
    rig = Rig(0, pages=10, host=24, path=tmp_path / "s", nvme_bytes=256 * DISK_BLOCK)
    park(rig, "chat", ids(3 * BLOCK, 1))
    group = rig.pager._core.groups[0]
    segment = group.cold.tier.geometry(0).place(int(group.directory.nvme_slot[group.directory.nvme_valid][0]))[0]
    file = next((tmp_path / "s" / "blocks.zarr" / "g0").glob(f"c.{segment}.*"))
    file.write_bytes(b"x" * file.stat().st_size)
    for i in range(70):
        cache(rig, ids(6 * BLOCK, 100 + i))
        assert beats(rig) < MANY
    assert rig.pager.counters.get("corrupt_blocks", tier="nvme") == 3
    assert nvme(rig)["clean_segments"][0] >= 2
    rig.pager.forget("chat")
    finish(rig)


def test_segments_of_one_block_are_not_moved_round_and_round(tmp_path):
    rig = Rig(pages=8, host=16, path=tmp_path / "s", nvme_bytes=15 * DISK_BLOCK)
    assert rig.pager._core.nvme.geometry(0).slots_per_segment == 1
    for i in range(7):
        park(rig, f"s{i}", ids(2 * BLOCK, i))
    assert beats(rig) < MANY
    assert nvme(rig)["write_amplification"] == 1
    finish(rig)


def test_write_back_ends_where_the_disk_holds_only_what_the_host_holds_too(tmp_path):
    """Evicting such a copy for another one would be for nothing: it has to go down again itself."""
    rig = Rig(pages=8, host=16, path=tmp_path / "s", nvme_bytes=4 * DISK_BLOCK, low_watermark=0.5, high_watermark=0.9)
    for i in range(8):
        seq = rig.start([100 * i + t for t in range(2 * BLOCK)])
        rig.prefill(seq)
        rig.pager.finish(seq)
    assert beats(rig) < MANY
    finish(rig)
