"""Blocks of one layer group in a format, to and from segment files: quantised by the disk's workers, or taken as they are.

Everything that encoded.py does, but for what is stored and what proves it: the crc over the stored bytes, bound to key and
generation by the trailer's seal, because what a quantised block decodes to is nothing to compare with. A block is whole,
and may be packed, once it is named with all its tokens. Guards: nothing is quantised twice. What the host tier holds in
this format, and what moves within the store, goes over byte for byte; a tail stays in full precision.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..checksum import layer_sums
from ..errors import UnpackableError
from ..formats import BlockFormat
from ..layout import KVLayout
from ..packed_slab import HostBlock
from .blocks import MAX_TRAILERS, Stamps, names_it
from .encoded import Bytes, EncodedIo
from .files import SegmentFiles
from .frames import FIRST, HEADER_BYTES, PagesCodec
from .layout import CRC_BYTES, PAGE_BYTES, Geometry, Trailer
from .segment_io import SegmentIo


class PagesIo(EncodedIo):
    """Moves frames between a disk and rows: blocks in full precision, host slots in a format, or frames of this store."""

    _codec: PagesCodec

    def __init__(
        self, io: SegmentIo, files: SegmentFiles, layout: KVLayout, geometry: Geometry, codec: PagesCodec
    ) -> None:
        super().__init__(io, files, layout, geometry, codec)
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint64]] = OrderedDict()  # sums of layers

    @property
    def fmt(self) -> BlockFormat:
        return self._codec.fmt

    def read_slice(self, group: int, slot: int, layer: int, row: Bytes, stamp: Any) -> bool:
        """Read one layer of one block into row, in full precision: its own bytes alone, proven by the trailer's sum."""
        segment, start = self._geometry.place(slot)
        sums = self._sums_of(group, segment, start, stamp)
        if sums is None:
            return False
        is_packed = self._codec.is_packed(int(stamp["stored_bytes"]))
        low, high = (
            self._codec.fmt.starts[layer : layer + 2] if is_packed else (layer * len(row), (layer + 1) * len(row))
        )
        part = self._read_part(group, segment, start, HEADER_BYTES + low, HEADER_BYTES + high)
        if part is None or xxhash.xxh3_64_intdigest(part.data) != int(sums[layer]):
            return False
        if not is_packed:
            row[:] = part
            return True
        from ..packing import unpack_layer

        with self._working:
            unpack_layer(self._codec.fmt, layer, part[None], FIRST, row[None], FIRST)
        return True

    def _sums_of(self, group: int, segment: int, start: int, stamp: Any) -> npt.NDArray[np.uint64] | None:
        """Layer sums of the frame that the stamp names, from memory or its trailer; None when it is not there."""
        geometry, stored = self._geometry, int(stamp["stored_bytes"])
        key = (segment, start, int(stamp["generation"]))
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        first = stored - CRC_BYTES
        tail = self._read_part(group, segment, start, first, first + geometry.proof_bytes)
        trailer = None if tail is None else geometry.read_tail(tail.tobytes())
        if trailer is None or not names_it(trailer, stamp):
            return None
        with self._lock:
            self._known[key] = trailer.layer_sums
            while len(self._known) > MAX_TRAILERS:
                self._known.popitem(last=False)
        return trailer.layer_sums

    def _read_part(self, group: int, segment: int, start: int, low: int, high: int) -> Bytes | None:
        """Bytes [low, high) of a frame and what lies behind it."""
        first = low // PAGE_BYTES * PAGE_BYTES
        around = self._images.take(-(-(high - first) // PAGE_BYTES) * PAGE_BYTES)
        if not self._io.read((group, segment), [around.data], start + first, len(around)):
            return None
        return around[low - first : high - first]

    def _encode(self, row: Any, stamp: Stamps) -> tuple[Any, npt.NDArray[np.uint64]]:
        frame = row.frame if isinstance(row, StoredFrame) else self._frame_of(row, int(stamp["tokens"][0]))
        if not len(frame):  # it was not read; what is written in its place is given back unlisted
            frame = self._codec.wrap(np.zeros(self.fmt.block_bytes, np.uint8), is_packed=True)
        return frame, self._sums(frame)

    def _frame_of(self, row: Any, tokens: int) -> Bytes:
        if not isinstance(row, HostBlock):
            return self._codec.frame(row, may_pack=tokens == self._layout.block_size)
        if row.fmt == self._codec.fmt:
            return self._codec.wrap(row.packed(), is_packed=True)
        return self._codec.frame(row.read(), may_pack=row.fmt is not None or tokens == self._layout.block_size)

    def _decode(self, encoded: Bytes, row: Any, stamp: Any) -> bool:
        try:
            with self._working:
                self._fill(encoded, row)
        except (ValueError, UnpackableError):
            return False
        return True

    def _fill(self, encoded: Bytes, row: Any) -> None:
        is_packed, payload = self._codec.open(encoded)
        if isinstance(row, StoredFrame):
            row.frame = encoded.copy()
        elif not isinstance(row, HostBlock):
            self._codec.decode(encoded, row)
        elif is_packed and row.fmt == self._codec.fmt:
            row.packed()[:] = payload
        else:
            block = np.empty(self._layout.block_bytes, np.uint8)
            self._codec.decode(encoded, block)
            row.write(block)

    def _proves(self, row: Any, trailer: Trailer) -> bool:
        return True  # the crc of the stored bytes did

    def _proves_slice(self, row: Bytes, trailer: Trailer, layer: int) -> bool:
        return True

    def _sums(self, frame: Bytes) -> npt.NDArray[np.uint64]:
        """Of the layers as they are stored: what the manifest's checksum of the block is made of."""
        is_packed, payload = self._codec.open(frame)
        if not is_packed:
            return layer_sums(self._layout, payload)
        starts = self._codec.fmt.starts
        parts = (payload[a:b] for a, b in pairwise(starts))
        return np.array([xxhash.xxh3_64_intdigest(part.data) for part in parts], np.uint64)


class StoredFrame:
    """A row that keeps a frame as it is stored: for moving blocks within a store, or to one of the same format."""

    def __init__(self) -> None:
        self.frame: Bytes = np.empty(0, np.uint8)
