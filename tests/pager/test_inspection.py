"""What a pager remembers for inspectors: the ring of decisions, reuse distances, recordings, the snapshot page, history."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest

from kvtier.pager.directory import Directory
from kvtier.pager.inspection import history, publisher, service, snapshot
from kvtier.pager.inspection.doctor import findings
from kvtier.pager.inspection.events import KIND, NUM_BLOCKS, EventRing, tag_of, tags_of
from kvtier.pager.inspection.inspector import Inspector
from kvtier.pager.inspection.recorder import LEASE_S, Recorder
from kvtier.pager.inspection.reuse import ReuseSampler
from kvtier.pager.inspection.service import Snapshots
from kvtier.pager.inspection.views import session_row
from kvtier.pager.states import HostSlots, Pages
from kvtier.tiers.errors import ProtocolError, TierUnavailableError

from .harness import BLOCK, LAYOUT, WINDOWED, Rig


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def a_directory(num_blocks: int) -> Directory:
    directory = Directory(Pages(1), HostSlots(1))
    blocks = directory.create(np.arange(num_blocks), 7)
    directory.bind_many(blocks, [_key(i) for i in range(num_blocks)], np.full(num_blocks, 16))
    return directory


def _key(i: int) -> bytes:
    return struct.pack(">I", 0x01000000 + i) + bytes(28)


# ---------------------------------------------------------------------- the ring
def test_the_ring_keeps_the_last_and_says_where_it_begins():
    ring, directory = EventRing(Clock(), num_batches=4, num_blocks=10), a_directory(8)
    for first in range(6):
        ring.note(KIND["evicted"], 1, 0, directory, np.array([first, first + 1]), "pressure", policy="lru")
    assert ring.first_serial == 2 and [ring.row(b)["serial"] for b in ring.batches()] == [2, 3, 4, 5]
    assert [ring.blocks_of(batch)[0].tolist() for batch in ring.batches()] == [[2, 3], [3, 4], [4, 5], [5, 6]]
    assert ring.row(ring.batches()[-1]) | {"time_s": 0.0} == {
        "serial": 5,
        "time_s": 0.0,
        "what": "evicted",
        "tier": "host",
        "reason": "pressure",
        "policy": "lru",
        "group": 0,
        "blocks": 2,
        "bytes": 0,
        "seconds": 0.0,
    }


def test_a_batch_larger_than_the_ring_keeps_its_end():
    ring, directory = EventRing(Clock(), num_batches=4, num_blocks=10), a_directory(30)
    ring.note(KIND["read"], 1, 0, directory, np.arange(3), "demand")
    ring.note(KIND["read"], 1, 0, directory, np.arange(25), "demand")
    blocks, tags = ring.blocks_of(ring.batches()[-1])
    assert blocks.tolist() == list(range(15, 25)) and tags[0] == tag_of(_key(15))
    assert ring.blocks_of(ring.batches()[0])[0].tolist() == []


def test_about_finds_every_batch_of_a_block_over_the_rings_seam():
    ring, directory = EventRing(Clock(), num_batches=64, num_blocks=16), a_directory(8)
    for i in range(9):
        ring.note(KIND["promoted"], 0, i % 2, directory, np.array([i % 4, 4, 5]), f"r{i}")
    wanted = np.array([tag_of(_key(4))], np.uint32)
    found = ring.about(wanted)
    assert [ring.row(b)["reason"] for b in found.batches] == [f"r{i}" for i in range(4, 9)]
    assert [blocks.tolist() for blocks in found.blocks] == [[4]] * 5
    assert [ring.row(b)["group"] for b in ring.about(wanted, group=1).batches] == [1, 1]


def test_a_tag_outlives_the_name_of_its_block_and_not_the_block():
    directory = a_directory(3)
    directory.unbind(1)
    assert directory.tag[1] == tag_of(_key(1))
    directory.forget(np.array([1]))
    assert directory.tag[directory.create(np.array([0]), 7)] == 0
    assert tags_of([_key(5), _key(6)]).tolist() == [tag_of(_key(5)), tag_of(_key(6))]
    assert directory.bind(int(directory.create(np.array([0]), 7)[0]), _key(9), None, 16)
    assert tag_of(_key(9)) in directory.tag


@pytest.mark.parametrize("windowed", [False, True])
def test_every_way_of_a_block_is_in_the_ring(tmp_path, seed, windowed):
    """Counts of the ring agree with the counters, whatever the traffic."""

    rig = Rig(seed, pages=8, host=6, path=tmp_path / "s", layouts=[LAYOUT, WINDOWED] if windowed else None)
    rng = random.Random(seed)
    for _ in range(12):
        seq = rig.start([rng.randrange(3) for _ in range(rng.randrange(4, 30))])
        rig.prefill(seq)
        rig.pager.finish(seq)
        rig.settle()
    ring, counters = rig.pager._core.observer.events, rig.pager.counters
    told = {kind: 0 for kind in KIND}
    for batch in ring.batches():
        told[ring.row(batch)["what"]] += int(batch["count"])
    moved = {
        "promoted": "host_to_device",
        "demoted": "device_to_host",
        "read": "nvme_to_host",
        "written": "host_to_nvme",
    }
    for what, direction in moved.items():
        assert told[what] == counters.get("moved_blocks", direction=direction), what
    dropped_at_once = counters.get("evicted_blocks", reason="no_room_below")
    assert told["evicted"] == counters.get("evicted_blocks")
    assert told["demoted"] > 0 and told["computed"] > 0 and told["dropped"] >= dropped_at_once
    rig.close()


# ---------------------------------------------------------------------- reuse distances
def misses_of_lru(uses: list[int], size: int) -> float:
    """Hit rate of a real least-recently-used cache."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for block in uses:
        hits += block in held
        held[block] = None
        held.move_to_end(block)
        if len(held) > size:
            held.popitem(last=False)
    return hits / len(uses)


def skewed(rng: random.Random, n: int, blocks: int) -> list[int]:
    return [min(blocks - 1, int(rng.paretovariate(0.6)) - 1) for _ in range(n)]


def mixed(block: int) -> int:
    return (block * 2654435761 + 12345) % (1 << 32)


def use_all(sampler: ReuseSampler, uses: list[int]) -> None:
    """In requests as long as can be: a block counts once per request."""
    request: dict[int, None] = {}
    for block in uses:
        if block in request:
            sampler.used(np.array([mixed(one) for one in request], np.uint32))
            request.clear()
        request[block] = None
    sampler.used(np.array([mixed(one) for one in request], np.uint32))


def test_a_long_request_counts_as_its_blocks_one_by_one():
    """In order, backwards, and in a mixture with new ones: runs of array code against one block at a time."""
    rng, whole, single = random.Random(3), ReuseSampler(), ReuseSampler()
    for _ in range(30):
        start, length = rng.randrange(300), rng.randrange(1, 200)
        request = [mixed(block) for block in range(start, start + length)]
        if rng.random() < 0.5:
            rng.shuffle(request)
        whole.used(np.array(request, np.uint32))
        for tag in request:
            single.used(np.array([tag], np.uint32))
    assert whole.to_dict() == single.to_dict()
    assert [whole.hit_rate(1 << n) for n in range(12)] == [single.hit_rate(1 << n) for n in range(12)]


@pytest.mark.parametrize("size", [8, 64, 512])
def test_unsampled_distances_are_those_of_a_real_cache(size):
    uses = skewed(random.Random(1), 20000, 2000)
    sampler = ReuseSampler(max_sampled=1 << 20)
    use_all(sampler, uses)
    assert sampler.rate == 1.0
    rate = sampler.hit_rate(size)
    assert rate is not None and abs(rate - misses_of_lru(uses, size)) < 0.01  # sizes are powers of two: bins end there


def test_a_bounded_sample_stays_near_a_real_cache():
    uses = [block for block in skewed(random.Random(2), 80_000, 60_000)]
    sampler = ReuseSampler(max_sampled=1024)
    use_all(sampler, uses)
    facts = sampler.to_dict()
    assert facts["sample_rate"] < 1.0 and facts["sampled_blocks"] <= 1024
    for size in (4096, 16384):
        rate = sampler.hit_rate(size)
        assert rate is not None and abs(rate - misses_of_lru(uses, size)) < 0.05


def test_nothing_used_is_no_rate():
    assert ReuseSampler().hit_rate(100) is None


# ---------------------------------------------------------------------- recordings
def test_a_recording_numbers_content_and_ends_when_nobody_reads():
    clock = Clock()
    recorder = Recorder(clock)
    recorder.asked(1, 32, [_key(0), _key(1)])
    assert recorder.take(10) == []  # recording begins now
    clock.now_s += 2.0
    recorder.asked(1, 40, [_key(5), _key(6)])
    recorder.asked(2, 33, [_key(5), _key(7)])
    recorder.ended(1, 47)
    assert recorder.take(10) == [{"timestamp": 2000, "input_length": 40, "output_length": 7, "hash_ids": [0, 1]}]
    assert recorder.take(10, is_last=True) == [
        {"timestamp": 2000, "input_length": 33, "output_length": 0, "hash_ids": [0, 2]}
    ]
    recorder.take(1)
    clock.now_s += LEASE_S + 1
    recorder.asked(3, 16, [_key(9)])
    assert not recorder._open and recorder.take(1) == []


def test_a_slow_reader_is_told_what_it_lost(monkeypatch):
    monkeypatch.setattr("kvtier.pager.inspection.recorder.MAX_ROWS", 3)
    recorder = Recorder(Clock())
    recorder.take(1)
    for seq in range(5):
        recorder.asked(seq, 16, [_key(seq)])
        recorder.ended(seq, 20)
    assert recorder.num_lost == 2 and len(recorder.take(10)) == 3


# ---------------------------------------------------------------------- the page and the history
def test_a_reader_never_sees_half_a_snapshot(tmp_path):
    page = snapshot.SnapshotPage(tmp_path / "p")
    page.write({"a": [0] * 3000}, time.time())
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            page.write({"a": [n % 100] * 3000}, time.time())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            try:
                assert len(set(snapshot.read_snapshot(tmp_path / "p")["a"])) == 1
            except TierUnavailableError as error:  # never lucky in fifty tries: allowed, torn is not
                assert "no whole snapshot" in str(error)
    finally:
        stop.set()
        writer.join()
        page.close()
    with pytest.raises(TierUnavailableError, match="no snapshot page"):
        snapshot.read_snapshot(tmp_path / "p")


def test_a_writer_that_stopped_in_the_middle_is_seen(tmp_path):
    page = snapshot.SnapshotPage(tmp_path / "p")
    page.write({"a": 1}, time.time())
    page._begin()
    with pytest.raises(TierUnavailableError, match="no whole snapshot"):
        snapshot.read_snapshot(tmp_path / "p")
    page._sequence += 1
    struct.pack_into("<Q", page._map, 8, page._sequence)
    page._map[snapshot._BODY_AT] ^= 1  # the sequence is even again, the bytes are not those that were summed
    with pytest.raises(TierUnavailableError, match="no whole snapshot"):
        snapshot.read_snapshot(tmp_path / "p")
    with pytest.raises(ProtocolError, match="the page holds"):
        page.write({"a": bytes(snapshot.PAGE_BYTES)}, time.time())
    page.close()


def test_a_publisher_that_is_held_up_at_the_end_writes_to_nothing_that_is_closed(tmp_path, monkeypatch):
    begun, go, raised = threading.Event(), threading.Event(), []
    monkeypatch.setattr(publisher, "CLOSE_S", 0.05)
    monkeypatch.setattr(publisher, "row_of", lambda status, now_s: {"time_s": now_s})
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def tell() -> dict:
        begun.set()
        go.wait(60)
        return {"status": {}}

    one = publisher.Publisher(tmp_path / "s", tell)
    assert begun.wait(60)
    one.close()
    assert not snapshot.page_path(tmp_path / "s").exists()
    go.set()
    one._thread.join(60)
    assert not one._thread.is_alive() and not raised, raised


def test_a_page_knows_whether_it_is_watched(tmp_path):
    page = snapshot.SnapshotPage(tmp_path / "p")
    page.write({}, time.time())
    assert not page.is_watched(time.time())
    snapshot.read_snapshot(tmp_path / "p")
    assert not page.is_watched(time.time())
    snapshot.read_snapshot(tmp_path / "p", watch=True)
    assert page.is_watched(time.time()) and not page.is_watched(time.time() + snapshot.WATCH_S + 1)
    snapshot.stop_watching(tmp_path / "p")
    assert not page.is_watched(time.time())
    page.close()
    snapshot.stop_watching(tmp_path / "p")  # it is gone: nobody minds


def test_a_snapshot_looks_at_a_few_sessions_at_a_time_and_gets_round_to_all(monkeypatch):
    """What it costs to be watched does not grow with the sessions that there are."""
    rig, snapshots = Rig(pages=64), Snapshots()
    seqs = [rig.start([n] * 24) for n in range(5)]
    for seq in seqs:
        rig.prefill(seq)
    looks: list[str] = []
    monkeypatch.setattr(
        service, "session_row", lambda core, owner, now_s: looks.append(owner.name) or session_row(core, owner, now_s)
    )
    monkeypatch.setattr(service, "BLOCKS_PER_LOOK", 2 * service.OWNER_COST)
    counts = [snapshots.take(rig.pager._core)["num_sessions"] for _ in range(4)]
    assert counts == [2, 4, 5, 5] and len(looks) == 8 and len(set(looks)) == 5
    rig.pager.finish(seqs[0])
    told = snapshots.take(rig.pager._core)
    assert {row["name"] for row in told["sessions"]} == {f"seq:{seq}" for seq in seqs[1:]}
    rig.close()


def test_history_goes_round_and_on_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "NUM_ROWS", 5)
    file = history.HistoryFile(tmp_path / "h")
    for n in range(1, 4):
        file.write({"time_s": float(n), "miss_tokens": n * 10.0})
    file.close()
    file = history.HistoryFile(tmp_path / "h")
    for n in range(4, 8):
        file.write({"time_s": float(n), "miss_tokens": n * 10.0})
    file.close()
    rows = history.read_history(tmp_path / "h", since_s=3.5)
    assert [row["time_s"] for row in rows] == [4, 5, 6, 7] and rows[-1]["miss_tokens"] == 70
    (tmp_path / "h").write_bytes(b"something else")
    with pytest.raises(TierUnavailableError, match="not a history"):
        history.read_history(tmp_path / "h")


# ---------------------------------------------------------------------- views change nothing
def test_looking_changes_nothing(tmp_path, seed):
    rig = Rig(seed, pages=8, host=6, path=tmp_path / "s")
    seqs = [rig.start(list(range(n, n + 20))) for n in range(3)]
    for seq in seqs:
        rig.prefill(seq)
    rig.settle()
    rig.pager.park("alice", seqs[0])
    rig.settle()
    core = rig.pager._core
    before = _books(core)
    inspector = Inspector(core)
    tokens = np.arange(1, 21, dtype="<u4").tobytes()
    for body in (
        *(
            {"verb": verb}
            for verb in ("status", "sessions", "blocks", "trace", "thrash", "why", "doctor", "check", "advise")
        ),
        {"verb": "session", "session": "alice"},
        {"verb": "explain", "about": "alice"},
        {"verb": "prefix", "tokens": tokens},
    ):
        assert inspector.answer(body)["schema"] == 1
    assert _books(core) == before
    assert findings(core, quick=True) is not None and BLOCK == 4 and NUM_BLOCKS > 0
    core.check_integrity()
    rig.close()


def _books(core) -> list[bytes]:
    group = core.groups[0]
    d = group.directory
    arrays = (
        d.page,
        d.host_slot,
        d.nvme_slot,
        d.refs,
        d.used_s,
        d.tag,
        group.pages.state,
        group.pages.pins,
        group.host.state,
    )
    return [array.tobytes() for array in arrays] + [
        repr(core.counters.to_list()).encode(),
        repr(list(core.sequences)).encode(),
    ]
