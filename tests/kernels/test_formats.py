"""PageFormat: what it holds, how many tokens more than bfloat16, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier.kernels.formats import FORMATS, PageFormat

CLAIMED = [  # format, block, group, times the tokens of bfloat16
    ("fp8", 64, 64, 1.95),
    ("int8", 128, 128, 1.95),
    ("int4", 128, 128, 3.7),
    ("int2", 128, 128, 7.0),
    ("hack2", 128, 128, 7.0),
]


@pytest.mark.parametrize("name, block, group, times", CLAIMED)
def test_a_device_budget_holds_as_many_more_tokens_as_claimed(name, block, group, times):
    full = 2 * 8 * block * 128 * 2  # K and V of one layer: 8 heads, 128 channels, bfloat16
    fmt = PageFormat(name, kv_heads=8, block=block, head_dim=128, group=group)
    budget = 1 << 30
    held, held_full = budget // fmt.block_bytes(32) * block, budget // (32 * full) * block
    assert held >= times * held_full
    assert 16 / fmt.bits_per_value == pytest.approx(full / fmt.layer_bytes)


@pytest.mark.parametrize("group, bits", [(32, 5.0), (64, 4.5), (128, 4.25)])
def test_scales_and_zeros_cost_what_the_group_says(group, bits):
    assert PageFormat("int4", kv_heads=8, block=128, head_dim=128, group=group).bits_per_value == bits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64)], ids=str)
def test_parts_are_aligned_and_do_not_overlap(name, dims):
    group = 128 if name == "hack8" else 64
    fmt = PageFormat(name, kv_heads=2, block=64, head_dim=dims[0], value_dim=dims[1], group=group)
    for part in (fmt.keys, fmt.values):
        rows, columns = part.table_shape
        table = rows * columns * 2
        assert part.scales_at >= part.block * part.row_bytes and part.scales_at % 16 == 0
        assert part.zeros_at >= part.scales_at + table and part.zeros_at % 16 == 0
        assert part.record_bytes >= part.zeros_at + (table if part.has_zeros else 0) and part.record_bytes % 128 == 0
    assert fmt.block_bytes(3) == 3 * fmt.layer_bytes


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(name="int3"), "int3.*choose fp8"),
        (dict(kv_heads=0), "kv_heads=0"),
        (dict(group=48), "group=48"),
        (dict(block=48), "block=48"),
        (dict(block=8), "block=8"),
        (dict(head_dim=66), "head_dim=66.*4 channels"),
        (dict(value_dim=80, group=32), "group=32.*value_dim=80"),
        (dict(name="int8", head_dim=256, group=32), "value_dim=256.*larger group"),
        (dict(name="hack2", head_dim=96, group=128), "head_dim=96.*power of two"),
        (dict(name="hack8", group=64), "group=64.*128 channels or more at head_dim=128"),
        (dict(name="hack2", block=16), "block=16.*32 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_field_and_the_mend(change, match):
    fields = dict(name="int2", kv_heads=2, block=64, head_dim=128, group=64) | change
    with pytest.raises(ValueError, match=match):
        PageFormat(**fields)


def test_asking_for_sizes_loads_no_torch():
    code = (
        "import sys, kvtier.kernels.formats as f; f.PageFormat('int4', 8, 64, 128); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
