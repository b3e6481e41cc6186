"""Host slots in a format: packed blocks and linked ones, to the device and back, by layers, and as a disk sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.tiers import packed_slab
from kvtier.tiers.errors import UnpackableError
from kvtier.tiers.formats import block_formats
from kvtier.tiers.host import HostMemory
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.packed_slab import PackedSlab
from kvtier.tiers.packing import pack, pack_unseen, unpack
from kvtier.tiers.simulated import SimulatedBackend

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=32, block_size=32, dtype="float32")
SIZE = LAYOUT.layer_bytes
FORMATS = ["fp8", "int8", "int4", "int2", "hack8", "hack4", "hack2", "int4; layer 1: full"]
STEP = {"fp8": 0.3, "int8": 0.05, "int4": 0.5, "int2": 2.6, "hack8": 0.05, "hack4": 0.6, "hack2": 3.0}


def fitted(text: str):
    return block_formats(text, [LAYOUT], name="host")[0]


def blocks(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((count, LAYOUT.block_bytes // 4)).astype(np.float32)
    return values.view(np.uint8)


def near(a: np.ndarray, b: np.ndarray, text: str) -> bool:
    return bool(np.abs(a.view(np.float32) - b.view(np.float32)).max() <= STEP[text.partition(";")[0]])


@pytest.fixture
def backend(seed):
    return SimulatedBackend(seed)


def slab_of(text: str, backend, slots: int = 24) -> PackedSlab:
    return PackedSlab(fitted(text), slots, HostMemory(backend), backend)


@pytest.mark.parametrize("text", FORMATS)
def test_blocks_go_down_packed_and_come_up_near_what_they_were(backend, text):
    slab, pool, back = slab_of(text, backend), blocks(6), np.zeros((6, LAYOUT.block_bytes), np.uint8)
    pages, slots = np.array([4, 1, 2]), np.array([0, 7, 3])
    slab.put(backend.demote, slots, pool, pages)
    backend.promote.wait(backend.demote.record())
    slab.get(backend.promote, back, pages, slots)
    assert backend.promote.synchronize() and near(pool[pages], back[pages], text)
    assert not back[[0, 3, 5]].any() and np.array_equal(slab.read(slots), back[pages])
    if "layer 1" in text:
        assert np.array_equal(pool[pages, SIZE : 2 * SIZE], back[pages, SIZE : 2 * SIZE])


@pytest.mark.parametrize("text", ["int8", "int4", "int2"])
def test_linked_slots_hold_a_block_exactly_beside_packed_ones(backend, text):
    slab, pool, back = slab_of(text, backend), blocks(3), np.zeros((3, LAYOUT.block_bytes), np.uint8)
    first, rest = np.array([2]), np.arange(10, 10 + slab.width - 1)
    slab.link(first, rest[None])
    pages, slots = np.arange(3), np.array([0, 2, 5])
    slab.put(backend.demote, slots, pool, pages)
    backend.promote.wait(backend.demote.record())
    slab.get(backend.promote, back, pages, slots)
    backend.promote.synchronize()
    assert np.array_equal(back[1], pool[1]) and near(pool, back, text) and not np.array_equal(back[0], pool[0])
    assert slab.held_bytes(slots) == LAYOUT.block_bytes + 2 * slab.fmt.block_bytes
    assert np.array_equal(slab.unlink(slots), rest) and not slab.is_whole(slots).any()


@pytest.mark.parametrize("text", ["int8", "int4; layer 1: full"])
def test_one_layer_is_that_layer_of_the_block(backend, text):
    slab, pool = slab_of(text, backend), blocks(2)
    slots = np.array([4, 6])
    slab.link(slots[1:], np.arange(12, 12 + slab.width - 1)[None])
    slab.put(backend.demote, slots, pool, np.arange(2))
    backend.demote.synchronize()
    whole, target = slab.read(slots), np.zeros((5, SIZE), np.uint8)
    for layer in range(LAYOUT.num_layers):
        slab.get_layer(backend.promote, layer, target, np.array([3, 1]), slots)
        backend.promote.synchronize()
        assert np.array_equal(target[[3, 1]], whole[:, layer * SIZE : (layer + 1) * SIZE])


class TensorBackend(SimulatedBackend):
    """A device whose memory is torch's, as a GPU's: blocks pass through a buffer there. Streams run at once."""

    def alloc_device(self, rows, row_bytes):
        return torch.zeros((rows, row_bytes), dtype=torch.uint8)


class AtOnce:
    """A stream of that backend: work in order of submission, which is all that the buffer may rely on."""

    name = "demote"

    def run(self, fn):
        fn()

    def copy_rows(self, target, target_rows, source, source_rows):
        target, source = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (target, source))
        target[torch.from_numpy(target_rows)] = source[torch.from_numpy(source_rows)]


def test_on_a_device_with_memory_of_its_own_blocks_pass_through_a_small_buffer_in_parts(monkeypatch):
    backend, stream = TensorBackend(), AtOnce()
    slab = slab_of("int4", backend)
    monkeypatch.setattr(packed_slab, "STAGING_BYTES", 2 * slab.fmt.block_bytes)
    pool, pages = torch.from_numpy(blocks(6)), np.array([5, 0, 3, 1, 4])
    slots = np.array([2, 9, 4, 7, 0])
    slab.link(slots[1:2], np.arange(12, 12 + slab.width - 1)[None])
    slab.put(stream, slots, pool, pages)
    back, layer = torch.zeros_like(pool), torch.zeros((6, SIZE), dtype=torch.uint8)
    slab.get(stream, back, pages, slots)
    slab.get_layer(stream, 2, layer, pages, slots)
    assert torch.equal(back[0], pool[0]) and near(back[pages].numpy(), pool[pages].numpy(), "int4")
    assert not back[2].any() and torch.equal(layer, back[:, 2 * SIZE :])
    assert np.array_equal(slab.read(slots), back[pages].numpy())


def test_what_a_format_cannot_hold_is_named_and_the_others_are_packed():
    fmt, rows, ids = fitted("int4"), blocks(4), np.array([3, 0, 1])
    rows[0].view(np.float32)[7] = np.nan
    rows[1].view(np.float32)[9] = 1e30
    packed, back = np.zeros((3, fmt.block_bytes), np.uint8), np.zeros_like(rows)
    with pytest.raises(UnpackableError) as refused:
        pack(fmt, rows, ids, packed, np.arange(3))
    assert refused.value.rows.tolist() == [0, 1]
    unpack(fmt, packed, np.array([0]), back, np.array([3]))
    assert near(rows[3], back[3], "int4")


def test_a_device_that_nobody_waits_for_names_them_by_its_verdict():
    fmt, rows, ids = fitted("int4; layer 1: full"), torch.from_numpy(blocks(4)), np.array([3, 0, 1])
    packed, back = torch.zeros(3, fmt.block_bytes, dtype=torch.uint8), torch.zeros_like(rows)
    assert pack_unseen(fmt, rows, ids, packed, np.arange(3))() is None
    rows[0].view(torch.float32)[7] = float("nan")
    rows[1].view(torch.float32)[2 * SIZE // 4 + 9] = 1e30  # of the last layer
    verdict = pack_unseen(fmt, rows, ids, packed, np.arange(3))
    refused = verdict()
    assert isinstance(refused, UnpackableError) and refused.rows.tolist() == [0, 1] and "int4" in str(refused)
    unpack(fmt, packed, np.array([0]), back, np.array([3]))
    assert near(rows[3].numpy(), back[3].numpy(), "int4")


def test_nothing_of_the_block_before_stays_between_the_parts():
    """Fails without the clearing in pack: a slot's padding would carry another tenant's bytes to disk."""
    fmt, rows, ids = fitted("int8"), blocks(1), np.zeros(1, np.int64)
    clean, used = np.zeros((1, fmt.block_bytes), np.uint8), np.full((1, fmt.block_bytes), 0xEE, np.uint8)
    pack(fmt, rows, ids, clean, ids)
    pack(fmt, rows, ids, used, ids)
    assert np.array_equal(clean, used)


def test_a_disk_reads_and_writes_slots_in_the_form_that_they_are_in(backend):
    slab, pool = slab_of("int8", backend), blocks(2)
    slots = np.array([1, 2])
    slab.link(slots[1:], np.arange(8, 8 + slab.width - 1)[None])
    slab.put(backend.demote, slots, pool, np.arange(2))
    backend.demote.synchronize()
    packed, whole = (slab.blocks(slots)[slot] for slot in slots)
    assert packed.fmt == slab.fmt and whole.fmt is None
    assert np.array_equal(whole.read(), pool[1]) and np.array_equal(packed.read(), slab.read(slots[:1])[0])
    whole.write(pool[0])
    packed.write(pool[1])
    assert np.array_equal(slab.read(slots)[1], pool[0]) and near(slab.read(slots)[0], pool[1], "int8")
