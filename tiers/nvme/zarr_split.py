"""`kvtier.split` as a Zarr v3 codec, for any zarr-python that finds it: pyproject.toml names it as an entry point.

Zarr loads this file when an array's metadata asks for the codec; kvtier itself reads and writes frames without it.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.common import JSON, parse_named_configuration
from zarr.registry import register_codec

from . import split

NAME = "kvtier.split"
SLACK_BYTES = 64 << 10  # a codec before this one may have made a chunk larger than its numbers


@dataclass(frozen=True)
class ZarrSplit(BytesBytesCodec):
    """Planes of bytes, zstd over each. `typesize`: bytes of a number."""

    is_fixed_size = False
    typesize: int = 2

    def __post_init__(self) -> None:
        if self.typesize not in split.WIDTHS:
            raise ValueError(f"{NAME}: typesize={self.typesize!r} is not one of {list(split.WIDTHS)}")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, NAME)
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        return {"name": NAME, "configuration": {"typesize": self.typesize}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError(f"{NAME} makes chunks of different sizes")

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode, chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode, chunk_bytes, chunk_spec)

    def _encode(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_bytes(split.encode(_bytes_of(chunk_bytes), self.typesize))

    def _decode(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        frame = _bytes_of(chunk_bytes)
        nbytes, most = split.held_bytes(frame), 2 * _chunk_bytes(chunk_spec) + SLACK_BYTES
        if nbytes > most:
            raise ValueError(f"a {NAME} frame claims {nbytes} bytes for a chunk of {_chunk_bytes(chunk_spec)}")
        row = np.empty(nbytes, np.uint8)
        split.decode(frame, row)
        return chunk_spec.prototype.buffer.from_array_like(row)


register_codec(NAME, ZarrSplit)


def _bytes_of(buffer: Buffer) -> Any:
    return np.ascontiguousarray(buffer.as_numpy_array()).view(np.uint8)


def _chunk_bytes(spec: ArraySpec) -> int:
    return math.prod(spec.shape) * int(getattr(spec.dtype, "item_size", 8))
