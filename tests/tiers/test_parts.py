"""Parts: which layers and heads of a group share a format, and what the settings of the groups that come of it say."""

from __future__ import annotations

import pytest

from kvtier import PagerConfig
from kvtier.pager.tier_formats import split_device
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.parts import split_groups

FULL = KVLayout(4, 3, 64, 64)
WINDOW = KVLayout(2, 2, 64, 64, window=512, name="window512")


def cut(text, *layouts: KVLayout):
    parts = split_groups(text, layouts or (FULL,), name="device")
    return [[(part.name, part.kind.text, part.layers, part.heads) for part in of_group] for of_group in parts]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("int8", [("full", "int8/64", (0, 1, 2, 3), (0, 1, 2))]),
        ("bf16", [("full", "full", (0, 1, 2, 3), (0, 1, 2))]),
        ("int4; layers 0,3: bf16", [("full", "int4/64", (1, 2), (0, 1, 2)), ("full-exact", "full", (0, 3), (0, 1, 2))]),
        ("int4; layers 0-2: fp8", [("full", "int4/64", (3,), (0, 1, 2)), ("full-fp8", "fp8", (0, 1, 2), (0, 1, 2))]),
        ("int4; heads 1: int8/32", [("full", "int4/64", (0, 1, 2, 3), (0, 2)), ("full-int8", "int8/32", (0, 1, 2, 3), (1,))]),
        (
            "int4; layers 1 heads 0: full",
            [
                ("full", "int4/64", (0, 2, 3), (0, 1, 2)),
                ("full-int4", "int4/64", (1,), (1, 2)),
                ("full-exact", "full", (1,), (0,)),
            ],
        ),
        (
            "int4; heads 0: full; layers 0-2: int4",
            [
                ("full", "int4/64", (0, 1, 2), (0, 1, 2)),
                ("full-int4", "int4/64", (3,), (1, 2)),
                ("full-exact", "full", (3,), (0,)),
            ],
        ),
    ],
)  # fmt: skip
def test_every_head_of_every_layer_is_in_one_part(text, parts):
    assert cut(text) == [parts]
    held = [(layer, head) for *_, layers, heads in parts for layer in layers for head in heads]
    assert sorted(held) == [(layer, head) for layer in range(4) for head in range(3)]


def test_groups_are_cut_by_name():
    assert cut({"window512": "int4; layer 1: full"}, FULL, WINDOW) == [
        [("full", "full", (0, 1, 2, 3), (0, 1, 2))],
        [("window512", "int4/64", (0,), (0, 1)), ("window512-exact", "full", (1,), (0, 1))],
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4; layers 4: full", "no layer 4"),
        ("int4; heads 0-3: full", "no KV head 3"),
        ("int4; heads 1-0: full", "no range"),
        ("int4; : full", "not of the form"),
        ("int4; layers 0 head: full", "not of the form"),
        ("int4; layers 0: fp16", "bfloat16"),
        ("int4; heads 0: int3", "unknown"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        cut(text)
    assert str(refused.value).startswith("device=")


def test_settings_of_the_tiers_below_mean_the_same_layers_as_before():
    config = PagerConfig(
        "1MiB", "1MiB", nvme_path="there", device="int8; layers 0,2: full", host="int8; layers 2: full",
        nvme="int8; layers 0: int4", nvme_codec={"full": "zstd"},
    )  # fmt: skip
    made, (parts,) = split_device(config, [FULL])
    assert made.device == {"full": "int8/64", "full-exact": "full"} and [p.layers for p in parts] == [(1, 3), (0, 2)]
    assert made.host == {"full": "int8/64", "full-exact": "int8/64; layers 1: full"}
    assert made.nvme == {"full": "int8/64", "full-exact": "int4/64; layers 1: int8/64"}
    assert made.nvme_codec == {"full": "zstd", "full-exact": "zstd"}
    plain = PagerConfig("1MiB", "1MiB", device="int8", host="int8; layers 2: full")
    assert split_device(plain, [FULL])[0] is plain


def test_heads_have_formats_of_their_own_in_the_device_tier_alone():
    config = PagerConfig("1MiB", "1MiB", device="int8; layers 0: full", host="int8; heads 0: full")
    with pytest.raises(ConfigError, match=r"host=.*only the device tier of an Engine"):
        split_device(config, [FULL])
