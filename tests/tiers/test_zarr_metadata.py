"""The metadata that we write is the metadata that zarr-python writes, of every dtype, shape and codec."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.codecs import zarr_codecs
from kvtier.tiers.nvme.identity import StoreIdentity, grow_arrays, make_arrays

CASES = [("none", dtype, value_dim) for dtype in ("float32", "float16", "bfloat16") for value_dim in (None, 32)]
CASES += [(codec, "bfloat16", None) for codec in ("lz4", "zstd", "split", "aes", "lz4+aes", "int4")]


CASES += [(codec, "packed", None) for codec in ("none", "zstd", "aes")]


def layout_of(dtype: str, value_dim: int | None) -> KVLayout:
    if dtype == "packed":
        return KVLayout(2, 1, 64, 64, "bfloat16", name="g", form="int8/64", packed_bytes=8704)
    return KVLayout(2, 1, 64, 64, dtype, value_dim=value_dim, name="g")


@pytest.mark.parametrize(("codec", "dtype", "value_dim"), CASES)
def test_it_is_what_zarr_python_writes(tmp_path, codec, dtype, value_dim):
    layout = layout_of(dtype, value_dim)
    identity = StoreIdentity("m", (layout,))
    (geometry,) = make_arrays(tmp_path, identity, [40], [codec], {"x": 1}, 1 << 20)
    ours = json.loads((tmp_path / "blocks.zarr" / "g0" / "zarr.json").read_text())
    group = zarr.create_group(str(tmp_path / "stock"), attributes={"kvtier": said(tmp_path)})
    group.create_array(
        "g0",
        shape=tuple(ours["shape"]),
        chunks=(geometry.slots_per_segment, *layout.block_shape),
        dtype=layout.storage_dtype,
        serializer=ShardingCodec(
            chunk_shape=(1, *layout.block_shape),
            codecs=[BytesCodec(), *zarr_codecs(codec, layout), Crc32cCodec()],
            index_codecs=[BytesCodec(), Crc32cCodec()],
            index_location="start",
        ),
        compressors=None,
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=ours["dimension_names"],
        attributes={"kvtier": {"dtype": layout.dtype, "codec": codec, "layout": layout.to_dict()}},
    )
    for node in ("zarr.json", "g0/zarr.json"):
        stock = json.loads((tmp_path / "stock" / node).read_text())
        assert json.loads((tmp_path / "blocks.zarr" / node).read_text()) == stock
    assert zarr.open_array(str(tmp_path / "blocks.zarr" / "g0"), mode="r").shape[0] >= 40


def said(path) -> dict:
    return json.loads((path / "blocks.zarr" / "zarr.json").read_text())["attributes"]["kvtier"]


def test_arrays_grow_as_zarr_would_resize_them(tmp_path):
    identity = StoreIdentity("m", (layout_of("float32", None),))
    make_arrays(tmp_path, identity, [40], ["none"], {}, 1 << 20)
    file = tmp_path / "blocks.zarr" / "g0" / "zarr.json"
    before = json.loads(file.read_text())
    grow_arrays(tmp_path, identity, [400])
    after = json.loads(file.read_text())
    assert zarr.open_array(str(file.parent), mode="r").shape[0] == after["shape"][0] >= 400
    array = zarr.open_array(str(file.parent), mode="r+")
    array.resize(tuple(before["shape"]))
    assert json.loads(file.read_text()) == before


def test_a_new_store_does_not_load_zarr():
    code = (
        "import sys, tempfile; from pathlib import Path; from kvtier.tiers.layout import KVLayout\n"
        "from kvtier.tiers.nvme.identity import StoreIdentity, grow_arrays, make_arrays\n"
        "path, identity = Path(tempfile.mkdtemp()), StoreIdentity('m', (KVLayout(2, 1, 64, 64, 'float32'),))\n"
        "make_arrays(path, identity, [40], ['none'], {}, 1 << 20); grow_arrays(path, identity, [400])\n"
        "print('zarr' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
