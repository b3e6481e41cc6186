"""Blocks whose bytes follow from their key, so that whatever a store returns can be judged without remembering it."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tiers.nvme.frames import PagesCodec
from kvtier.tiers.nvme.store import STAMP, NvmeTier, StoreIdentity
from kvtier.tiers.streams import aligned_rows

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32")  # 8 KiB blocks
IDENTITY = StoreIdentity("faults", (LAYOUT,))
LARGE = KVLayout(
    num_layers=2, num_kv_heads=8, head_dim=32, block_size=64, dtype="float32"
)  # 256 KiB: past the page cache


def key_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@cache  # read-only: who checks asks thousands of times for the same few
def bytes_of(key: bytes, layout: KVLayout = LAYOUT) -> np.ndarray:
    """Noise at the start of each layer, more in some blocks than in others, so that their encodings differ in size."""
    drawn = np.frombuffer(hashlib.shake_128(key).digest(layout.block_bytes), np.uint8)
    layers = drawn.reshape(layout.num_layers, layout.layer_bytes).copy()
    layers[:, layout.layer_bytes // 16 * (1 + key[0] % 16) :] = 0
    layers.setflags(write=False)
    return layers.reshape(-1)


def layout_of(tier: NvmeTier) -> KVLayout:
    return tier._identity.layouts[0]


def written_to(tier: NvmeTier, key: bytes) -> np.ndarray:
    """What is written under a key: those bytes, or numbers where the store rounds."""
    if tier.format(0) is None:
        return bytes_of(key, layout_of(tier))
    drawn = np.frombuffer(hashlib.shake_128(key).digest(LAYOUT.block_bytes // 4), np.int8)
    return drawn.astype(np.float32).view(np.uint8)


def wanted_from(tier: NvmeTier, key: bytes) -> np.ndarray:
    """What must come back, to the bit: what was written, or what the store's format makes of it."""
    fmt = tier.format(0)
    return bytes_of(key, layout_of(tier)) if fmt is None else _rounded(written_to(tier, key).tobytes(), fmt.text)


@cache
def _rounded(block: bytes, fmt: str) -> np.ndarray:
    codec, row = PagesCodec(LAYOUT, fmt), np.empty(LAYOUT.block_bytes, np.uint8)
    codec.decode(np.frombuffer(codec.encode(np.frombuffer(block, np.uint8)), np.uint8).copy(), row)
    return row


def open_tier(
    path, backend: CpuBackend, slots: int = 256, codec: str | None = None, layout: KVLayout = LAYOUT, **options
) -> NvmeTier:
    """A new store has that codec (none), one that exists keeps its own."""
    codecs = None if codec is None else [codec]
    return NvmeTier.open(
        path, StoreIdentity("faults", (layout,)), num_slots=[slots], backend=backend, codecs=codecs, **options
    )


def memory(count: int, nbytes: int) -> np.ndarray:
    """Rows that the kernel takes as they lie, and for odd counts rows that it does not, so that both ways meet the faults."""
    shift = count % 2 * 8
    flat = aligned_rows(1, count * nbytes + shift)[0]
    return flat[shift:].reshape(count, nbytes)


def put(tier: NvmeTier, slots: np.ndarray, numbers: list[int]) -> np.ndarray:
    """Write blocks by number; says which are good."""
    stamps, rows = np.zeros(len(slots), STAMP), memory(len(slots), layout_of(tier).block_bytes)
    for i, number in enumerate(numbers):
        stamps[i]["key"], stamps[i]["tokens"] = key_of(number), layout_of(tier).block_size
        rows[i] = written_to(tier, key_of(number))
    ticket = tier.write(0, slots, rows, np.arange(len(slots)), stamps)
    assert ticket.event.wait(60) and ticket.event.error is None
    return ticket.ok


def wrong_blocks(tier: NvmeTier) -> tuple[int, set[bytes]]:
    """Read everything that is listed, whole and by layers: how many come back wrong, and the keys that come back right."""
    slots, stamps = tier.recovered()[0]
    if not len(slots):
        return 0, set()
    rows = memory(len(slots), layout_of(tier).block_bytes)
    ticket = tier.read(0, slots, rows, np.arange(len(slots)), stamps)
    assert ticket.event.wait(60) and ticket.event.error is None
    layer = memory(len(slots), layout_of(tier).layer_bytes)
    slices = tier.read_layer(0, slots, 1, layer, np.arange(len(slots)), stamps)
    assert slices.event.wait(60) and slices.event.error is None
    wrong, right = 0, set()
    for i, stamp in enumerate(stamps):
        wanted = wanted_from(tier, stamp["key"].tobytes())
        wrong += bool(ticket.ok[i] and (rows[i] != wanted).any())
        wrong += bool(slices.ok[i] and (layer[i] != wanted[layout_of(tier).layer_bytes :]).any())
        if ticket.ok[i]:
            right.add(stamp["key"].tobytes())
    return wrong, right


__all__ = ["CpuBackend", "SystemCalls"]
