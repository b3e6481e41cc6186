"""Geometry of a segment file: a valid Zarr v3 shard whose inner chunks lie at 4 KiB-aligned offsets.

    0                        index: slots x (u64 offset, u64 nbytes), u32 crc32c, zeros up to a whole number of pages
    header + slot * stride   chunk | u32 crc32c | trailer | zeros up to a whole page; nothing up to the stride

The chunk is the block's bytes, or what a codec made of them. The crc32c is the standard Zarr codec's and belongs to the
chunk: `stored bytes` count both, and the index lists them. The trailer lies in what Zarr sees as unused space: it says
whose block this is, so that a whole block of another key is never taken for the right one. An encoded chunk ends
anywhere; the manifest says where, so that one read fetches chunk and trailer and nothing else. Pure functions.
Source: Zarr v3 sharding_indexed 1.0 allows unused space between inner chunks and any order of them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from ..checksum import block_sum
from ..layout import KVLayout
from . import CRC_BYTES, SEGMENT_BYTES

PAGE_BYTES = 4096
EMPTY = 2**64 - 1
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
    """Sizes and offsets of the segments of one layer group.

    overhead_bytes: how many bytes more than the block an encoded chunk can have; None where chunks are not encoded.
    """

    block_bytes: int
    num_layers: int
    stride: int
    slots_per_segment: int
    overhead_bytes: int | None = None

    @classmethod
    def of(cls, layout: KVLayout, slots_per_segment: int, overhead_bytes: int | None = None) -> Geometry:
        stride = bytes_on_disk(layout, overhead_bytes)
        return cls(layout.block_bytes, layout.num_layers, stride, slots_per_segment, overhead_bytes)

    @classmethod
    def for_room(
        cls,
        layout: KVLayout,
        num_slots: int,
        overhead_bytes: int | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Geometry:
        """Segments of about segment_bytes, smaller ones for a store that shall hold few blocks."""
        fitting = segment_bytes // bytes_on_disk(layout, overhead_bytes)
        return cls.of(layout, max(1, min(fitting, num_slots // MIN_SEGMENTS)), overhead_bytes)

    @property
    def is_encoded(self) -> bool:
        """Whether chunks differ in size; their segments are then sparse."""
        return self.overhead_bytes is not None

    @property
    def most_stored_bytes(self) -> int:
        """Of a chunk and its crc; of every chunk where they are not encoded."""
        return self.block_bytes + (self.overhead_bytes or 0) + CRC_BYTES

    @property
    def proof_bytes(self) -> int:
        """Of crc and trailer, from the first to the seal."""
        return CRC_BYTES + _trailer_bytes(self.num_layers)

    def footprint(self, stored: Any) -> Any:
        """Bytes of disk that a chunk of so many stored bytes takes with its trailer. An int, or an array of them."""
        return _whole_pages(stored + _trailer_bytes(self.num_layers))

    def counted_bytes(self, usual: int | None) -> int:
        """Bytes of disk that a block is counted with: the most, or its footprint where it usually stores so many."""
        return self.stride if usual is None else int(self.footprint(usual))

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

    def place(self, slot: int) -> tuple[int, int]:
        """Segment number and offset in its file."""
        segment, index = divmod(slot, self.slots_per_segment)
        return segment, self.header_bytes + index * self.stride

    def header(self, stored: npt.NDArray[np.uint64]) -> bytes:
        """The index of a segment by the stored bytes of its slots, 0 for empty ones, as its first pages hold it."""
        entries = np.full((self.slots_per_segment, 2), EMPTY, "<u8")
        used = np.flatnonzero(stored)
        entries[used, 0] = self.header_bytes + used * self.stride
        entries[used, 1] = stored[used]
        raw = entries.tobytes()
        return (raw + crc32c.crc32c(raw).to_bytes(4, "little")).ljust(self.header_bytes, b"\0")

    def judge_header(self, pages: npt.NDArray[np.uint8]) -> Literal["ours", "torn", "foreign"]:
        """Whose index this is: one that we would write, one that a crash or a fault broke, or another writer's."""
        entries, size = pages[: 16 * self.slots_per_segment], 16 * self.slots_per_segment
        if crc32c.crc32c(entries.data) != int.from_bytes(pages[size : size + CRC_BYTES].tobytes(), "little"):
            return "torn"
        listed = entries.view("<u8")[1::2]
        stored = np.where(listed == np.uint64(EMPTY), np.uint64(0), listed)
        is_ours = (stored == 0) | self.may_store(stored)
        return "ours" if is_ours.all() and entries.tobytes() == self.header(stored)[:size] else "foreign"

    def may_store(self, stored: Any) -> Any:
        """Whether a chunk of ours can have so many stored bytes. A bool, or an array of them."""
        least = CRC_BYTES + 1 if self.is_encoded else self.most_stored_bytes
        return (stored >= least) & (stored <= self.most_stored_bytes)

    def tail(self, trailer: Trailer) -> bytes:
        """Everything behind the bytes of a block that is not encoded."""
        return self.proof(trailer).ljust(self.tail_bytes, b"\0")

    def proof(self, trailer: Trailer) -> bytes:
        """Crc and trailer, sealed."""
        head = _HEAD.pack(
            MAGIC, trailer.key, trailer.generation, trailer.checksum, trailer.tokens, len(trailer.layer_sums)
        )
        body = head + np.ascontiguousarray(trailer.layer_sums, "<u8").tobytes()
        sealed = trailer.crc.to_bytes(CRC_BYTES, "little") + body
        return sealed + _SEAL.pack(xxhash.xxh3_64_intdigest(sealed))

    def read_tail(self, tail: bytes) -> Trailer | None:
        """The trailer, or None when these bytes do not begin with one that was written whole."""
        sealed = tail[: self.proof_bytes - _SEAL.size]
        if len(tail) < self.proof_bytes or _SEAL.unpack_from(tail, len(sealed))[0] != xxhash.xxh3_64_intdigest(sealed):
            return None
        body = sealed[CRC_BYTES:]
        magic, key, generation, checksum, tokens, layers = _HEAD.unpack_from(body)
        sums = np.frombuffer(body, "<u8", self.num_layers, _HEAD.size)
        if magic != MAGIC or layers != self.num_layers or block_sum(sums) != checksum:
            return None
        return Trailer(key, generation, checksum, tokens, sums, int.from_bytes(sealed[:CRC_BYTES], "little"))


def bytes_on_disk(layout: KVLayout, overhead_bytes: int | None = None) -> int:
    """Of one block with its checksums and padding; the most where it is encoded."""
    stored = layout.block_bytes + (overhead_bytes or 0) + CRC_BYTES
    return int(_whole_pages(stored + _trailer_bytes(layout.num_layers)))


def _trailer_bytes(num_layers: int) -> int:
    return _HEAD.size + 8 * num_layers + _SEAL.size


def _whole_pages(nbytes: Any) -> Any:
    return (nbytes + (PAGE_BYTES - 1)) // PAGE_BYTES * PAGE_BYTES
