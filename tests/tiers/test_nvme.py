from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError, StoreLockedError, StoreMismatchError, TierFullError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tiers.nvme.layout import Geometry
from kvtier.tiers.nvme.slots import MANY_RUNS, RUN_SLOTS, plan_runs
from kvtier.tiers.nvme.status import read_store_status
from kvtier.tiers.nvme.store import STAMP, NvmeTier, StoreIdentity
from kvtier.tiers.simulated import SimulatedBackend

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
BF16 = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=16, dtype="bfloat16", window=32, name="window")
MLA = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=4, dtype="float16", value_dim=8, name="mla")
PAGED = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32")  # two pages
IDENTITY = StoreIdentity("model", (LAYOUT, BF16, MLA))
NUM_SLOTS = [70, 20, 10]


def open_tier(path, backend, identity=IDENTITY, num_slots=NUM_SLOTS, durability="batch", calls=None) -> NvmeTier:
    return NvmeTier.open(path, identity, num_slots=num_slots, backend=backend, durability=durability, calls=calls)


def blocks(layout: KVLayout, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, layout.block_bytes), np.uint8)


def stamps(n: int, seed: int = 0, tokens: int = 16) -> np.ndarray:
    out = np.zeros(n, STAMP)
    for i in range(n):
        out[i]["key"] = np.random.default_rng(seed * 1000 + i).bytes(32)
        out[i]["tokens"] = tokens
    return out


def store(tier: NvmeTier, n: int, group: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows, slots = blocks(IDENTITY.layouts[group], n, seed), tier.allocate(group, n)
    ticket = tier.write(group, slots, rows, np.arange(n), stamps(n, seed))
    assert ticket.event.wait(60) and ticket.ok.all()
    assert tier._writer.wait(60)  # and the next segment's file is made: nothing comes and goes while a store is copied
    return slots, rows


def load(tier: NvmeTier, slots: np.ndarray, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    target = np.zeros((len(slots), IDENTITY.layouts[group].block_bytes), np.uint8)
    ticket = tier.read(group, slots, target, np.arange(len(slots)), tier.stamps(group, slots))
    assert ticket.event.wait(60)
    return ticket.ok, target


@pytest.mark.parametrize("group", [0, 1, 2])
def test_reads_back_exactly_what_was_written(tmp_path, backend, group):
    tier = open_tier(tmp_path / "s", backend)
    slots, rows = store(tier, 10, group)
    ok, seen = load(tier, slots, group)
    assert ok.all() and np.array_equal(seen, rows)
    size = IDENTITY.layouts[group].layer_bytes
    slices = np.zeros((10, size), np.uint8)
    ticket = tier.read_layer(group, slots, 1, slices, np.arange(10), tier.stamps(group, slots))
    assert ticket.event.wait(60) and ticket.ok.all() and np.array_equal(slices, rows[:, size : 2 * size])
    tier.close()


def paged(path, backend, durability="batch") -> tuple[NvmeTier, np.ndarray]:
    """A store of 200 blocks of whole pages, and rows of as many that go to the disk as they lie."""
    tier = open_tier(path, backend, StoreIdentity("model", (PAGED,)), [200], durability)
    rows = backend.alloc_host(200, PAGED.block_bytes)
    assert tier._movers.plain.goes_straight(0, rows, np.arange(200))
    return tier, rows


@pytest.mark.parametrize("durability", ["none", "always"])
def test_many_blocks_in_rows_that_go_straight_to_the_disk(tmp_path, backend, durability):
    tier, rows = paged(tmp_path / "s", backend, durability)
    slots, everything = tier.allocate(0, 200), np.arange(200)
    for seed in range(3):
        rows[:] = blocks(PAGED, 200, seed)
        written = tier.write(0, slots, rows, everything, stamps(200, seed))
        assert written.event.wait(60) and written.event.error is None and written.ok.all()
        target = backend.alloc_host(200, PAGED.block_bytes)
        for n in (1, 200):
            parts = [everything[i : i + n] for i in range(0, 200, n)]
            tickets = [tier.read(0, slots[part], target, part, tier.stamps(0, slots[part])) for part in parts]
            assert all(ticket.event.wait(60) and ticket.ok.all() for ticket in tickets)
            assert np.array_equal(target, rows)
            target[:] = 0
    others = tier.read(0, slots, target, everything, tier.stamps(0, np.roll(slots, 1)))
    assert others.event.wait(60) and not others.ok.any()  # whole blocks, of other keys
    tier.close()


@pytest.mark.parametrize("order", range(4))
def test_blocks_are_whole_however_the_steps_of_their_calls_fall(tmp_path, order):
    backend = SimulatedBackend(order)
    tier, rows = paged(tmp_path / "s", backend)
    rows[:] = blocks(PAGED, 200)
    slots = np.random.default_rng(order).permutation(tier.allocate(0, 200))  # hardly a run: as many calls as can be
    written = tier.write(0, slots, rows, np.arange(200), stamps(200))
    assert written.event.wait(60) and written.ok.all()
    target = backend.alloc_host(200, PAGED.block_bytes)
    ticket = tier.read(0, slots, target, np.arange(200), tier.stamps(0, slots))
    assert ticket.event.wait(60) and ticket.ok.all() and np.array_equal(target, rows)
    tier.close()


def test_a_long_call_is_few_requests_and_a_short_one_enough_for_all_workers():
    geometry = Geometry.of(KVLayout(16, 8, 128, 32, "bfloat16"), 64)  # 2 MiB blocks
    for count, longest in ((1, 1), (24, 1), (47, 1), (48, 2), (72, 3), (96, 4), (1000, 4)):
        runs = list(plan_runs(geometry, np.arange(count)))
        assert max(run.count for run in runs) == longest and len(runs) >= min(count, MANY_RUNS)
        assert [slot for run in runs for slot in range(run.part.start, run.part.stop)] == list(range(count))
    small = Geometry.of(KVLayout(2, 1, 8, 16, "bfloat16"), 4096)
    assert max(run.count for run in plan_runs(small, np.arange(4096))) == RUN_SLOTS


def test_a_reopened_store_lists_what_was_written_and_nothing_that_was_freed(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, rows = store(tier, 40)
    tier.free(0, slots[5:9])
    tier.put_session("a", {"n": 1})
    tier.put_session("b", {"n": 2})
    tier.drop_session("a")
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    found, found_stamps = again.recovered()[0]
    kept = np.delete(np.arange(40), range(5, 9))
    assert found.tolist() == slots[kept].tolist() and (found_stamps["tokens"] == 16).all()
    ok, seen = load(again, found)
    assert ok.all() and np.array_equal(seen, rows[kept])
    assert again.sessions() == {"b": {"n": 2}} and again.free_slots(0) == 70 - 36
    assert again.allocate(0, 4).tolist() == [40, 41, 42, 43]  # goes on where it ended
    assert again.allocate(0, 30)[-4:].tolist() == slots[5:9].tolist()  # and comes to the holes last
    again.close()


def test_stock_zarr_reads_every_block_and_unwritten_slots_as_fill(tmp_path, backend):
    import zarr

    tier = open_tier(tmp_path / "s", backend)
    written = [store(tier, 6, group, seed=group) for group in range(3)]
    tier.free(0, written[0][0][2:3])
    tier.close()
    group = zarr.open_group(str(tmp_path / "s" / "blocks.zarr"), mode="r")
    assert group.attrs["kvtier"]["model_fingerprint"] == "model"
    for g, (slots, rows) in enumerate(written):
        layout, array = IDENTITY.layouts[g], group[f"g{g}"]
        assert array.dtype == layout.storage_dtype and array.attrs["kvtier"]["dtype"] == layout.dtype
        for slot, row in zip(slots.tolist(), rows):
            wanted = row.view(layout.storage_dtype).reshape(layout.block_shape)
            seen = np.asarray(array[slot])
            expected = np.zeros_like(wanted) if g == 0 and slot == slots[2] else wanted
            assert seen.tobytes() == expected.tobytes()
        assert not np.asarray(array[int(slots.max()) + 1]).any()


def filled(path: Path, backend: CpuBackend) -> list[tuple[np.ndarray, np.ndarray]]:
    """A closed store with blocks in every layer group, over several segments: slots and rows of each."""
    tier = open_tier(path, backend)
    written = [store(tier, 9, group, seed=group) for group in range(3)]
    tier.close()
    return written


def test_tensorstore_reads_every_block(tmp_path, backend):
    ts = pytest.importorskip("tensorstore")
    for group, (slots, rows) in enumerate(filled(tmp_path / "s", backend)):
        path = str(tmp_path / "s" / "blocks.zarr" / f"g{group}")
        array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, read=True).result()
        seen = np.asarray(array[: int(slots.max()) + 1].read().result())
        assert [seen[slot].tobytes() for slot in slots] == [row.tobytes() for row in rows]


def test_xarray_reads_every_block(tmp_path, backend):
    xarray = pytest.importorskip("xarray")
    written = filled(tmp_path / "s", backend)
    with xarray.open_zarr(str(tmp_path / "s" / "blocks.zarr"), consolidated=False) as dataset:
        assert set(dataset) == {"g0", "g1", "g2"} and dataset["g0"].dims[:2] == ("g0_slot", "g0_layer")
        for group, (slots, rows) in enumerate(written):
            seen = dataset[f"g{group}"].values
            assert [seen[slot].tobytes() for slot in slots] == [row.tobytes() for row in rows]


@pytest.mark.parametrize("where", ["block", "trailer", "foreign", "truncated", "gone"])
def test_whatever_is_wrong_on_disk_is_not_ok_and_never_an_exception(tmp_path, backend, where):
    tier = open_tier(tmp_path / "s", backend)
    slots, rows = store(tier, 4)
    geometry = tier.geometry(0)
    tier.close()
    path = next((tmp_path / "s" / "blocks.zarr" / "g0").glob("c.0*"))
    raw = bytearray(path.read_bytes())
    start = geometry.header_bytes + geometry.stride
    if where == "block":
        raw[start + 100] ^= 4
    elif where == "trailer":
        raw[start + geometry.block_bytes + 4 + 20] ^= 4
    elif where == "foreign":  # a whole, self-consistent block of another key
        raw[start : start + geometry.stride] = raw[start + geometry.stride : start + 2 * geometry.stride]
    elif where == "truncated":
        del raw[start + 50 :]
    path.unlink()
    if where != "gone":
        path.write_bytes(raw)
    tier = open_tier(tmp_path / "s", backend)
    ok, seen = load(tier, slots)
    expected = {"truncated": [False] * 4, "gone": [False] * 4}.get(where, [True, False, True, True])
    assert ok.tolist() == expected
    assert np.array_equal(seen[ok], rows[ok])
    tier.close()


def test_random_bit_flips_are_all_detected(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, _ = store(tier, 8)
    geometry, rng = tier.geometry(0), np.random.default_rng(0)
    for _ in range(200):
        slot, bit = int(rng.integers(8)), int(rng.integers(geometry.block_bytes * 8))
        number, offset = geometry.place(int(slots[slot]))
        path = next((tmp_path / "s" / "blocks.zarr" / "g0").glob(f"c.{number}.*"))
        whole = path.read_bytes()
        raw = bytearray(whole)
        raw[offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        ok, _ = load(tier, slots)
        assert ok.tolist() == [i != slot for i in range(8)]
        path.write_bytes(whole)
    tier.close()


def test_a_segment_left_half_made_is_made_anew_once_nothing_is_listed_in_it(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    path = tmp_path / "s" / "blocks.zarr" / "g0" / "c.0.0.0.0.0.0"
    path.write_bytes(b"half")
    slots, rows = store(tier, 8)
    ok, seen = load(tier, slots)
    assert ok.all() and np.array_equal(seen, rows)
    tier.close()
    path.write_bytes(b"half")  # with blocks listed in it: they are lost, and it stays closed to new ones
    tier = open_tier(tmp_path / "s", backend)
    assert load(tier, slots)[0].tolist() == [False] * 4 + [True] * 4
    ticket = tier.write(0, slots[:4], rows[:4], np.arange(4), stamps(4))
    assert ticket.event.wait(60) and not ticket.ok.any()
    tier.quarantine(0, slots[:4])
    ticket = tier.write(0, slots[:4], rows[:4], np.arange(4), stamps(4))
    assert ticket.event.wait(60) and ticket.ok.all()
    tier.close()


def test_blocks_are_appended_segment_by_segment_and_holes_come_last(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)  # 17 segments of 4 slots, and 2 slots
    assert tier.num_segments(0) == tier.num_clean(0) == 17
    first = tier.allocate(0, 6)
    assert first.tolist() == list(range(6)) and tier.num_clean(0) == 15
    tier.free(0, first[:3])
    assert tier.allocate(0, 10).tolist() == list(range(6, 16))
    assert tier.sealed(0)[0].tolist() == [0, 1, 2] and tier.sealed(0)[1].tolist() == [1, 4, 4]
    tier.free(0, first[3:4])
    assert tier.num_clean(0) == 14 and tier.sealed(0)[0].tolist() == [1, 2]
    assert tier.allocate(0, 4).tolist() == [0, 1, 2, 3]  # its file is there already
    tier.retain(0, 1)
    assert tier.sealed(0)[0].tolist() == [2, 3, 1]
    assert tier.allocate(0, 52).tolist() == list(range(16, 68)) and tier.num_clean(0) == 0
    tier.free(0, np.array([5, 21, 22, 40]))
    assert tier.allocate(0, 1).tolist() == [68]
    with pytest.raises(TierFullError):
        tier.allocate(0, 5, not_in=5)
    assert tier.allocate(0, 3).tolist() == [69, 21, 22]  # neighbours if there are any
    assert tier.allocate(0, 2, not_in=5).tolist() == [5, 40] and tier.free_slots(0) == 0
    tier.close()


def test_relocated_blocks_are_listed_once_and_survive_a_restart(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, rows = store(tier, 8)
    targets = tier.allocate(0, 3)
    ticket = tier.relocate(0, slots[1:4], targets)
    assert ticket.event.wait(60) and ticket.ok.all() and tier.write_amplification == 11 / 8
    tier.free(0, slots[1:4])
    now = np.concatenate([slots[:1], targets, slots[4:]])
    for _ in range(2):
        ok, seen = load(tier, now)
        assert ok.all() and np.array_equal(seen, rows)
        assert sorted(tier.recovered()[0][0].tolist()) == sorted(now.tolist())
        tier.close()
        tier = open_tier(tmp_path / "s", backend)
    tier.close()


def test_a_damaged_block_is_not_relocated(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, _ = store(tier, 4)
    number, offset = tier.geometry(0).place(int(slots[2]))
    path = next((tmp_path / "s" / "blocks.zarr" / "g0").glob(f"c.{number}.*"))
    raw = bytearray(path.read_bytes())
    raw[offset + 7] ^= 1
    path.write_bytes(raw)
    ticket = tier.relocate(0, slots, tier.allocate(0, 4))
    assert ticket.event.wait(60) and ticket.ok.tolist() == [True, True, False, True]
    assert slots[2] in tier.recovered()[0][0]
    tier.close()


def test_a_torn_manifest_tail_loses_only_what_it_tore(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    store(tier, 4)
    tier.flush()
    size = (tmp_path / "s" / "manifest.log").stat().st_size
    store(tier, 4, seed=1)
    tier.close()
    log = tmp_path / "s" / "manifest.log"
    log.write_bytes(log.read_bytes()[: size + 30])
    again = open_tier(tmp_path / "s", backend)
    assert len(again.recovered()[0][0]) == 4
    again.close()


def test_full_tier_says_so_and_changes_nothing(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    with pytest.raises(TierFullError, match="70 slots"):
        tier.allocate(0, 71)
    assert tier.free_slots(0) == 70 and len(tier.allocate(0, 70)) == 70
    tier.close()


def test_refusals_name_the_cause_and_touch_nothing(tmp_path, backend):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        open_tier(tmp_path / "file", backend)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        open_tier(tmp_path / "foreign", backend)
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]
    tier = open_tier(tmp_path / "s", backend)
    with pytest.raises(StoreLockedError, match=str(os.getpid())):
        open_tier(tmp_path / "s", backend)
    tier.close()
    with pytest.raises(StoreMismatchError, match="model_fingerprint='model'"):
        open_tier(tmp_path / "s", backend, StoreIdentity("other", IDENTITY.layouts))
    with pytest.raises(StoreMismatchError, match="layouts"):
        open_tier(tmp_path / "s", backend, StoreIdentity("model", (LAYOUT,)), [10])
    file = tmp_path / "s" / "store.json"
    file.write_text(file.read_text().replace('"format": 4', '"format": 99'))
    before = sorted(p.name for p in (tmp_path / "s").rglob("*"))
    with pytest.raises(StoreMismatchError, match="format=99"):
        open_tier(tmp_path / "s", backend)
    assert sorted(p.name for p in (tmp_path / "s").rglob("*")) == before


def test_the_directory_is_private_and_names_are_ours(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    tier.put_session("../../etc/passwd", {"n": 1})
    store(tier, 2)
    tier.close()
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_status_of_a_store_at_rest_needs_no_lock(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    store(tier, 5)
    tier.put_session("a", {})
    status = read_store_status(tmp_path / "s")
    assert status["groups"][0]["blocks"] == 5 and status["sessions"] == 1
    assert status["used_bytes"] == 5 * LAYOUT.block_bytes
    tier.close()
    with pytest.raises(ConfigError, match=r"store\.json"):
        read_store_status(tmp_path)


_WRITER = """
import sys, numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_nvme import CpuBackend, open_tier, store
tier = open_tier(sys.argv[1], CpuBackend())
for seed in range(10):
    slots, _ = store(tier, 4, seed=seed)
    tier.flush()
    print(seed, flush=True)
    tier.free(0, slots[:1])
"""


def test_after_kill_minus_nine_every_listed_block_is_whole(tmp_path, backend):
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "s"), here], stdout=subprocess.PIPE)
    for _ in range(5):
        assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    tier = open_tier(tmp_path / "s", backend)
    slots, _ = tier.recovered()[0]
    ok, _ = load(tier, slots)
    assert len(slots) >= 15 and ok.all()
    tier.close()


def unclosed_copy(path: Path) -> Path:
    """The store as a process that is killed now would leave it."""
    copy = path.with_name(f"{path.name}+")
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*.sock"))
    return copy


class Rebooted(SystemCalls):
    """The machine was started again since."""

    def boot_id(self) -> str:
        return "another boot"


class Unknown(SystemCalls):
    """No way to tell whether it was."""

    def boot_id(self) -> str:
        return ""


def open_slowly(path: Path, backend: CpuBackend, durability: str = "batch") -> NvmeTier:
    """Nothing is committed that nobody asks for."""
    tier = open_tier(path, backend, durability=durability)
    if tier._committer is not None:
        tier._committer.close()
        tier._committer = None
    return tier


@pytest.mark.parametrize("calls", [Rebooted(), Unknown()])
def test_what_was_never_synced_is_not_listed_after_the_machine_stopped(tmp_path, backend, calls):
    """A power loss may have kept the journal and taken the bytes: a session must not be parked on them."""
    tier = open_slowly(tmp_path / "s", backend)
    kept, _ = store(tier, 3)
    tier.flush()
    store(tier, 2, seed=1)
    again = open_tier(unclosed_copy(tmp_path / "s"), backend, calls=calls)
    assert again.recovered()[0][0].tolist() == kept.tolist()
    assert again.status()["doubtful_blocks"] == 2 and again.free_slots(0) == again.num_slots(0) - 3
    again.close()
    tier.close()
    whole = open_tier(tmp_path / "s", backend)
    assert len(whole.recovered()[0][0]) == 5 and whole.status()["doubtful_blocks"] == 0
    whole.close()


def test_who_is_killed_loses_nothing_and_a_power_loss_after_that_still_counts(tmp_path, backend):
    tier = open_slowly(tmp_path / "s", backend)
    store(tier, 3)
    copy = unclosed_copy(tmp_path / "s")
    tier.close()
    killed = open_slowly(copy, backend)
    assert len(killed.recovered()[0][0]) == 3 and killed.status()["doubtful_blocks"] == 0
    killed.flush()  # settles what the one before left
    store(killed, 2, seed=1)
    again = open_tier(unclosed_copy(copy), backend, calls=Rebooted())
    assert len(again.recovered()[0][0]) == 3 and again.status()["doubtful_blocks"] == 2
    again.close()
    killed.close()


def test_what_is_written_while_a_commit_runs_waits_for_the_next(tmp_path, backend):
    tier = open_slowly(tmp_path / "s", backend)
    first, _ = store(tier, 3)
    sync, more = tier._files.sync, []

    def sync_slowly(segment):
        sync(segment)
        if not more:
            more.append(store(tier, 2, seed=1)[0])

    tier._files.sync = sync_slowly
    tier.flush()
    again = open_tier(unclosed_copy(tmp_path / "s"), backend, calls=Rebooted())
    assert again.recovered()[0][0].tolist() == first.tolist()
    again.close()
    tier.close()


def test_without_durability_a_crash_leaves_what_is_listed_and_closing_makes_it_last(tmp_path, backend):
    tier = open_slowly(tmp_path / "s", backend, "none")
    store(tier, 3)
    copy = unclosed_copy(tmp_path / "s")
    tier.close()
    crashed = open_tier(copy, backend, durability="none", calls=Rebooted())
    assert len(crashed.recovered()[0][0]) == 3
    crashed.close()
    for path in (copy, tmp_path / "s"):
        tier = open_tier(path, backend, calls=Rebooted())  # batch: believes only what was synced
        assert len(tier.recovered()[0][0]) == 3
        tier.close()


def test_a_block_that_was_moved_stays_listed_after_a_crash(tmp_path, backend):
    tier = open_slowly(tmp_path / "s", backend)
    slots, _ = store(tier, 3)
    tier.flush()
    targets = tier.allocate(0, 3)
    ticket = tier.relocate(0, slots, targets)
    assert ticket.event.wait(60) and ticket.ok.all()
    tier.free(0, slots)
    again = open_tier(unclosed_copy(tmp_path / "s"), backend, calls=Rebooted())
    assert again.recovered()[0][0].tolist() == targets.tolist() and load(again, targets)[0].all()
    again.close()
    tier.close()


def test_segments_are_as_large_as_asked_for(tmp_path, backend):
    for size in (1 << 20, 4 << 20):
        tier = NvmeTier.open(
            tmp_path / str(size),
            StoreIdentity("m", (LAYOUT,)),
            num_slots=[100_000],
            backend=backend,
            segment_bytes=size,
        )
        assert 0.9 * size < tier.geometry(0).segment_bytes <= size + tier.geometry(0).header_bytes
        tier.close()


def test_keys_are_told_by_slot_and_nothing_where_nothing_is_listed(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots, _ = store(tier, 5)
    tier.free(0, slots[1:2])
    keys = tier.keys_at(0, np.array([slots[0], slots[1], slots[2], -1, 10**6]))
    assert keys == [
        tier.stamps(0, slots[:1])["key"][0].tobytes(),
        b"",
        tier.stamps(0, slots[2:3])["key"][0].tobytes(),
        b"",
        b"",
    ]
    tier.close()
