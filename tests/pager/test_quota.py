"""Namespaces keep to floor, ceiling, rate and pins, in the real pager and under any order of events."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.pager.config import PagerConfig
from kvtier.pager.keys import owner_tag
from kvtier.pager.quota import NamespaceQuota, Quotas, parse_quota
from kvtier.pager.rates import TokenBucket
from kvtier.tiers.errors import ConfigError, TierFullError

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, Rig

DISK_BLOCK = 4096  # what a block of LAYOUT takes on disk
HOST_BLOCK = LAYOUT.block_bytes


def ids(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


def make_rig(tmp_path, quotas: dict, seed: int = 0, **options) -> Rig:
    room = {"nvme_bytes": 64 * DISK_BLOCK, "host": 24} | options
    return Rig(seed, pages=10, path=tmp_path / "s", namespace_quotas=quotas, **room)


def run(rig: Rig, tokens: list[int], namespace: str) -> None:
    """Compute a prefix and leave it as cache."""
    seq = rig.start(tokens, namespace)
    rig.prefill(seq)
    rig.pager.finish(seq)


def store(rig: Rig, tokens: list[int], namespace: str) -> None:
    """Leave a prefix on disk that nobody refers to."""
    seq = rig.start(tokens, namespace)
    rig.prefill(seq)
    rig.pager.park("passing", seq)
    rig.pager.forget("passing")


def used(rig: Rig, tier, namespace: str) -> int:
    with rig.pager._core.lock:
        return rig.pager._core.quotas.used_bytes(tier, owner_tag(namespace))


def finish(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    rig.close()


# ---------------------------------------------------------------------- token buckets
@settings(max_examples=200, deadline=None)
@given(
    st.floats(1.0, 1e6),
    st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 2_000_000)), max_size=60),
)
def test_no_span_of_time_sees_more_than_burst_rate_and_one_taking(rate, events):
    bucket, now_s, taken = TokenBucket(rate, 0.0), 0.0, []
    for pause_s, size in events:
        now_s += pause_s
        if bucket.level(now_s) > 0:
            bucket.take(size, now_s)
            taken.append((now_s, size))
        else:
            later_s = now_s + bucket.wait_s(now_s)
            assert later_s > now_s
            probe = TokenBucket(rate, 0.0)
            probe.__dict__.update(bucket.__dict__)
            assert probe.level(later_s + 1e-6 * max(1.0, later_s)) > 0  # wait_s is not too short
    for i, (from_s, _) in enumerate(taken):
        total = 0
        for to_s, size in taken[i:]:
            total += size
            largest = max(s for t, s in taken[i:] if t <= to_s)
            assert total <= (rate + rate * (to_s - from_s) + largest) * (1 + 1e-9)


def test_a_clock_that_goes_backwards_gives_nothing_away():
    bucket = TokenBucket(100.0, 10.0)
    bucket.take(150.0, 10.0)
    assert bucket.level(5.0) == bucket.level(10.0) == -50.0


# ---------------------------------------------------------------------- floors
def test_a_namespace_below_its_floor_loses_nothing_on_nvme(tmp_path):
    rig = make_rig(tmp_path, {"small": {"nvme_floor": 12 * DISK_BLOCK}})
    mine = [ids(4 * BLOCK, i) for i in range(3)]
    for tokens in mine:
        store(rig, tokens, "small")
    for i in range(40):  # 240 blocks through a store of 64
        store(rig, ids(6 * BLOCK, 100 + i), "other")
        rig.settle()
    assert rig.pager.counters.get("evicted_blocks", tier="nvme") > 0
    assert all(rig.pager.match(tokens, "small").tokens == len(tokens) for tokens in mine)
    finish(rig)


def test_without_the_floor_the_same_flood_takes_it(tmp_path):
    rig = make_rig(tmp_path, {})
    mine = ids(4 * BLOCK, 1)
    store(rig, mine, "small")
    for i in range(40):
        store(rig, ids(6 * BLOCK, 100 + i), "other")
        rig.settle()
    assert rig.pager.match(mine, "small").tokens == 0
    finish(rig)


@pytest.mark.parametrize("floor", [4, 0])
def test_a_floor_holds_in_a_store_too_small_for_a_ring(tmp_path, floor):
    """There blocks are evicted one by one, not by the segment."""
    quotas = {"small": {"nvme_floor": floor * DISK_BLOCK}} if floor else {}
    rig = make_rig(tmp_path, quotas, nvme_bytes=7 * DISK_BLOCK, host=6)
    mine = ids(4 * BLOCK, 1)
    store(rig, mine, "small")
    for i in range(20):
        store(rig, ids(3 * BLOCK, 100 + i), "other")
        rig.settle()
    assert rig.pager.counters.get("reclaimed_segments") == 0
    assert rig.pager.match(mine, "small").tokens == (len(mine) if floor else 0)
    finish(rig)


def test_what_is_above_the_floor_may_go_and_no_more(tmp_path):
    rig = make_rig(tmp_path, {"small": {"nvme_floor": 8 * DISK_BLOCK}})
    for i in range(6):
        store(rig, ids(4 * BLOCK, i), "small")  # 24 blocks, 16 above the floor
    for i in range(40):
        store(rig, ids(6 * BLOCK, 100 + i), "other")
        rig.settle()
        assert used(rig, "nvme", "small") >= 8 * DISK_BLOCK
    assert used(rig, "nvme", "small") < 24 * DISK_BLOCK
    finish(rig)


def test_a_namespace_at_its_floor_still_makes_room_for_itself(tmp_path):
    rig = make_rig(tmp_path, {"all": {"nvme_floor": 64 * DISK_BLOCK}})
    for i in range(20):
        store(rig, ids(6 * BLOCK, i), "all")
        rig.settle()
    assert rig.pager.match(ids(6 * BLOCK, 19), "all").tokens == 6 * BLOCK
    finish(rig)


@pytest.mark.parametrize("seed", range(3))
def test_a_host_floor_keeps_a_prefix_in_memory(seed):
    mine = ids(4 * BLOCK, 1)
    kept = {}
    for floor in (0, 6 * HOST_BLOCK):
        rig = Rig(seed, pages=6, host=12, namespace_quotas={"small": {"host_floor": floor}} if floor else {})
        run(rig, mine, "small")
        for i in range(30):
            run(rig, ids(4 * BLOCK, 100 + i), "other")
        rig.settle()
        kept[floor] = rig.pager.match(mine, "small").tokens
        finish(rig)
    assert kept == {0: 0, 6 * HOST_BLOCK: len(mine)}


# ---------------------------------------------------------------------- ceilings
def test_a_host_ceiling_holds_and_others_keep_theirs(tmp_path):
    rig = make_rig(tmp_path, {"small": {"host_ceiling": 6 * HOST_BLOCK}}, staging=4)
    theirs = [ids(4 * BLOCK, i) for i in range(3)]
    for tokens in theirs:
        run(rig, tokens, "other")
    for i in range(15):
        run(rig, ids(5 * BLOCK, 100 + i), "small")
        assert used(rig, "host", "small") <= 6 * HOST_BLOCK
    seq = rig.start(ids(30 * BLOCK, 7), "small")  # five times the ceiling: goes through it to nvme
    rig.prefill(seq)
    assert used(rig, "host", "small") <= 6 * HOST_BLOCK
    assert all(rig.pager.match(tokens, "other").tokens == len(tokens) for tokens in theirs)
    rig.pager.finish(seq)
    finish(rig)


def test_a_host_ceiling_that_no_block_could_pass_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"namespace_quotas\['small'\].host_ceiling"):
        make_rig(tmp_path, {"small": {"host_ceiling": HOST_BLOCK}})


@pytest.mark.parametrize("seed", range(6))
def test_many_namespaces_in_any_order_keep_to_their_quotas(tmp_path, seed):
    """Random work of four namespaces; ceilings hold at each step, and whoever does nothing keeps what its floor says."""
    rng = random.Random(seed)
    quotas = {
        "a": {"host_ceiling": 8 * HOST_BLOCK, "nvme_ceiling": 20 * DISK_BLOCK},
        "b": {"host_floor": 4 * HOST_BLOCK, "nvme_floor": 12 * DISK_BLOCK},
        "c": {"nvme_ceiling": 16 * DISK_BLOCK, "nvme_floor": 8 * DISK_BLOCK, "host_floor": 2 * HOST_BLOCK},
    }
    rig = make_rig(tmp_path, quotas, seed)
    for step in range(60):
        name = rng.choice("abcd")
        before = {n: {t: used(rig, t, n) for t in ("host", "nvme")} for n in quotas}
        work = rng.choice([run, store])
        try:
            work(rig, ids(rng.randrange(1, 7) * BLOCK, rng.randrange(30)), name)
        except TierFullError:
            pass
        for n, tiers in before.items():
            quota = parse_quota(quotas[n], name=n)
            for tier, had in tiers.items():
                ceiling = quota.ceiling(tier)
                assert ceiling is None or used(rig, tier, n) <= ceiling, (step, n, tier)
                if n != name and tier == "nvme":  # on the host tier its own promotions and write-back go on meanwhile
                    assert used(rig, tier, n) >= min(had, quota.floor(tier)), (step, n, tier)
    finish(rig)


# ---------------------------------------------------------------------- rates
class Clock:
    """Time passes by being looked at, and never while this thread is held up."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-3
        return self.now_s


def test_a_namespace_over_its_rate_waits_and_says_why(tmp_path):
    clock = Clock()
    rig = make_rig(tmp_path, {"slow": {"write_bytes_per_s": 4 * DISK_BLOCK}}, clock=clock)
    store(rig, ids(5 * BLOCK, 1), "slow")
    seq = rig.start(ids(10 * BLOCK, 2), "slow")
    rig.prefill(seq)
    with pytest.raises(TierFullError, match=r"may write 16.0 KiB a second .*write_bytes_per_s"):
        rig.pager.park("chat", seq, timeout_s=0.05)
    store(rig, ids(6 * BLOCK, 3), "other")  # nobody else waits
    for _ in range(5):
        clock.now_s += 1.0
        rig.pager.poll()
    rig.pager.park("chat", seq, timeout_s=5.0)
    finish(rig)


def test_a_park_waits_for_the_rate_by_itself(tmp_path):
    rig = make_rig(tmp_path, {"slow": {"write_bytes_per_s": 20 * DISK_BLOCK}})
    started_s = time.monotonic()
    for i in range(3):
        store(rig, ids(8 * BLOCK, i), "slow")
    assert time.monotonic() - started_s >= (24 - 20 - 8) / 20  # never refused; how long it took is the bucket's test
    assert used(rig, "nvme", "slow") == 24 * DISK_BLOCK
    finish(rig)


# ---------------------------------------------------------------------- pins, changes, refusals
def test_held_slots_of_a_namespace_count_against_its_pins(tmp_path):
    rig = make_rig(tmp_path, {"small": {"pins": 4}})
    store(rig, ids(4 * BLOCK, 1), "small")
    store(rig, ids(4 * BLOCK, 2), "other")
    rig.settle()
    core = rig.pager._core
    group, d = core.groups[0], core.groups[0].directory
    mine, others = (np.flatnonzero((d.host_slot >= 0) & (d.owner == owner_tag(n))) for n in ("small", "other"))
    assert core.quotas.pins_left(owner_tag("small")) == 4 and core.quotas.pins_left(owner_tag("other")) is None
    group.host.holds[d.host_slot[others]] += 1
    group.host.holds[d.host_slot[mine[:3]]] += 2  # held twice is one slot
    assert core.quotas.pins_left(owner_tag("small")) == 1
    group.host.holds[d.host_slot[mine[:3]]] -= 2
    group.host.holds[d.host_slot[others]] -= 1
    assert core.quotas.pins_left(owner_tag("small")) == 4
    finish(rig)


def test_quotas_change_while_running_and_a_debt_stays():
    clock = Clock()
    quotas = Quotas({"a": NamespaceQuota(write_bytes_per_s=100)}, clock)
    owner = owner_tag("a")
    quotas._buckets[owner].take(500, clock())
    quotas.update({"a": NamespaceQuota(write_bytes_per_s=1000)})
    assert quotas.is_throttled(owner)
    clock.now_s += 0.5
    assert not quotas.is_throttled(owner)
    quotas.update({})
    assert not quotas.is_throttled()


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        ({"nvme_flor": 1}, r"namespace_quotas\['a'\].nvme_flor is an unknown setting; did you mean 'nvme_floor'"),
        ({"nvme_floor": "2GiB", "nvme_ceiling": "1GiB"}, "nvme_floor=2.0 GiB is above nvme_ceiling=1.0 GiB"),
        ({"host_floor": "2MiB"}, "host_floor of all namespaces is 2.0 MiB together, the host tier has 1.0 MiB"),
        ({"write_bytes_per_s": 0}, "would never write"),
        ({"pins": "many"}, r"namespace_quotas\['a'\].pins='many'"),
        (7.5, r"namespace_quotas\['a'\]=7.5"),
    ],
)
def test_quotas_that_cannot_be_are_refused(quota, message):
    config = PagerConfig("1MiB", "1MiB", nvme_path="s", nvme_bytes="1GiB", namespace_quotas={"a": quota})
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_a_quota_of_memory_needs_no_store():
    PagerConfig("1MiB", "1MiB", namespace_quotas={"a": {"host_ceiling": "512KiB", "pins": 7}}).validate()
