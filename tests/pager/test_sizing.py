"""What the device and host tiers set apart for streaming is what the ring uses, whatever the size of a layer."""

from __future__ import annotations

import pytest

from kvtier.pager.sizing import plan_sizes
from kvtier.pager.streaming import MAX_BOUNCE_SLOTS, MAX_CHUNK_BYTES, RING_SLOTS, StagingRing
from kvtier.tiers.layout import KVLayout

SMALL = KVLayout(4, 8, 128, 64)
LARGE = KVLayout(2, 32, 128, 2048, "float32")  # 64 MiB a layer: more than a chunk usually is


@pytest.mark.parametrize("asked", [None, 1 << 30])
@pytest.mark.parametrize("device", [1 << 30, 1 << 36])
def test_a_large_device_tier_gives_the_ring_no_more_than_it_uses(device, asked):
    sizes = plan_sizes([SMALL], device, 1 << 36, asked, True)
    assert sizes.staging_bytes == [RING_SLOTS * MAX_CHUNK_BYTES]
    assert sizes.bounce_bytes == [MAX_BOUNCE_SLOTS * MAX_CHUNK_BYTES]
    assert device - SMALL.block_bytes < sizes.pages[0] * SMALL.block_bytes + sizes.staging_bytes[0] <= device


@pytest.mark.parametrize("layout", [SMALL, LARGE])
@pytest.mark.parametrize("host", [1 << 29, 1 << 36])
def test_a_ring_has_a_bounce_slot_for_each_of_its_chunks(layout, host):
    sizes = plan_sizes([layout], 1 << 32, host, None, True)
    chunk = StagingRing.chunk_slices_of(layout.layer_bytes, sizes.staging_bytes[0]) * layout.layer_bytes
    assert sizes.staging_bytes[0] == RING_SLOTS * chunk
    assert RING_SLOTS <= sizes.bounce_bytes[0] // chunk <= MAX_BOUNCE_SLOTS
