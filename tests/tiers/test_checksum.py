from __future__ import annotations

import itertools

import crc32c
import numpy as np
import pytest

from kvtier.tiers.checksum import joined_crc, layer_sums_and_crc
from kvtier.tiers.layout import KVLayout


@pytest.mark.parametrize("num_layers", [1, 2, 7, 61])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_crc_of_a_block_follows_from_those_of_its_layers(num_layers, block_size):
    layout = KVLayout(num_layers, 2, 24, block_size, "bfloat16")
    block = np.random.default_rng(0).integers(0, 256, layout.block_bytes, np.uint8)
    sums, crc = layer_sums_and_crc(layout, block)
    assert crc == crc32c.crc32c(block.data)
    slices = block.reshape(num_layers, -1)
    assert sums.tolist() == [crc32c.crc32c(part.data) for part in slices]


def test_parts_of_any_length_join_in_order():
    raw, cuts = bytes(range(256)) * 9, [0, 1, 1, 17, 300, 2304]
    parts = [(crc32c.crc32c(raw[a:b]), b - a) for a, b in itertools.pairwise(cuts)]
    assert joined_crc(parts) == crc32c.crc32c(raw)
    assert joined_crc(parts[::-1]) != crc32c.crc32c(raw)
    assert joined_crc([]) == 0
