"""`kvtier.pages` as a Zarr v3 codec, for any zarr-python that finds it: pyproject.toml names it as an entry point.

Chunks are blocks in full precision to Zarr, and frames of frames.py on disk. Reading gives what the format kept: near the
block, not the block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.common import JSON, parse_named_configuration
from zarr.registry import register_codec

from ..layout import KVLayout
from .frames import PagesCodec

NAME = "kvtier.pages"


@dataclass(frozen=True)
class ZarrPages(BytesBytesCodec):
    """Blocks in 8, 4 or 2 bits. `formats` says which, `layout` of what shape a block is."""

    is_fixed_size = False
    formats: str = ""
    layout: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._codec()  # refuses what cannot be, here and not at the first chunk

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, NAME)
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        return {"name": NAME, "configuration": {"formats": self.formats, "layout": dict(self.layout)}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError(f"{NAME} makes chunks of different sizes")

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded = await asyncio.to_thread(self._codec().encode, _bytes_of(chunk_bytes))
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode, chunk_bytes, chunk_spec)

    def _decode(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        codec = self._codec()
        row = np.empty(codec.fmt.layout.block_bytes, np.uint8)
        codec.decode(_bytes_of(chunk_bytes).copy(), row)
        return chunk_spec.prototype.buffer.from_array_like(row)

    def _codec(self) -> PagesCodec:
        return PagesCodec(KVLayout.from_dict(dict(self.layout)), self.formats)


register_codec(NAME, ZarrPages)


def _bytes_of(buffer: Buffer) -> Any:
    return np.ascontiguousarray(buffer.as_numpy_array()).view(np.uint8)
