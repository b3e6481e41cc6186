"""Frames: what the store keeps of a block in a format, and PagesCodec, which makes and reads them.

    frame   magic | version | is_packed | zeros (16 bytes), then the packed block, or the block where it may not be packed

Bytes only; pages.py moves them. Guards: a frame that is not exactly of this format is refused before a kernel sees it.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnpackableError
from ..formats import block_formats
from ..layout import KVLayout
from . import CRC_BYTES

Bytes = npt.NDArray[np.uint8]
_HEAD = struct.Struct("<4sBB10x")
MAGIC, VERSION = b"kvpg", 1
HEADER_BYTES = _HEAD.size  # keeps what follows aligned for the kernels


class PagesCodec:
    """Frames of one layer group. `encode` and `decode` take a whole block in full precision, as Zarr does."""

    overhead_bytes = HEADER_BYTES  # a frame may hold the block as it is

    def __init__(self, layout: KVLayout, text: str) -> None:
        self.fmt = block_formats(text, [layout], name="nvme")[0]

    @property
    def usual_bytes(self) -> int:
        """Stored bytes of a packed block, with its crc."""
        return HEADER_BYTES + self.fmt.block_bytes + CRC_BYTES

    def is_packed(self, stored_bytes: int) -> bool:
        """Whether a frame of so many stored bytes holds a packed block: it is the smaller kind."""
        return stored_bytes == self.usual_bytes

    def encode(self, row: Bytes) -> bytes:
        return self.frame(row, may_pack=True).tobytes()

    def decode(self, encoded: Bytes, row: Bytes) -> None:
        is_packed, payload = self.open(encoded)
        if not is_packed:
            row[:] = payload
            return
        from ..packing import unpack

        unpack(self.fmt, payload[None], FIRST, row[None], FIRST)

    def zarr_codec(self) -> Any:
        from .zarr_pages import ZarrPages

        return ZarrPages(formats=self.fmt.text, layout=self.fmt.layout.to_dict())

    def frame(self, block: Bytes, *, may_pack: bool) -> Bytes:
        """A frame of a block in full precision, packed where it may and can be."""
        if may_pack:
            from ..packing import pack

            made = np.empty((1, HEADER_BYTES + self.fmt.block_bytes), np.uint8)
            try:
                pack(self.fmt, np.require(block, requirements=["C", "W"])[None], FIRST, made[:, HEADER_BYTES:], FIRST)
            except UnpackableError:
                return self.wrap(block, is_packed=False)
            made[:, :HEADER_BYTES] = _header(is_packed=True)
            return made[0]
        return self.wrap(block, is_packed=False)

    def wrap(self, payload: Bytes, *, is_packed: bool) -> Bytes:
        return np.concatenate([_header(is_packed=is_packed), payload])

    def open(self, frame: Bytes) -> tuple[bool, Bytes]:
        """Whether a frame is packed, and what it holds. Raises ValueError for what is no frame of this format."""
        if len(frame) < HEADER_BYTES:
            raise ValueError(f"{len(frame)} bytes are no frame")
        magic, version, is_packed = _HEAD.unpack_from(frame.data)
        size = self.fmt.block_bytes if is_packed else self.fmt.layout.block_bytes
        if (magic, version) != (MAGIC, VERSION) or is_packed > 1 or len(frame) != HEADER_BYTES + size:
            raise ValueError(f"a frame of {len(frame)} bytes is not one of {self.fmt.text!r}")
        return bool(is_packed), frame[HEADER_BYTES:]


FIRST = np.zeros(1, np.int64)


def _header(*, is_packed: bool) -> Bytes:
    return np.frombuffer(_HEAD.pack(MAGIC, VERSION, is_packed), np.uint8)
