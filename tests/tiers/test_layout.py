from __future__ import annotations

import numpy as np
import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tiers.formats import packed_layouts, page_format, unpacked_layouts
from kvtier.tiers.layout import KVLayout, format_bytes, parse_bytes


def test_bytes_of_a_block_add_up():
    layout = KVLayout(32, 8, 128, 16)
    assert layout.block_bytes == 32 * 2 * 8 * 16 * 128 * 2 == 2 << 20
    assert layout.token_bytes == 128 << 10
    assert layout.block_shape == (32, 2, 8, 16, 128)


def test_keys_and_values_may_differ_in_width():
    layout = KVLayout(4, 8, 48, 16, "float32", value_dim=24)
    assert layout.key_bytes == 2 * layout.value_bytes
    assert layout.block_shape == (4, layout.layer_bytes // 4)


def test_the_fingerprint_covers_every_field():
    base = dict(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32")
    changes = [{"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 32}, {"block_size": 32}, {"dtype": "bfloat16"}]
    changes += [{"window": 9}, {"value_dim": 32}, {"sinks": 1}]
    prints = {KVLayout(**(base | change)).fingerprint for change in [{}, *changes]}
    assert len(prints) == len(changes) + 1
    assert KVLayout.from_dict(KVLayout(**base).to_dict()) == KVLayout(**base)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", 24),
        ("block_size", 8192),
        ("dtype", "int3"),
        ("num_layers", 0),
        ("head_dim", -1),
        ("name", 7),
    ],
)
def test_what_cannot_be_is_refused_by_name(field, value):
    fields = dict(num_layers=2, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32") | {field: value}
    with pytest.raises(ConfigError, match=f"{field}={value!r}"):
        KVLayout(**fields)


def test_rows_must_be_aligned_for_the_kernels():
    with pytest.raises(ConfigError, match="multiple of 16"):
        KVLayout(2, 2, 6, 16, "bfloat16")


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("512MB", 512 * 10**6), ("1.5 KiB", 1536), (77, 77), ("64", 64), ("3b", 3)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


def test_a_share_needs_a_whole():
    assert parse_bytes("25%", total=1000) == 250
    with pytest.raises(ConfigError, match="'25%'"):
        parse_bytes("25%")


@pytest.mark.parametrize("text", ["", "GiB", "8 potatoes", "-3", None, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="host_bytes"):
        parse_bytes(text, name="host_bytes")


def test_sizes_are_written():
    assert [format_bytes(n) for n in (17, 1536, 3 << 20, 5 << 40)] == ["17 B", "1.5 KiB", "3.0 MiB", "5.0 TiB"]


def test_a_form_is_part_of_what_a_layout_is_and_a_plain_one_reads_as_before():
    plain = KVLayout(2, 2, 32, 32)
    assert not {"form", "packed_bytes"} & plain.to_dict().keys()  # stores that are there keep their fingerprint
    packed, tail = packed_layouts("int8", [plain], name="device")
    assert packed.block_bytes == 2 * packed.packed_bytes < 0.6 * plain.block_bytes and packed.itemsize == 1
    assert packed.block_shape == (2, packed.packed_bytes) and packed.storage_dtype == np.uint8
    assert tail.block_bytes == plain.block_bytes and tail.window == 1 and tail.is_tail
    assert len({layout.fingerprint for layout in (plain, packed, tail)}) == 3
    assert [KVLayout.from_dict(x.to_dict()) for x in (packed, tail)] == [packed, tail]
    assert unpacked_layouts([packed, tail]) == [plain] and page_format(packed).layer_bytes == packed.layer_bytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(form=""), "form=''"),
        (dict(form=7), "form=7"),
        (dict(form="int8/64"), "packed_bytes=0"),
        (dict(packed_bytes=64), "packed_bytes=64 with form='full'"),
        (dict(form="int8/64", packed_bytes=72), "packed_bytes=72"),
        (dict(form="int8/64", packed_bytes=1 << 20), "at most"),
    ],
)
def test_a_form_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        KVLayout(2, 2, 32, 32, **fields)


def test_a_form_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="packed_bytes=1024"):
        page_format(KVLayout(2, 2, 32, 32, form="int8/64", packed_bytes=1024))
    with pytest.raises(ConfigError, match="'int7' is unknown"):
        page_format(KVLayout(2, 2, 32, 32, form="int7", packed_bytes=1024))
