"""Host slots in a format: a slot is as large as a packed block, so the same memory holds more blocks.

A block that is not packed (a partial tail, or values that the format cannot hold) takes several slots, linked: the first
is the block's, the rest follow from it. Conversions run on the copy streams, never in the decode path: on a CPU straight
between pool and slots, on a GPU by way of a small buffer there, in stream order. Guards: which form a slot holds is
decided when it is taken and read from its links, never guessed from the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .formats import BlockFormat
from .host import HostMemory, HostSlab
from .streams import Backend, IntArray, Rows, Stream

STAGING_BYTES = 16 << 20  # on a GPU, for each direction: packed blocks between their slots and the kernels
NO_SLOT = -1
Bytes = npt.NDArray[np.uint8]


class PackedSlab(HostSlab):
    """rows: numpy uint8 [num_slots, fmt.block_bytes]; a block in full precision is spread over `width` of them."""

    def __init__(self, fmt: BlockFormat, num_slots: int, memory: HostMemory, backend: Backend) -> None:
        self.layout, self.fmt, self.num_slots = fmt.layout, fmt, num_slots
        self.rows = memory.alloc(num_slots, fmt.block_bytes, spread=True)
        self.nodes, self.node_rates = memory.placement.parts(num_slots), memory.placement.rates
        self.width = width_of(fmt)
        self._rest = np.full((num_slots, self.width - 1), NO_SLOT, np.int64)
        self._backend = backend
        self._staging: dict[str, Any] = {}  # by stream, on a GPU

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.fmt.block_bytes

    # ------------------------------------------------------------------ links
    def link(self, slots: IntArray, rest: IntArray) -> None:
        """These slots hold blocks in full precision, the rest of each in `rest` [n, width - 1]."""
        self._rest[slots] = rest

    def unlink(self, slots: IntArray) -> IntArray:
        """These slots are let go; returns the slots that belonged to them."""
        rest = self._rest[slots]
        self._rest[slots] = NO_SLOT
        return rest[rest != NO_SLOT]

    def linked(self, slots: IntArray) -> IntArray:
        """The slots that belong to these, in order."""
        rest = self._rest[slots]
        return np.sort(rest[rest != NO_SLOT])

    def is_whole(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each slot holds a block in full precision."""
        return self._rest[slots, 0] != NO_SLOT

    def layer_bytes(self, slots: IntArray, layer: int) -> int:
        """Bytes of one layer of the blocks in these slots."""
        whole = int(self.is_whole(slots).sum())
        return whole * self.layout.layer_bytes + (len(slots) - whole) * self.fmt.layer_bytes(layer)

    def held_bytes(self, slots: IntArray) -> int:
        """Bytes of the blocks in these slots, each in its form."""
        whole = int(self.is_whole(slots).sum())
        return whole * self.layout.block_bytes + (len(slots) - whole) * self.fmt.block_bytes

    # ------------------------------------------------------------------ to and from the device
    def put(self, stream: Stream, slots: IntArray, pool: Rows, pages: IntArray) -> None:
        """Queue copies of pages to slots, packed but for those that are linked. An UnpackableError names pages."""
        whole = self.is_whole(slots)
        if not whole.all():
            self._put_packed(stream, slots[~whole], pool, pages[~whole])
        for piece, part in self._pieces(slots[whole]):
            stream.copy_rows(self.rows[:, : part.stop - part.start], piece, pool[:, part], pages[whole])

    def get(self, stream: Stream, pool: Rows, pages: IntArray, slots: IntArray) -> None:
        """Queue copies of slots to pages, in full precision."""
        whole = self.is_whole(slots)
        if not whole.all():
            self._get_packed(stream, pool, pages[~whole], slots[~whole])
        for piece, part in self._pieces(slots[whole]):
            stream.copy_rows(pool[:, part], pages[whole], self.rows[:, : part.stop - part.start], piece)

    def get_layer(self, stream: Stream, layer: int, target: Rows, target_rows: IntArray, slots: IntArray) -> None:
        """Queue copies of one layer of each slot's block to target rows of layer_bytes, in full precision."""
        from .packing import unpack_layer

        whole, size = self.is_whole(slots), self.layout.layer_bytes
        if not whole.all():
            low, high = self.fmt.starts[layer : layer + 2]
            rows, ids, to = self.rows, slots[~whole], target_rows[~whole]
            if isinstance(target, np.ndarray):
                stream.run(_bound(unpack_layer, self.fmt, layer, rows[:, low:high], ids, target, to))
            else:
                for buffer, part, own in self._staged(stream, len(ids)):
                    stream.copy_rows(buffer[:, low:high], own, rows[:, low:high], ids[part])
                    stream.run(_bound(unpack_layer, self.fmt, layer, buffer[:, low:high], own, target, to[part]))
        for piece, part in self._pieces(slots[whole]):
            first, end = max(part.start, layer * size), min(part.stop, (layer + 1) * size)
            if first < end:
                source = self.rows[:, first - part.start : end - part.start]
                stream.copy_rows(
                    target[:, first - layer * size : end - layer * size], target_rows[whole], source, piece
                )

    # ------------------------------------------------------------------ to and from a disk, and to whoever reads in place
    def blocks(self, slots: IntArray) -> HostBlocks:
        """These slots as a disk's workers see them; their links as they are now."""
        return HostBlocks(self, dict(zip(slots.tolist(), self._rest[slots].tolist(), strict=True)))

    def read(self, slots: IntArray) -> Bytes:
        """A copy of these blocks in full precision, uint8 [n, block_bytes]. The slots must be held."""
        from .packing import unpack

        out = np.empty((len(slots), self.layout.block_bytes), np.uint8)
        whole = self.is_whole(slots)
        if not whole.all():
            unpack(self.fmt, self.rows, slots[~whole], out, np.flatnonzero(~whole))
        for piece, part in self._pieces(slots[whole]):
            out[np.flatnonzero(whole), part] = self.rows[piece, : part.stop - part.start]
        return out

    # ------------------------------------------------------------------ inside
    def _pieces(self, slots: IntArray) -> list[tuple[IntArray, slice]]:
        """For linked slots: which slots hold which bytes of their blocks."""
        if not len(slots):
            return []
        size, end = self.fmt.block_bytes, self.layout.block_bytes
        columns = [slots, *self._rest[slots].T]
        return [(column.copy(), slice(i * size, min((i + 1) * size, end))) for i, column in enumerate(columns)]

    def _put_packed(self, stream: Stream, slots: IntArray, pool: Rows, pages: IntArray) -> None:
        from .packing import pack

        if isinstance(pool, np.ndarray):
            stream.run(_bound(pack, self.fmt, pool, pages, self.rows, slots))
            return
        for buffer, part, own in self._staged(stream, len(slots)):
            stream.run(_bound(pack, self.fmt, pool, pages[part], buffer, own))
            stream.copy_rows(self.rows, slots[part], buffer, own)

    def _get_packed(self, stream: Stream, pool: Rows, pages: IntArray, slots: IntArray) -> None:
        from .packing import unpack

        if isinstance(pool, np.ndarray):
            stream.run(_bound(unpack, self.fmt, self.rows, slots, pool, pages))
            return
        for buffer, part, own in self._staged(stream, len(slots)):
            stream.copy_rows(buffer, own, self.rows, slots[part])
            stream.run(_bound(unpack, self.fmt, buffer, own, pool, pages[part]))

    def _staged(self, stream: Stream, count: int) -> list[tuple[Any, slice, IntArray]]:
        """The stream's buffer on the device, for so many blocks in parts that it holds; used again in stream order."""
        if stream.name not in self._staging:
            rows = max(1, min(self.num_slots, STAGING_BYTES // self.fmt.block_bytes))
            self._staging[stream.name] = self._backend.alloc_device(rows, self.fmt.block_bytes)
        buffer = self._staging[stream.name]
        parts = [slice(i, min(i + len(buffer), count)) for i in range(0, count, len(buffer))]
        return [(buffer, part, np.arange(part.stop - part.start)) for part in parts]


class HostBlocks:
    """What a disk's workers get: `blocks[slot]` is one block in a slot. Stays true while the slots are held or staged."""

    def __init__(self, slab: PackedSlab, rest: dict[int, list[int]]) -> None:
        self.slab, self._rest = slab, rest

    def __getitem__(self, slot: int) -> HostBlock:
        rest = self._rest[int(slot)]
        return HostBlock(self.slab, int(slot), () if rest[0] == NO_SLOT else tuple(rest))


@dataclass(frozen=True, slots=True)
class HostBlock:
    """One block in a slot: packed, or in full precision with the rest of it in other slots."""

    slab: PackedSlab
    slot: int
    rest: tuple[int, ...]

    @property
    def fmt(self) -> BlockFormat | None:
        """None where it is in full precision."""
        return None if self.rest else self.slab.fmt

    def packed(self) -> Bytes:
        row: Bytes = self.slab.rows[self.slot]
        return row

    def read(self) -> Bytes:
        """A copy in full precision."""
        if not self.rest:
            return self.slab.read(np.array([self.slot]))[0]
        return self.slab.rows[[self.slot, *self.rest]].reshape(-1)[: self.slab.layout.block_bytes]

    def write(self, block: Bytes) -> None:
        """Take a block in full precision, packed where the slot is. Raises UnpackableError."""
        if not self.rest:
            from .packing import pack

            pack(self.slab.fmt, block[None], np.zeros(1, np.int64), self.slab.rows, np.array([self.slot]))
            return
        size = self.slab.fmt.block_bytes
        for i, slot in enumerate((self.slot, *self.rest)):
            piece = block[i * size : (i + 1) * size]
            self.slab.rows[slot, : len(piece)] = piece


def width_of(fmt: BlockFormat) -> int:
    """Slots that a block in full precision takes."""
    return -(-fmt.layout.block_bytes // fmt.block_bytes)


def make_slab(fmt: BlockFormat, num_slots: int, memory: HostMemory, backend: Backend) -> HostSlab:
    """The host tier of a layer group."""
    if not fmt.is_lossy:
        return HostSlab(fmt.layout, num_slots, memory)
    return PackedSlab(fmt, num_slots, memory, backend)


def _bound(fn: Any, *arguments: Any) -> Any:
    return lambda: fn(*arguments)
