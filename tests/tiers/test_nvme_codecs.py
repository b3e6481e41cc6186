"""Stores whose arrays have codecs: what is written comes back, stock readers see the same, damage is a miss, disk is saved."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from kvtier.tiers.errors import ConfigError, StoreMismatchError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme import codecs, maintenance
from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tiers.nvme.status import read_store_status
from kvtier.tiers.nvme.store import NvmeTier, StoreIdentity

from .test_nvme import stamps

FULL = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=64, dtype="bfloat16")  # 128 KiB
WINDOW = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_size=64, dtype="float32", window=128, name="window")
LARGE = KVLayout(num_layers=8, num_kv_heads=2, head_dim=128, block_size=64, dtype="bfloat16", name="large")  # O_DIRECT
MLA = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=4, dtype="float16", value_dim=8, name="mla")
IDENTITY = StoreIdentity("model", (FULL, WINDOW, LARGE, MLA))
NUM_SLOTS = [70, 20, 40, 20]
ENCODING = ["lz4", "zstd", "split"]
MIXED = ["zstd", "none", "split", "lz4"]


def open_tier(path, backend, codec=None, **options) -> NvmeTier:
    names = [codec] * len(NUM_SLOTS) if isinstance(codec, str) else codec
    return NvmeTier.open(path, IDENTITY, num_slots=NUM_SLOTS, backend=backend, codecs=names, **options)


def blocks(layout: KVLayout, n: int, seed: int = 0, *, noise: bool = False) -> np.ndarray:
    """Gaussian numbers of the layout's dtype with loud channels, or bytes that no codec makes smaller."""
    random = np.random.default_rng(seed)
    if noise:
        return random.integers(0, 256, (n, layout.block_bytes), np.uint8)
    values = random.standard_normal((n, layout.block_bytes // layout.itemsize)).astype(np.float32)
    values[:, :: layout.head_dim] *= 30
    if layout.dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(layout.dtype).view(np.uint8)


def store(tier, n, group=0, seed=0, *, noise=False):
    rows, slots = blocks(IDENTITY.layouts[group], n, seed, noise=noise), tier.allocate(group, n)
    write(tier, group, slots, rows, seed)
    return slots, rows


def write(tier, group, slots, rows, seed=0):
    ticket = tier.write(group, slots, rows, np.arange(len(slots)), stamps(len(slots), seed, tokens=64))
    assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.all()


def load(tier, slots, group=0):
    target = np.zeros((len(slots), IDENTITY.layouts[group].block_bytes), np.uint8)
    ticket = tier.read(group, slots, target, np.arange(len(slots)), tier.stamps(group, slots))
    assert ticket.event.wait(60) and ticket.event.error is None
    return ticket.ok, target


def load_layer(tier, slots, layer, group=0):
    target = np.zeros((len(slots), IDENTITY.layouts[group].layer_bytes), np.uint8)
    ticket = tier.read_layer(group, slots, layer, target, np.arange(len(slots)), tier.stamps(group, slots))
    assert ticket.event.wait(60) and ticket.event.error is None
    return ticket.ok, target


def segments(path, group=0):
    return sorted((path / "blocks.zarr" / f"g{group}").glob("c.*"))


def disk_bytes(path, group=0) -> int:
    for file in segments(path, group):  # what the page cache holds back has no blocks yet
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return sum(file.stat().st_blocks * 512 for file in segments(path, group))


@pytest.mark.parametrize("noise", [False, True], ids=["kv", "noise"])
@pytest.mark.parametrize("codec", ENCODING)
def test_reads_back_what_was_written_also_after_a_restart(tmp_path, backend, codec, noise):
    tier = open_tier(tmp_path / "s", backend, codec)
    written = [store(tier, 9, group, seed=group, noise=noise) for group in range(4)]
    for _ in range(2):
        for group, (slots, rows) in enumerate(written):
            ok, seen = load(tier, slots, group)
            assert ok.all() and np.array_equal(seen, rows)
            size = IDENTITY.layouts[group].layer_bytes
            ok, seen = load_layer(tier, slots, 1, group)
            assert ok.all() and np.array_equal(seen, rows[:, size : 2 * size])
        tier.close()
        tier = open_tier(tmp_path / "s", backend)
        assert tier.codecs == [codec] * 4
    tier.close()


_READER = """
import sys, json, numpy as np, zarr
group = zarr.open_group(sys.argv[1], mode="r")
for name, array in group.arrays():
    for slot in range(array.shape[0]):
        block = np.asarray(array[slot])
        if block.any():
            np.save(f"{sys.argv[2]}/{name}.{slot}.npy", block.reshape(-1).view(np.uint8))
print(json.dumps(sorted(m for m in sys.modules if m.startswith("kvtier."))))
"""


@pytest.mark.parametrize("codec", ["none", *ENCODING, MIXED], ids=["none", *ENCODING, "mixed"])
def test_stock_zarr_reads_every_array_without_importing_kvtier(tmp_path, backend, codec):
    """But for the entry point of kvtier.split, which zarr itself loads."""
    tier = open_tier(tmp_path / "s", backend, codec)
    written = [store(tier, 6, group, seed=group, noise=group == 3) for group in range(4)]
    tier.free(0, written[0][0][2:3])
    tier.close()
    (tmp_path / "seen").mkdir()
    command = [sys.executable, "-c", _READER, tmp_path / "s" / "blocks.zarr", tmp_path / "seen"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    expected = [f"kvtier.{m}" for m in ("tiers", "tiers.nvme", "tiers.nvme.split", "tiers.nvme.zarr_split")]
    assert json.loads(done.stdout) == (expected if "split" in codec else [])
    seen = {file.name: np.load(file) for file in (tmp_path / "seen").iterdir()}
    assert len(seen) == 4 * 6 - 1
    for group, (slots, rows) in enumerate(written):
        for slot, row in zip(slots.tolist(), rows):
            if (group, slot) != (0, 2):
                assert np.array_equal(seen[f"g{group}.{slot}.npy"], row)


def test_metadata_names_each_arrays_codec(tmp_path, backend):
    open_tier(tmp_path / "s", backend, MIXED).close()
    described = []
    for group, codec in enumerate(MIXED):
        array = json.loads((tmp_path / "s" / "blocks.zarr" / f"g{group}" / "zarr.json").read_text())
        assert array["attributes"]["kvtier"]["codec"] == codec
        (sharding,) = array["codecs"]
        described.append([part["name"] for part in sharding["configuration"]["codecs"]])
    assert described == [
        ["bytes", "blosc", "crc32c"],
        ["bytes", "crc32c"],
        ["bytes", "kvtier.split", "crc32c"],
        ["bytes", "blosc", "crc32c"],
    ]
    blosc = json.loads((tmp_path / "s" / "blocks.zarr" / "g0" / "zarr.json").read_text())["codecs"][0]["configuration"]
    assert blosc["codecs"][1]["configuration"] == {
        "typesize": 2,
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "bitshuffle",
        "blocksize": 1 << 20,
    }
    stored = json.loads((tmp_path / "s" / "store.json").read_text())
    assert [array["codec"] for array in stored["arrays"]] == MIXED
    status = read_store_status(tmp_path / "s")
    assert [group["codec"] for group in status["groups"]] == MIXED


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_tensorstore_reads_blosc_arrays(tmp_path, backend, codec):
    ts = pytest.importorskip("tensorstore")
    tier = open_tier(tmp_path / "s", backend, codec)
    slots, rows = store(tier, 4)
    noisy, noise = store(tier, 2, seed=1, noise=True)
    tier.close()
    path = str(tmp_path / "s" / "blocks.zarr" / "g0")
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}, read=True).result()
    for slot, row in zip([*slots, *noisy], [*rows, *noise]):
        assert np.asarray(array[int(slot)].read().result()).tobytes() == row.tobytes()


@pytest.mark.parametrize("codec", ENCODING)
def test_compressed_blocks_take_less_disk_and_give_back_what_they_leave(tmp_path, backend, codec):
    plain = open_tier(tmp_path / "plain", backend)
    tier = open_tier(tmp_path / "s", backend, codec)
    for each in (plain, tier):
        slots, _ = store(each, 32, group=2)
    whole, small = disk_bytes(tmp_path / "plain", 2), disk_bytes(tmp_path / "s", 2)
    payload = 32 * LARGE.block_bytes
    assert whole > payload and small < 0.85 * payload
    assert all(file.stat().st_size > 3 * LARGE.block_bytes / 2 for file in segments(tmp_path / "s", 2))
    status = tier.status()
    assert (
        status["stored_bytes"][2] == status["bytes_written"] and abs(small - status["stored_bytes"][2]) < 0.05 * small
    )
    write(tier, 2, slots, blocks(LARGE, 32, noise=True))  # they grow where they are
    assert disk_bytes(tmp_path / "s", 2) > payload
    write(tier, 2, slots, blocks(LARGE, 32))  # and shrink again
    assert tier._writer.wait(60)
    leaves = 4096 * len(segments(tmp_path / "s", 2))  # of a file's own list of pieces, which it keeps
    assert small <= disk_bytes(tmp_path / "s", 2) <= small + leaves
    assert load(tier, slots, 2)[0].all()
    plain.close()
    tier.close()


def test_incompressible_blocks_fit_their_slots(tmp_path, backend):
    """Each codec stores what it cannot shrink as it is, a header larger."""
    for codec in ENCODING:
        tier = open_tier(tmp_path / codec, backend, codec)
        slots, rows = store(tier, NUM_SLOTS[0], noise=True)
        geometry = tier.geometry(0)
        stored = tier.stamps(0, slots)["stored_bytes"]
        assert (stored <= geometry.most_stored_bytes).all() and (stored > FULL.block_bytes).all()
        assert (geometry.footprint(stored) <= geometry.stride).all()
        ok, seen = load(tier, slots)
        assert ok.all() and np.array_equal(seen, rows)
        tier.close()


@pytest.mark.parametrize("codec", ENCODING)
def test_every_flipped_bit_of_a_chunk_or_trailer_is_a_miss(tmp_path, backend, codec):
    tier = open_tier(tmp_path / "s", backend, codec)
    slots, _ = store(tier, 4)
    tier.flush()
    geometry, random = tier.geometry(0), np.random.default_rng(0)
    stored = tier.stamps(0, slots)["stored_bytes"].tolist()
    ends = [geometry.proof_bytes - 4 + n for n in stored]  # of the trailer
    for turn in range(120):
        slot = turn % 4
        at = int(random.integers(ends[slot])) if turn > 20 else [0, 4, 12, ends[slot] - 1, stored[slot] - 1][turn % 5]
        number, offset = geometry.place(int(slots[slot]))
        with open(segments(tmp_path / "s")[number], "r+b") as file:
            file.seek(offset + at)
            (byte,) = file.read(1)
            file.seek(offset + at)
            file.write(bytes([byte ^ 1 << int(random.integers(8))]))
            file.flush()
            assert load(tier, slots)[0].tolist() == [i != slot for i in range(4)], at
            assert not load_layer(tier, slots[slot : slot + 1], 1)[0][0]
            file.seek(offset + at)
            file.write(bytes([byte]))
    assert load(tier, slots)[0].all()
    tier.close()


@pytest.mark.parametrize("codec", ENCODING)
def test_another_blocks_chunk_is_not_served(tmp_path, backend, codec):
    """A whole, self-consistent block of another key or generation in the right place."""
    tier = open_tier(tmp_path / "s", backend, codec)
    slots, rows = store(tier, 4)
    tier.flush()
    geometry = tier.geometry(0)
    _, first = geometry.place(int(slots[0]))
    with open(segments(tmp_path / "s")[0], "r+b") as file:
        file.seek(first + geometry.stride)
        other = file.read(geometry.stride)
        file.seek(first)
        file.write(other)
    assert load(tier, slots)[0].tolist() == [False, True, True, True]
    old = tier.stamps(0, slots).copy()
    write(tier, 0, slots, rows)  # the same blocks, of another generation
    ticket = tier.read(0, slots, np.zeros_like(rows), np.arange(4), old)
    assert ticket.event.wait(60) and not ticket.ok.any()
    tier.close()


@pytest.mark.parametrize("wrong", [0, 3, 4, 1 << 40, 2**64 - 1])
def test_a_size_that_cannot_be_is_a_miss(tmp_path, backend, wrong):
    tier = open_tier(tmp_path / "s", backend, "zstd")
    slots, rows = store(tier, 2)
    said = tier.stamps(0, slots).copy()
    said["stored_bytes"][0] = wrong
    ticket = tier.read(0, slots, np.zeros_like(rows), np.arange(2), said)
    assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.tolist() == [False, True]
    tier.close()


def test_bytes_that_decode_to_another_block_are_a_miss(tmp_path, backend, monkeypatch):
    """A decoder that is wrong without saying so: what comes out is proven by the layer sums."""
    tier = open_tier(tmp_path / "s", backend, "lz4")
    slots, _ = store(tier, 2)
    right = codecs.BloscCodec.decode

    def wrong(self, encoded, row):
        right(self, encoded, row)
        row[5] ^= 1

    monkeypatch.setattr(codecs.BloscCodec, "decode", wrong)
    assert not load(tier, slots)[0].any()
    assert not load_layer(tier, slots, 0)[0].any() and load_layer(tier, slots, 1)[0].all()
    tier.close()


def test_a_store_keeps_its_codec_and_says_so(tmp_path, backend, caplog):
    tier = open_tier(tmp_path / "s", backend, "zstd")
    slots, rows = store(tier, 3)
    tier.close()
    with caplog.at_level(logging.WARNING, "kvtier"):
        tier = open_tier(tmp_path / "s", backend, ["zstd", "none", "zstd", "zstd"])
    assert tier.codecs == ["zstd"] * 4
    (said,) = caplog.messages
    assert "array g1 was made with codec='zstd'" in said and "export --codec none" in said
    ok, seen = load(tier, slots)
    assert ok.all() and np.array_equal(seen, rows)
    tier.close()


def test_what_cannot_be_is_refused_and_nothing_made(tmp_path, backend):
    for names, said in (
        (["zstd"], "4 layer groups need one each"),
        (["gzip"] * 4, "codec='gzip' is unknown; choose none"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_tier(tmp_path / "s", backend, names)
    assert not (tmp_path / "s").exists()
    open_tier(tmp_path / "s", backend, "zstd").close()
    file = tmp_path / "s" / "store.json"
    file.write_text(file.read_text().replace('"format": 4', '"format": 3'))
    with pytest.raises(StoreMismatchError, match="format=3"):
        open_tier(tmp_path / "s", backend)
    with pytest.raises(StoreMismatchError, match="format=3"):
        read_store_status(tmp_path / "s")


def test_relocated_blocks_keep_their_codec_and_are_counted_as_they_are(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend, "zstd")
    slots, rows = store(tier, 8)
    targets = tier.allocate(0, 3)
    before = tier.status()["bytes_written"]
    ticket = tier.relocate(0, slots[1:4], targets)
    assert ticket.event.wait(60) and ticket.ok.all()
    assert tier.moved_bytes == tier.status()["bytes_written"] - before < 3 * tier.geometry(0).stride
    tier.free(0, slots[1:4])
    now = np.concatenate([slots[:1], targets, slots[4:]])
    ok, seen = load(tier, now)
    assert ok.all() and np.array_equal(seen, rows)
    tier.close()


class NoHoles(SystemCalls):
    """A file system that cannot punch holes."""

    def punch(self, fd, offset, size):
        raise OSError(errno.EOPNOTSUPP, "injected")

    def next_byte(self, fd, offset):
        return offset


def test_a_file_system_without_holes_only_costs_disk(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend, "zstd", calls=NoHoles())
    slots, _ = store(tier, 8, noise=True)
    rows = blocks(FULL, 8, seed=3)
    write(tier, 0, slots, rows)
    ok, seen = load(tier, slots)
    assert ok.all() and np.array_equal(seen, rows)
    tier.close()


def test_repair_writes_the_metadata_of_every_codec_anew(tmp_path, backend):
    path = tmp_path / "s"
    tier = open_tier(path, backend, MIXED)
    written = [store(tier, 3, group, seed=group) for group in range(4)]
    tier.close()
    files = sorted((path / "blocks.zarr").rglob("zarr.json"))
    codecs_before = [json.loads(file.read_text()).get("codecs") for file in files]
    for file in files:
        file.write_text(file.read_text().replace("crc32c", "crc32d").replace("kvtier", "kvtear"))
    with pytest.raises(ConfigError, match="store repair"):
        open_tier(path, backend)
    report = maintenance.check(path, lambda done, total: None, repair=True)
    assert (report.repaired_metadata, report.blocks, report.bad_blocks) == (1, 12, 0)
    assert [json.loads(file.read_text()).get("codecs") for file in files] == codecs_before
    tier = open_tier(path, backend)
    for group, (slots, rows) in enumerate(written):
        ok, seen = load(tier, slots, group)
        assert ok.all() and np.array_equal(seen, rows)
    tier.close()


_GROWER = """
import sys, importlib.metadata as metadata
every = metadata.entry_points
def entry_points(**chosen):
    found = every(**chosen)
    found = [e for part in found.values() for e in part] if isinstance(found, dict) else found  # before Python 3.12
    return metadata.EntryPoints(e for e in found if not e.name.startswith("kvtier."))
metadata.entry_points = entry_points
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.nvme.maintenance import stored_identity
from kvtier.tiers.nvme.store import NvmeTier
from pathlib import Path
path = Path(sys.argv[1])
NvmeTier.open(path, stored_identity(path), num_slots=[500] * 4, backend=CpuBackend()).close()
assert not [e for e in entry_points(group="zarr.codecs")] and "zarr" not in sys.modules
from kvtier.tiers.nvme import zarr_split
import zarr
print(zarr.open_array(path / "blocks.zarr" / "g0", mode="r").shape[0])
"""


def test_a_store_grows_where_the_entry_point_is_not_installed(tmp_path, backend):
    open_tier(tmp_path / "s", backend, "split").close()
    done = subprocess.run([sys.executable, "-c", _GROWER, tmp_path / "s"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0 and int(done.stdout) >= 500, done.stderr


def test_importing_the_store_loads_no_codec():
    code = "import sys, kvtier.tiers.nvme.store; print({'zarr', 'numcodecs'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "set()"
