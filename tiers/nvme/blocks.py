"""Blocks to and from segment files: one call to the kernel per run of slots, every byte checked on the way in.

Aligned rows go straight between the slab and the disk; others through a worker's scratch buffer. What a read returns
must carry the key and generation that the manifest lists and match the checksum, or it is not the block. Trailers that
were proven once are remembered (bounded), so that reading a block layer by layer costs one call per slice.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checksum import block_sum, layer_sums_and_crc, slice_sum
from ..layout import KVLayout
from ..streams import IntArray, Rows
from .files import Scratch, Segment, Tails, are_aligned, is_aligned
from .layout import PAGE_BYTES, Geometry, Trailer
from .segment_io import SegmentIo
from .slots import Run

MAX_TRAILERS = 4096  # remembered
# Threads that hash at once: cores that read the same memory together each take longer over a byte, two by half.
NUM_HASHING = max(1, len(os.sched_getaffinity(0)) // 2)
Stamps = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call to the kernel: a run of blocks, each with its tail behind it. `tails` may be more than there are blocks."""

    segment: Segment
    offset: int
    wanted: int
    buffers: list[Any]
    rows: list[npt.NDArray[np.uint8]]
    tails: npt.NDArray[np.uint8]


class BlockIo:
    """Moves blocks that are stored as they are, of all layer groups of one store. Called from many workers at once."""

    def __init__(
        self,
        io: SegmentIo,
        layouts: Sequence[KVLayout],
        geometries: Sequence[Geometry],
        *,
        with_checksums: bool = True,
    ) -> None:
        self._io, self._layouts, self._geometries = io, layouts, geometries
        self._with_checksums = with_checksums
        self._scratch, self._tails = Scratch(), Tails()
        self._lock = threading.Lock()
        self._hashing = threading.Semaphore(NUM_HASHING)
        self._trailers: OrderedDict[tuple[int, int, int], npt.NDArray[np.uint64]] = OrderedDict()

    def write(self, group: int, run: Run, source: Rows, rows: IntArray, stamps: Stamps, *, is_empty: bool) -> bool:
        """Write the run's blocks and fill in their checksums and sizes. False when not all bytes went down.

        `is_empty`: nothing is listed in this segment (see SegmentFiles.use).
        """
        if self.goes_straight(group, source, rows):
            call = self.before_write(group, run, source, rows, stamps)
            is_written = self.call_write(call, is_empty=is_empty)
            self.after_write(call)
            return is_written
        geometry = self._geometries[group]
        staged = self._scratch.take(run.count * geometry.stride).reshape(run.count, geometry.stride)
        stamps["stored_bytes"] = geometry.most_stored_bytes
        for i in range(run.count):
            row = staged[i, : geometry.block_bytes]
            row[:] = source[rows[i]]
            staged[i, geometry.block_bytes :] = np.frombuffer(self._tail(group, row, stamps[i : i + 1]), np.uint8)
        return self._io.write((group, run.segment), [staged.data], run.offset, staged.nbytes, is_empty=is_empty)

    def read(self, group: int, run: Run, target: Rows, rows: IntArray, stamps: Stamps) -> npt.NDArray[np.bool_]:
        """Read the run's blocks into target rows; False for each that is not the block that its stamp names."""
        if self.goes_straight(group, target, rows):
            call = self.before_read(group, run, target, rows)
            return self.after_read(call, stamps, is_read=self.call_read(call))
        geometry, ok = self._geometries[group], np.zeros(run.count, bool)
        staged = self._scratch.take(run.count * geometry.stride).reshape(run.count, geometry.stride)
        if not self._io.read((group, run.segment), [staged.data], run.offset, staged.nbytes):
            return ok
        for i in range(run.count):
            row = target[rows[i]]
            row[:] = staged[i, : geometry.block_bytes]
            ok[i] = self.proves(group, staged[i, geometry.block_bytes :].tobytes(), self._sum(row), stamps[i])
        return ok

    # ------------------------------------------------------------------ the same in steps, for rows that go straight
    def goes_straight(self, group: int, memory: Rows, rows: IntArray) -> bool:
        """Whether the kernel can be handed these rows as they lie."""
        return self._geometries[group].block_bytes % PAGE_BYTES == 0 and are_aligned(memory, rows)

    def before_write(self, group: int, run: Run, source: Rows, rows: IntArray, stamps: Stamps) -> BlockCall:
        """Everything of `write` but the call itself; then `call_write`, then `after_write`."""
        call = self.before_read(group, run, source, rows)
        stamps["stored_bytes"] = self._geometries[group].most_stored_bytes
        for i, (row, tail) in enumerate(zip(call.rows, call.tails)):
            tail[:] = np.frombuffer(self._tail(group, row, stamps[i : i + 1]), np.uint8)
        return call

    def call_write(self, call: BlockCall, *, is_empty: bool) -> bool:
        return self._io.write(call.segment, call.buffers, call.offset, call.wanted, is_empty=is_empty)

    def after_write(self, call: BlockCall) -> None:
        self._tails.give_back(call.tails)

    def before_read(self, group: int, run: Run, target: Rows, rows: IntArray) -> BlockCall:
        """What `call_read` asks the kernel for; then `after_read`."""
        geometry = self._geometries[group]
        memory = [target[row] for row in rows.tolist()]
        tails = self._tails.lend(run.count, geometry.tail_bytes)
        buffers = [each.data for pair in zip(memory, tails) for each in pair]
        return BlockCall((group, run.segment), run.offset, run.count * geometry.stride, buffers, memory, tails)

    def call_read(self, call: BlockCall) -> bool:
        return self._io.read(call.segment, call.buffers, call.offset, call.wanted)

    def after_read(self, call: BlockCall, stamps: Stamps, *, is_read: bool) -> npt.NDArray[np.bool_]:
        """False for each row that does not hold the block which its stamp names."""
        ok = np.zeros(len(call.rows), bool)
        if is_read:
            for i, (row, tail) in enumerate(zip(call.rows, call.tails)):
                ok[i] = self.proves(call.segment[0], tail.tobytes(), self._sum(row), stamps[i])
        self._tails.give_back(call.tails)
        return ok

    # ------------------------------------------------------------------ parts and slices
    def reads_parts(self, group: int, row: npt.NDArray[np.uint8]) -> bool:
        """Whether `read_part` can put this group's bytes straight into such a row."""
        return self._with_checksums and self._geometries[group].block_bytes % PAGE_BYTES == 0 and is_aligned(row)

    def read_part(
        self, group: int, slot: int, row: npt.NDArray[np.uint8], first: int, end: int
    ) -> tuple[int, bytes] | None:
        """Read bytes [first, end) of a block, whole pages, into its row: their crc, and the tail behind a last part."""
        geometry = self._geometries[group]
        segment, offset = geometry.place(slot)
        part, tail = row[first:end], self._scratch.take(geometry.tail_bytes if end == len(row) else 0)
        buffers = [part.data, tail.data] if len(tail) else [part.data]
        if not self._io.read((group, segment), buffers, offset + first, len(part) + len(tail)):
            return None
        return slice_sum(part), tail.tobytes()  # beside another part's: somebody waits for this block

    def proves(self, group: int, tail: bytes, crc: int, stamp: Any) -> bool:
        """Whether bytes of this crc before this tail are the block that the stamp names.

        The seal binds the trailer's crc to the key and to the layer sums that the manifest lists.
        """
        trailer = self._geometries[group].read_tail(tail)
        return trailer is not None and names_it(trailer, stamp) and (crc == trailer.crc or not self._with_checksums)

    def read_slice(self, group: int, slot: int, layer: int, row: npt.NDArray[np.uint8], stamp: Any) -> bool:
        """Read one layer of one block into row, proven by the trailer's sum of that layer."""
        sums = self._trailer_sums(group, slot, stamp)
        if sums is None:
            return False
        geometry, size = self._geometries[group], self._layouts[group].layer_bytes
        segment, offset = geometry.place(slot)
        start = layer * size
        if is_aligned(row) and start % PAGE_BYTES == 0:
            if not self._io.read((group, segment), [row.data], offset + start, size):
                return False
        else:
            first = start // PAGE_BYTES * PAGE_BYTES
            wanted = -(-(start + size - first) // PAGE_BYTES) * PAGE_BYTES
            around = self._scratch.take(wanted)
            if not self._io.read((group, segment), [around.data], offset + first, wanted):
                return False
            row[:] = around[start - first : start - first + size]
        return slice_sum(row) == int(sums[layer])

    def forget(self, group: int, slots: IntArray) -> None:
        """These slots hold other blocks from now on."""
        with self._lock:
            if self._trailers:
                gone = set(slots.tolist())
                for known in [k for k in self._trailers if k[0] == group and k[1] in gone]:
                    del self._trailers[known]

    # ------------------------------------------------------------------ inside
    def _tail(self, group: int, row: npt.NDArray[np.uint8], stamp: Stamps) -> bytes:
        """Everything behind a block; its checksum goes into the stamp."""
        layout = self._layouts[group]
        if self._with_checksums:
            with self._hashing:
                sums, crc = layer_sums_and_crc(layout, row)
        else:  # for measuring; stock readers refuse such a block
            sums, crc = np.zeros(layout.num_layers, np.uint64), 0
        stamp["checksum"] = block_sum(sums)
        key, generation, checksum, tokens, *_ = stamp[0].tolist()
        return self._geometries[group].tail(Trailer(key, generation, checksum, tokens, sums, crc))

    def _sum(self, row: npt.NDArray[np.uint8]) -> int:
        if not self._with_checksums:
            return 0
        with self._hashing:
            return slice_sum(row)

    def _trailer_sums(self, group: int, slot: int, stamp: Any) -> npt.NDArray[np.uint64] | None:
        """Layer sums of the block that the stamp names, from memory or from its trailer; None when it is not there."""
        key = (group, slot, int(stamp["generation"]))
        with self._lock:
            sums = self._trailers.get(key)
            if sums is not None:
                self._trailers.move_to_end(key)
                return sums
        geometry = self._geometries[group]
        segment, offset = geometry.place(slot)
        first = geometry.block_bytes // PAGE_BYTES * PAGE_BYTES
        tail = self._scratch.take(geometry.stride - first)
        if not self._io.read((group, segment), [tail.data], offset + first, geometry.stride - first):
            return None
        trailer = geometry.read_tail(tail[geometry.block_bytes - first :].tobytes())
        if trailer is None or not names_it(trailer, stamp):
            return None
        with self._lock:
            self._trailers[key] = trailer.layer_sums
            while len(self._trailers) > MAX_TRAILERS:
                self._trailers.popitem(last=False)
        return trailer.layer_sums


def names_it(trailer: Trailer, stamp: Any) -> bool:
    """Whether a trailer is that of the block which the manifest lists."""
    return (
        trailer.key == stamp["key"].tobytes()
        and trailer.generation == int(stamp["generation"])
        and trailer.checksum == int(stamp["checksum"])
    )
