"""Geometry of a segment file: a valid Zarr v3 shard whose inner chunks lie at 4 KiB-aligned offsets.

    0                        index: slots x (u64 offset, u64 nbytes), u32 crc32c, zeros up to a whole number of pages
    header + slot * stride   block bytes | u32 crc32c | trailer | zeros up to the stride

The crc32c is the standard Zarr codec's and belongs to the chunk (nbytes = block + 4). The trailer lies in what Zarr
sees as unused space: it says whose block this is, so that a whole block of another key is never taken for the right one.
Pure functions. Source: Zarr v3 sharding_indexed 1.0 allows unused space between inner chunks and any order of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from ..checksum import block_sum
from ..layout import KVLayout

PAGE_BYTES = 4096
CRC_BYTES = 4
EMPTY = 2**64 - 1
SEGMENT_BYTES = 32 << 20  # of a segment in a store that has room for many
MIN_SEGMENTS = 16  # a smaller store has smaller segments, so that recycling one costs little of it
MAGIC = b"kvtier\x00\x01"
_HEAD = struct.Struct("<8s32sQQII")  # magic, key, generation, checksum, tokens, number of layers
_SEAL = struct.Struct("<Q")  # xxh3 of the crc and the trailer before it


@dataclass(frozen=True, slots=True)
class Trailer:
    """What a slot says about itself."""

    key: bytes
    generation: int
    checksum: int
    tokens: int
    layer_sums: npt.NDArray[np.uint64]
    crc: int  # crc32c of the block, where Zarr's codec looks for it


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and offsets of the segments of one layer group."""

    block_bytes: int
    num_layers: int
    stride: int
    slots_per_segment: int

    @classmethod
    def of(cls, layout: KVLayout, slots_per_segment: int) -> Geometry:
        return cls(layout.block_bytes, layout.num_layers, bytes_on_disk(layout), slots_per_segment)

    @classmethod
    def for_room(cls, layout: KVLayout, num_slots: int) -> Geometry:
        """Segments for a store that shall hold num_slots blocks."""
        return cls.of(layout, max(1, min(SEGMENT_BYTES // bytes_on_disk(layout), num_slots // MIN_SEGMENTS)))

    @property
    def header_bytes(self) -> int:
        """Of the index, before the first slot."""
        return _whole_pages(16 * self.slots_per_segment + CRC_BYTES)

    @property
    def segment_bytes(self) -> int:
        return self.header_bytes + self.slots_per_segment * self.stride

    @property
    def tail_bytes(self) -> int:
        """Bytes of a slot behind its block: checksum, trailer and padding."""
        return self.stride - self.block_bytes

    @property
    def padding_bytes(self) -> int:
        """Bytes at the end of a slot that mean nothing."""
        return self.tail_bytes - (CRC_BYTES + _HEAD.size + 8 * self.num_layers + _SEAL.size)

    def place(self, slot: int) -> tuple[int, int]:
        """Segment number and offset in its file."""
        segment, index = divmod(slot, self.slots_per_segment)
        return segment, self.header_bytes + index * self.stride

    def header(self, occupied: npt.NDArray[np.bool_]) -> bytes:
        """The index of a segment whose slots are occupied or not, as its first pages hold it."""
        entries = np.full((self.slots_per_segment, 2), EMPTY, "<u8")
        used = np.flatnonzero(occupied)
        entries[used, 0] = self.header_bytes + used * self.stride
        entries[used, 1] = self.block_bytes + CRC_BYTES
        raw = entries.tobytes()
        return (raw + crc32c.crc32c(raw).to_bytes(4, "little")).ljust(self.header_bytes, b"\0")

    def judge_header(self, pages: npt.NDArray[np.uint8]) -> Literal["ours", "torn", "foreign"]:
        """Whose index this is: one that we would write, one that a crash or a fault broke, or another writer's."""
        entries, size = pages[: 16 * self.slots_per_segment], 16 * self.slots_per_segment
        if crc32c.crc32c(entries.data) != int.from_bytes(pages[size : size + CRC_BYTES].tobytes(), "little"):
            return "torn"
        listed = entries.view("<u8")[1::2] != np.uint64(EMPTY)
        return "ours" if entries.tobytes() == self.header(listed)[:size] else "foreign"

    def tail(self, trailer: Trailer) -> bytes:
        """Everything behind a block's bytes."""
        head = _HEAD.pack(
            MAGIC, trailer.key, trailer.generation, trailer.checksum, trailer.tokens, len(trailer.layer_sums)
        )
        body = head + np.ascontiguousarray(trailer.layer_sums, "<u8").tobytes()
        sealed = trailer.crc.to_bytes(CRC_BYTES, "little") + body
        return (sealed + _SEAL.pack(xxhash.xxh3_64_intdigest(sealed))).ljust(self.tail_bytes, b"\0")

    def read_tail(self, tail: bytes) -> Trailer | None:
        """The trailer, or None when it is not one that was written whole."""
        sealed = tail[: self.tail_bytes - self.padding_bytes - _SEAL.size]
        (seal,) = _SEAL.unpack_from(tail, len(sealed))
        if len(tail) < self.tail_bytes or xxhash.xxh3_64_intdigest(sealed) != seal:
            return None
        body = sealed[CRC_BYTES:]
        magic, key, generation, checksum, tokens, layers = _HEAD.unpack_from(body)
        sums = np.frombuffer(body, "<u8", self.num_layers, _HEAD.size)
        if magic != MAGIC or layers != self.num_layers or block_sum(sums) != checksum:
            return None
        return Trailer(key, generation, checksum, tokens, sums, int.from_bytes(sealed[:CRC_BYTES], "little"))


def bytes_on_disk(layout: KVLayout) -> int:
    """Of one block with its checksums and padding."""
    return _whole_pages(layout.block_bytes + CRC_BYTES + _HEAD.size + 8 * layout.num_layers + _SEAL.size)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
