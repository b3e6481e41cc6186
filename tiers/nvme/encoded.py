"""Blocks of one layer group under a codec, to and from segment files.

A chunk takes the pages that it and its trailer need; what its slot held behind them before is given back to the file
system. A read fetches those pages, proves them as they are stored (seal, key, generation, crc) before a decoder sees
them, and then proves what came out by the layer sums that the seal covers. One layer costs the decoding of its block.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from ..checksum import block_sum, layer_sums
from ..layout import KVLayout
from ..streams import IntArray, Rows
from .blocks import Stamps, names_it
from .codecs import BlockCodec
from .files import Scratch, SegmentFiles
from .layout import CRC_BYTES, Geometry, Trailer
from .segment_io import SegmentIo
from .slots import Run

NUM_ENCODING = len(os.sched_getaffinity(0))
Bytes = npt.NDArray[np.uint8]


class EncodedIo:
    """Moves blocks of one layer group. Called from many workers at once."""

    def __init__(
        self, io: SegmentIo, files: SegmentFiles, layout: KVLayout, geometry: Geometry, codec: BlockCodec
    ) -> None:
        self._io, self._files, self._layout, self._geometry, self._codec = io, files, layout, geometry, codec
        self._images, self._blocks = Scratch(), Scratch()
        self._working = threading.Semaphore(NUM_ENCODING)  # more that encode at once than cores leave none for the disk

    def write(self, group: int, run: Run, source: Rows, rows: IntArray, stamps: Stamps, *, is_empty: bool) -> bool:
        """Write the run's blocks and fill in their checksums and sizes. False when not all bytes went down."""
        segment, stride = (group, run.segment), self._geometry.stride
        for i in range(run.count):
            start = run.offset + i * stride
            image = self._image(source[rows[i]], stamps[i : i + 1])
            if not self._io.write(segment, [image.data], start, len(image), is_empty=is_empty):
                return False
            self._files.punch(segment, start + len(image), start + stride)
        return True

    def read(self, group: int, run: Run, target: Rows, rows: IntArray, stamps: Stamps) -> npt.NDArray[np.bool_]:
        """Read the run's blocks into target rows; False for each that is not the block that its stamp names."""
        ok = np.zeros(run.count, bool)
        for i in range(run.count):
            start = run.offset + i * self._geometry.stride
            ok[i] = self._read_block(group, run.segment, start, target[rows[i]], stamps[i])
        return ok

    def read_slice(self, group: int, slot: int, layer: int, row: Bytes, stamp: Any) -> bool:
        """Read one layer of one block into row. Decodes the whole block."""
        segment, start = self._geometry.place(slot)
        block = self._blocks.take(self._layout.block_bytes)
        fetched = self._fetch(group, segment, start, stamp)
        if fetched is None or not self._decode(fetched[0], block, stamp):
            return False
        size = self._layout.layer_bytes
        row[:] = block[layer * size : (layer + 1) * size]
        return self._proves_slice(row, fetched[1], layer)

    # ------------------------------------------------------------------ what encryption does in another way
    def _encode(self, row: Bytes, stamp: Stamps) -> tuple[Any, npt.NDArray[np.uint64]]:
        """The chunk's bytes, and the sums that its trailer keeps."""
        return self._codec.encode(row), layer_sums(self._layout, row)

    def _decode(self, encoded: Bytes, row: Bytes, stamp: Any) -> bool:
        try:
            with self._working:
                self._codec.decode(encoded, row)
        except ValueError:
            return False
        return True

    def _proves(self, row: Bytes, trailer: Trailer) -> bool:
        return np.array_equal(layer_sums(self._layout, row), trailer.layer_sums)

    def _proves_slice(self, row: Bytes, trailer: Trailer, layer: int) -> bool:
        return xxhash.xxh3_64_intdigest(row.data) == int(trailer.layer_sums[layer])

    # ------------------------------------------------------------------ inside
    def _image(self, row: Bytes, stamp: Stamps) -> Bytes:
        """The pages of a chunk with its trailer; its checksum and size go into the stamp."""
        geometry = self._geometry
        with self._working:
            encoded, sums = self._encode(row, stamp)
            crc = crc32c.crc32c(encoded)
        stored = len(encoded) + CRC_BYTES
        assert geometry.may_store(stored), f"{len(encoded)} bytes of a block of {geometry.block_bytes}"
        stamp["checksum"], stamp["stored_bytes"] = block_sum(sums), stored
        key, generation, checksum, tokens, *_ = stamp[0].tolist()
        proof = geometry.proof(Trailer(key, generation, checksum, tokens, sums, crc))
        image = self._images.take(geometry.footprint(stored))
        image[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        image[len(encoded) : len(encoded) + len(proof)] = np.frombuffer(proof, np.uint8)
        image[len(encoded) + len(proof) :] = 0
        return image

    def _read_block(self, group: int, segment: int, start: int, row: Bytes, stamp: Any) -> bool:
        fetched = self._fetch(group, segment, start, stamp)
        if fetched is None or not self._decode(fetched[0], row, stamp):
            return False
        with self._working:
            return self._proves(row, fetched[1])

    def _fetch(self, group: int, segment: int, start: int, stamp: Any) -> tuple[Bytes, Trailer] | None:
        """The chunk that the stamp names, proven as it is stored, and its trailer; None when it is not there."""
        geometry, stored = self._geometry, int(stamp["stored_bytes"])
        if not geometry.may_store(stored):
            return None
        image = self._images.take(geometry.footprint(stored))
        if not self._io.read((group, segment), [image.data], start, len(image)):
            return None
        encoded = image[: stored - CRC_BYTES]
        trailer = geometry.read_tail(image[len(encoded) : len(encoded) + geometry.proof_bytes].tobytes())
        if trailer is None or not names_it(trailer, stamp):
            return None
        with self._working:
            is_whole = crc32c.crc32c(encoded.data) == trailer.crc
        return (encoded, trailer) if is_whole else None
