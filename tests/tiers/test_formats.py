"""Formats of a tier by text: what is understood, what is refused and how, and what a block takes."""

from __future__ import annotations

import pytest

from kvtier.kernels.formats import FORMATS
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.formats import block_formats, check_order, is_policy
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.packed_slab import width_of

FULL = KVLayout(num_layers=4, num_kv_heads=2, head_dim=128, block_size=256, dtype="bfloat16", name="full")
WINDOW = KVLayout(
    num_layers=2, num_kv_heads=2, head_dim=64, block_size=256, dtype="bfloat16", window=512, name="window"
)
MLA = KVLayout(num_layers=2, num_kv_heads=1, head_dim=128, block_size=64, dtype="float16", value_dim=64)


def fitted(text, *layouts: KVLayout):
    return block_formats(text, layouts or (FULL,), name="host")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("full", "full"),
        ("bf16", "full"),
        ("int8", "int8/64"),
        ("int4/128", "int4/128"),
        ("fp8", "fp8"),
        ("int4; layers 0-1: bf16", "full; layers 2-3: int4/64"),
        ("int4/32; layer 3: int8; layers 0,1: full", "full; layers 2: int4/32; layers 3: int8/64"),
        ("int8; layers 0-3: int4", "int4/64"),
    ],
)
def test_a_text_becomes_a_format_per_layer_and_its_shortest_text_again(text, said):
    (fmt,) = fitted(text)
    assert fmt.text == said and fitted(said)[0] == fmt
    assert fmt.is_lossy == is_policy(text) == (said != "full")


def test_groups_can_differ_and_what_is_not_named_stays_in_full_precision():
    full, window = fitted({"full": "int4"}, FULL, WINDOW)
    assert full.text == "int4/64" and not window.is_lossy and window.block_bytes == WINDOW.block_bytes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int3", "unknown"),
        ("int4/48", "groups of 32, 64, 128"),
        ("fp8/64", "groups of"),
        ("int8; layers 2-9: bf16", "no layer 9"),
        ("int8; layers 3-2: bf16", "no range"),
        ("int8; first two: bf16", "not of the form"),
        ("fp16", "bfloat16"),
        (8, "give a format"),
        ({"ful": "int8"}, "no layer group 'ful'"),
    ],
)
def test_a_text_that_cannot_be_is_refused_by_name(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        fitted(text)
    assert str(refused.value).startswith("host=")


def test_a_format_that_a_shape_cannot_take_says_why():
    small = KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, block_size=8)
    with pytest.raises(ConfigError, match="16 or more"):
        fitted("int8", small)


@pytest.mark.parametrize(("name", "least"), [("fp8", 1.95), ("int8/128", 1.95), ("int4/128", 3.7), ("int2/128", 7.0)])
def test_a_block_with_its_scales_is_as_small_as_promised(name, least):
    (fmt,) = fitted(name)
    assert FULL.block_bytes / fmt.block_bytes >= least
    assert fmt.starts[-1] == fmt.block_bytes and width_of(fmt) * fmt.block_bytes >= FULL.block_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_values_narrower_than_keys_have_formats_too(name):
    (fmt,) = fitted(f"{name}/128" if name != "fp8" else name, MLA)
    assert 0 < fmt.block_bytes < MLA.block_bytes


@pytest.mark.parametrize(
    ("upper", "lower", "is_fine"),
    [
        ("full", "int4", True),
        ("int8", "int4", True),
        ("int8", "int8", True),
        ("int8; layers 0-1: full", "int4", True),
        ("int8", "full", False),
        ("int4", "int8", False),
        ("int8", "fp8", False),
        ("int8/64", "int8/128", False),
        ("int8", "int4; layers 0-1: bf16", False),
    ],
)
def test_a_tier_is_never_finer_than_the_one_above(upper, lower, is_fine):
    (above,), (below,) = fitted(upper), fitted(lower)
    if is_fine:
        check_order(above, below, names=("host", "nvme"))
        return
    with pytest.raises(ConfigError, match="regains nothing"):
        check_order(above, below, names=("host", "nvme"))
