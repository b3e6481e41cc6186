"""Stores whose arrays are in a format: one rounding and never a second, stock readers, damage, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tiers.formats import block_formats
from kvtier.tiers.host import HostMemory
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme import maintenance
from kvtier.tiers.nvme.frames import HEADER_BYTES, PagesCodec
from kvtier.tiers.nvme.store import NvmeTier, StoreIdentity
from kvtier.tiers.packed_slab import PackedSlab

from .test_nvme import stamps
from .test_nvme_codecs import segments

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=64, dtype="float32")  # 256 KiB
IDENTITY = StoreIdentity("model", (LAYOUT,))
TAIL = 5  # tokens of a block that is none yet
HACK2_STEP, INT4_STEP, INT8_STEP = 3.0, 0.5, 0.05  # of what standard_normal draws


def open_tier(path, backend, codec: str | None = "int4", slots: int = 48) -> NvmeTier:
    codecs = None if codec is None else [codec]
    return NvmeTier.open(path, IDENTITY, num_slots=[slots], backend=backend, codecs=codecs)


def blocks(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, LAYOUT.block_bytes // 4)).astype(np.float32)
    return values.view(np.uint8)


def put(tier, source, rows, tokens: int = LAYOUT.block_size, seed: int = 0) -> np.ndarray:
    slots = tier.allocate(0, len(rows))
    ticket = tier.write(0, slots, source, rows, stamps(len(rows), seed, tokens=tokens))
    assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.all()
    return slots


def get(tier, slots, target=None, rows=None):
    target = np.zeros((len(slots), LAYOUT.block_bytes), np.uint8) if target is None else target
    rows = np.arange(len(slots)) if rows is None else rows
    ticket = tier.read(0, slots, target, rows, tier.stamps(0, slots))
    assert ticket.event.wait(60) and ticket.event.error is None
    return ticket.ok, target


def frames(tier, slots) -> list[bytes]:
    rows = tier.spare_rows(0, len(slots))
    ok, _ = get(tier, slots, rows)
    assert ok.all()
    return [row.frame.tobytes() for row in rows]


def distance(a, b) -> float:
    return float(np.abs(a.view(np.float32) - b.view(np.float32)).max())


def test_whole_blocks_come_back_near_tails_come_back_exactly_and_both_by_layers(tmp_path, backend):
    tier, rows = open_tier(tmp_path / "s", backend), blocks(4)
    whole = put(tier, rows[:3], np.arange(3))
    tail = put(tier, rows[3:], np.arange(1), tokens=TAIL, seed=1)
    for _ in range(2):
        ok, seen = get(tier, whole)
        assert ok.all() and 0 < distance(seen, rows[:3]) < INT4_STEP
        ok, exact = get(tier, tail)
        assert ok.all() and np.array_equal(exact, rows[3:])
        for layer in range(LAYOUT.num_layers):
            part = np.zeros((4, LAYOUT.layer_bytes), np.uint8)
            slots, both = np.concatenate([whole, tail]), np.concatenate([seen, exact])
            ticket = tier.read_layer(0, slots, layer, part, np.arange(4), tier.stamps(0, slots))
            assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.all()
            assert np.array_equal(part, both[:, layer * LAYOUT.layer_bytes : (layer + 1) * LAYOUT.layer_bytes])
        tier.close()
        tier = open_tier(tmp_path / "s", backend, None)
        assert tier.codecs == ["int4/64"] and tier.format(0).text == "int4/64"
    tier.close()


def test_disk_is_saved_and_counted_as_packed(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, blocks(16), np.arange(16))
    tier.flush()
    taken = sum(os.stat(file).st_blocks * 512 for file in segments(tmp_path / "s"))
    headers = len(segments(tmp_path / "s")) * tier.geometry(0).header_bytes
    assert tier.stored_bytes(0) == 16 * tier.usual_bytes(0) and taken <= tier.stored_bytes(0) + headers + 4096
    assert 16 * LAYOUT.block_bytes / tier.stored_bytes(0) > 6  # float32 to int4
    tier.close()


@pytest.mark.parametrize(("host", "codec"), [("hack2", "hack2"), ("int8", "int4")])
def test_what_the_host_tier_has_in_this_format_goes_over_byte_for_byte(tmp_path, backend, host, codec):
    """hack2 rotates keys before rounding: a second rounding would show."""
    tier, pool, is_same = open_tier(tmp_path / "s", backend, codec), blocks(3), host == codec
    slab = PackedSlab(block_formats(host, [LAYOUT], name="host")[0], 12, HostMemory(backend), backend)
    slots = np.array([0, 2, 5])
    slab.put(backend.demote, slots, pool, np.arange(3))
    assert backend.demote.synchronize(60)
    on_disk = put(tier, slab.blocks(slots), slots)
    if is_same:
        assert [f[HEADER_BYTES:] for f in frames(tier, on_disk)] == [slab.rows[slot].tobytes() for slot in slots]
    before, back = slab.read(slots), np.array([1, 3, 4])
    ok, _ = get(tier, on_disk, slab.blocks(back), back)
    after = slab.read(back)
    assert ok.all() and distance(pool, after) < (HACK2_STEP if is_same else INT4_STEP + INT8_STEP)
    assert np.array_equal(before, after) == is_same
    _, exact = get(tier, on_disk)  # what the host tier now holds are the disk's values, in its own format
    assert distance(exact, after) < (1e-9 if is_same else INT8_STEP)
    tier.close()


def test_linked_slots_go_down_and_come_up_exactly(tmp_path, backend):
    tier, pool = open_tier(tmp_path / "s", backend), blocks(1)
    slab = PackedSlab(block_formats("int8", [LAYOUT], name="host")[0], 16, HostMemory(backend), backend)
    for slot in (0, 8):
        slab.link(np.array([slot]), np.arange(slot + 1, slot + slab.width)[None])
    slab.put(backend.demote, np.array([0]), pool, np.array([0]))
    assert backend.demote.synchronize(60)
    on_disk = put(tier, slab.blocks(np.array([0])), np.array([0]), tokens=TAIL)
    ok, _ = get(tier, on_disk, slab.blocks(np.array([8])), np.array([8]))
    assert ok.all() and np.array_equal(slab.read(np.array([8])), pool)
    tier.close()


def test_what_moves_within_the_store_or_to_another_is_not_rounded_again(tmp_path, backend):
    """Fails where frames are decoded and encoded on their way."""
    tier = open_tier(tmp_path / "s", backend, "hack2")
    slots = put(tier, blocks(6), np.arange(6))
    before, keys = frames(tier, slots), tier.stamps(0, slots)["key"].tolist()
    for _ in range(3):
        targets = tier.allocate(0, 6)
        ticket = tier.relocate(0, slots, targets)
        assert ticket.event.wait(60) and ticket.event.error is None and ticket.ok.all()
        tier.free(0, slots)
        slots = targets
    assert frames(tier, slots) == before
    tier.close()
    report = maintenance.copy(tmp_path / "s", tmp_path / "t", lambda done, total: None)
    assert report.copied_blocks == 6 and maintenance.check(tmp_path / "t", lambda done, total: None).bad_blocks == 0
    other = open_tier(tmp_path / "t", backend, None)
    there, listed = other.recovered()[0]
    assert dict(zip(listed["key"].tolist(), frames(other, there), strict=True)) == dict(zip(keys, before, strict=True))
    other.close()


def test_moving_a_block_that_cannot_be_read_moves_the_others(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots = put(tier, blocks(3), np.arange(3))
    damage(tmp_path / "s", tier, int(slots[1]), 1000)
    ticket = tier.relocate(0, slots, tier.allocate(0, 3))
    assert ticket.event.wait(60) and ticket.event.error is None
    assert ticket.ok.tolist() == [True, False, True] and ticket.unreadable.tolist() == [False, True, False]
    tier.close()


@pytest.mark.parametrize("at", [0, 6, HEADER_BYTES + 5, 20_000, -1])
def test_a_flipped_bit_of_a_frame_is_a_miss(tmp_path, backend, at):
    tier = open_tier(tmp_path / "s", backend)
    slots = put(tier, blocks(2), np.arange(2))
    stored = int(tier.stamps(0, slots)["stored_bytes"][0])
    damage(tmp_path / "s", tier, int(slots[0]), at % stored)
    assert get(tier, slots)[0].tolist() == [False, True]
    tier.close()


def test_a_flipped_bit_of_one_layer_spoils_that_layer_alone_where_layers_are_read(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    slots = put(tier, blocks(1), np.arange(1))
    damage(tmp_path / "s", tier, int(slots[0]), HEADER_BYTES + tier.format(0).starts[2] + 9)
    good = []
    for layer in range(LAYOUT.num_layers):
        target = np.zeros((1, LAYOUT.layer_bytes), np.uint8)
        ticket = tier.read_layer(0, slots, layer, target, np.arange(1), tier.stamps(0, slots))
        assert ticket.event.wait(60) and ticket.event.error is None
        good.append(bool(ticket.ok[0]))
    assert good == [True, True, False, True]
    tier.close()


def test_values_that_the_format_cannot_hold_are_kept_as_they_are(tmp_path, backend):
    tier, rows = open_tier(tmp_path / "s", backend), blocks(2)
    rows[0].view(np.float32)[11] = np.inf
    slots = put(tier, rows, np.arange(2))
    ok, seen = get(tier, slots)
    assert ok.all() and np.array_equal(seen[0], rows[0]) and not np.array_equal(seen[1], rows[1])
    tier.close()


@pytest.mark.parametrize("codec", ["int4; layer 0: full", "hack2", "fp8"])
def test_stock_zarr_reads_what_the_tier_reads(tmp_path, backend, codec):
    """With the entry point that pyproject.toml names, which zarr itself loads."""
    import zarr

    tier = open_tier(tmp_path / "s", backend, codec)
    slots = np.concatenate([put(tier, blocks(3), np.arange(3)), put(tier, blocks(1, 9), np.arange(1), TAIL, seed=1)])
    seen = get(tier, slots)[1]
    tier.close()
    array = zarr.open_array(tmp_path / "s" / "blocks.zarr" / "g0", mode="r")
    for slot, row in zip(slots, seen, strict=True):
        assert np.array_equal(np.asarray(array[slot]).reshape(-1).view(np.uint8), row)
    codecs = json.loads((tmp_path / "s" / "blocks.zarr" / "g0" / "zarr.json").read_text())["codecs"][0]
    assert [c["name"] for c in codecs["configuration"]["codecs"]] == ["bytes", "kvtier.pages", "crc32c"]


def test_rounded_blocks_are_not_copied_as_if_they_were_exact(tmp_path, backend):
    tier = open_tier(tmp_path / "s", backend)
    put(tier, blocks(1), np.arange(1))
    tier.close()
    for codec in ("none", "int8"):
        with pytest.raises(ConfigError, match="cannot be had as"):
            maintenance.copy(tmp_path / "s", tmp_path / codec, lambda done, total: None, codec=codec)


def test_exact_blocks_are_rounded_once_where_a_copy_shall_be_smaller(tmp_path, backend):
    tier, rows = open_tier(tmp_path / "s", backend, "none"), blocks(2)
    put(tier, rows, np.arange(2))
    tier.close()
    maintenance.copy(tmp_path / "s", tmp_path / "t", lambda done, total: None, codec="int4")
    other = open_tier(tmp_path / "t", backend, None)
    slots, listed = other.recovered()[0]
    order = np.argsort(slots)
    codec, (ok, seen) = PagesCodec(LAYOUT, "int4"), get(other, slots[order])
    assert ok.all() and min(distance(row, seen[0]) for row in rows) < INT4_STEP
    assert {f for f in frames(other, slots)} == {codec.encode(row) for row in rows} and len(listed) == 2
    other.close()


def damage(path, tier, slot: int, at: int) -> None:
    segment, offset = tier.geometry(0).place(slot)
    (file,) = (path / "blocks.zarr" / "g0").glob(f"c.{segment}.*")
    with open(file, "r+b") as handle:
        handle.seek(offset + at)
        byte = handle.read(1)[0]
        handle.seek(offset + at)
        handle.write(bytes([byte ^ 4]))
