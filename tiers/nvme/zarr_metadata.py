"""The Zarr v3 metadata of a store as plain JSON: what zarr-python would write, without the half second that loading it takes.

Pure values: which file they go to, and whether one there is still ours, is identity.py's business. A test compares every
codec and dtype with what zarr-python itself writes. Only compressed and encrypted arrays load zarr, whose codecs say
what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layout import KVLayout
from .codecs import zarr_codecs
from .layout import Geometry

_DIM_NAMES = ("slot", "layer", "kv", "head", "token", "dim")
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ONE_BYTE = {"name": "bytes"}  # packed blocks: there is no order to name
_CRC = {"name": "crc32c"}


def group_metadata(said: Mapping[str, Any]) -> dict[str, Any]:
    """A group that says what its blocks are."""
    return {"attributes": {"kvtier": dict(said)}, "zarr_format": 3, "node_type": "group"}


def array_metadata(index: int, layout: KVLayout, geometry: Geometry, num_slots: int, codec: str) -> dict[str, Any]:
    """One layer group's array of `num_slots` blocks: an inner chunk is a block, a shard is a segment."""
    dtype = layout.storage_dtype
    sharding = {
        "chunk_shape": [1, *layout.block_shape],
        "codecs": [
            _BYTES if dtype.itemsize > 1 else _ONE_BYTE,
            *(stage.to_dict() for stage in zarr_codecs(codec, layout)),
            _CRC,
        ],
        "index_codecs": [_BYTES, _CRC],
        "index_location": "start",
    }
    return {
        "shape": [num_slots, *layout.block_shape],
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [geometry.slots_per_segment, *layout.block_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"kvtier": {"dtype": layout.dtype, "codec": codec, "layout": layout.to_dict()}},
        "dimension_names": _names(index, 1 + len(layout.block_shape)),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _names(index: int, dimensions: int) -> list[str]:
    """Of its own per array, so that xarray takes groups of other sizes."""
    kinds = _DIM_NAMES if dimensions == len(_DIM_NAMES) else ("slot", "layer", "element")
    return [f"g{index}_{kind}" for kind in kinds]
