"""In which form the blocks of one layer group lie in host slots, and how many slots each takes there.

Where the host tier has a format, a whole named block is packed into one slot; a tail, or a block whose values do not fit,
stays in full precision and takes several, linked. Without a format every block takes one slot and nothing here does
anything. The group's lock is held by whoever calls. Guards: what was rounded once is not rounded again as if it were
exact; where that cannot be helped it is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..tiers.host import HostSlab
from ..tiers.packed_slab import HostBlocks, PackedSlab
from ..tiers.streams import Rows, Stream
from .states import IntArray

if TYPE_CHECKING:
    from .group import BlockGroup, MoveKind


class HostForms:
    """Of one group. `packed` is its slab where that has a format."""

    def __init__(self, group: BlockGroup) -> None:
        self._group = group
        self.packed = group.slab if isinstance(group.slab, PackedSlab) else None

    @property
    def most_slots(self) -> int:
        """Slots that one block can take."""
        return self.packed.width if self.packed is not None else 1

    @property
    def text(self) -> str:
        return self.packed.fmt.text if self.packed is not None else self._group.layout.format_text

    @property
    def slot_bytes(self) -> int:
        return self.packed.fmt.block_bytes if self.packed is not None else self._group.layout.block_bytes

    @property
    def rows_like_pages(self) -> Rows | None:
        """Slots that computing reads where they are, as it reads pages; None where it cannot, or they have another form.

        Slots of a daemon are rows that it may exchange.
        """
        slab = self._group.slab
        is_ours = isinstance(slab, HostSlab) and self.packed is None and slab.num_slots > 0
        return slab.rows if is_ours and self._group.backend.reads_host else None

    # ------------------------------------------------------------------ how many slots
    def slots_of(self, blocks: IntArray, *, below: bool = False) -> int:
        """Slots that these blocks take when they come from the device, or from below."""
        return len(blocks) if self.packed is None else int(self._widths(blocks, below).sum())

    def fitting(self, blocks: IntArray, room: int, *, below: bool = False) -> tuple[IntArray, int]:
        """The first of these blocks that `room` slots hold together, and how many slots that is."""
        if self.packed is None:
            return blocks[:room], min(len(blocks), room)
        ends = np.cumsum(self._widths(blocks, below))
        count = int(np.searchsorted(ends, room, side="right"))
        return blocks[:count], int(ends[count - 1]) if count else 0

    def slots_held(self, blocks: IntArray) -> int:
        """Slots that these blocks take now, each of which is in the host tier."""
        return len(blocks) if self.packed is None else int(self._widths_now(blocks).sum())

    def giving(self, blocks: IntArray, wanted: int) -> tuple[IntArray, int]:
        """The first of these hosted blocks whose slots are enough, and how many those are (fewer: all blocks)."""
        if self.packed is None:
            return blocks[: max(wanted, 0)], min(len(blocks), max(wanted, 0))
        ends = np.cumsum(self._widths_now(blocks))
        count = min(len(blocks), int(np.searchsorted(ends, wanted)) + 1) if wanted > 0 else 0
        return blocks[:count], int(ends[count - 1]) if count else 0

    def stage(self, blocks: IntArray, slots: IntArray, *, below: bool = False) -> IntArray:
        """Free slots become STAGING for these blocks; returns the one that each block begins in."""
        host = self._group.host
        if self.packed is None:
            host.stage(slots, blocks)
            return slots
        widths = self._widths(blocks, below)
        whole = np.flatnonzero(widths > 1)
        first, rest = slots[: len(blocks)], slots[len(blocks) :].reshape(len(whole), self.most_slots - 1)
        host.stage(first, blocks)
        if len(whole):
            host.take_along(rest.reshape(-1), np.repeat(blocks[whole], rest.shape[1]))
            self.packed.link(first[whole], rest)
        return first

    def let_go(self, slots: IntArray) -> None:
        """These slots are free again, and with them what belonged to them."""
        if self.packed is not None and len(rest := self.packed.unlink(slots)):
            self._group.host.drop(rest)
        self._group.slab.let_go(slots)

    # ------------------------------------------------------------------ copies
    def get(self, stream: Stream, pages: IntArray, slots: IntArray) -> None:
        """Queue copies of slots to pages."""
        group = self._group
        if self.packed is None:
            stream.copy_rows(group.pool.rows, pages, group.slab.rows, group.slab.place(slots))
        else:
            self.packed.get(stream, group.pool.rows, pages, slots)

    def get_layer(self, stream: Stream, layer: int, target: Rows, target_rows: IntArray, slots: IntArray) -> None:
        """Queue copies of one layer of these slots' blocks to rows of layer_bytes, in full precision."""
        if self.packed is not None:
            self.packed.get_layer(stream, layer, target, target_rows, slots)
            return
        slab, size = self._group.slab, self._group.layout.layer_bytes
        source = slab.rows[:, layer * size : (layer + 1) * size]
        stream.copy_rows(target, target_rows, source, slab.place(slots))

    def put(self, stream: Stream, slots: IntArray, pages: IntArray) -> None:
        """Queue copies of pages to slots."""
        group = self._group
        if self.packed is None:
            stream.copy_rows(group.slab.rows, group.slab.place(slots), group.pool.rows, pages)
        else:
            self._count_again(group.pages.block[pages], ~self.packed.is_whole(slots))
            self.packed.put(stream, slots, group.pool.rows, pages)

    def for_disk(self, slots: IntArray) -> Rows | HostBlocks:
        """What the workers of the tier below read these slots from and write them to."""
        return self._group.slab.rows if self.packed is None else self.packed.blocks(slots)

    # ------------------------------------------------------------------ rounding
    def rounded(self, blocks: IntArray, slots: IntArray) -> None:
        """Pages of these blocks were filled from these slots."""
        if self.packed is not None:
            self._group.directory.is_rounded[blocks] = ~self.packed.is_whole(slots)

    def keep_whole(self, blocks: IntArray) -> None:
        """The format cannot hold these blocks' values; they stay in full precision from now on."""
        self._group.directory.is_unpackable[blocks] = True
        self._group.counters.add("unpackable_blocks", len(blocks))

    def _count_again(self, blocks: IntArray, is_packed: npt.NDArray[np.bool_]) -> None:
        """A page that was filled from a packed block goes down again, because that copy is gone."""
        again = int((self._group.directory.is_rounded[blocks] & is_packed).sum())
        if again:
            self._group.counters.add("rounded_again_blocks", again)

    # ------------------------------------------------------------------ bytes
    def moved_bytes(self, kind: MoveKind, blocks: IntArray, source: IntArray, target: IntArray) -> int:
        """Bytes of these blocks on their way, each in the form that travels."""
        if kind in ("host_to_device", "device_to_host"):
            slots = source if kind == "host_to_device" else target
            return (
                len(blocks) * self._group.layout.block_bytes if self.packed is None else self.packed.held_bytes(slots)
            )
        cold = self._group.cold
        if cold is None or not cold.is_lossy:
            return len(blocks) * self._group.layout.block_bytes
        if kind == "host_to_nvme":
            whole = self.packed.is_whole(source) if self.packed is not None else ~self._may_pack(blocks)
            return int(np.where(whole, self._group.layout.block_bytes, cold.block_bytes).sum())
        return int(cold.stored_bytes(blocks).sum())

    def layer_bytes(self, slots: IntArray, layer: int) -> int:
        """Bytes of one layer of the blocks in these slots."""
        return (
            len(slots) * self._group.layout.layer_bytes
            if self.packed is None
            else self.packed.layer_bytes(slots, layer)
        )

    def cold_layer_bytes(self, blocks: IntArray, layer: int) -> int:
        """Bytes of one layer of these blocks where they lie below."""
        size, cold = self._group.layout.layer_bytes, self._group.cold
        if cold is None or cold.fmt is None:
            return len(blocks) * size
        whole = int((cold.stored_bytes(blocks) > self._group.layout.block_bytes).sum())
        return whole * size + (len(blocks) - whole) * cold.fmt.layer_bytes(layer)

    # ------------------------------------------------------------------ inside
    def _widths(self, blocks: IntArray, below: bool) -> IntArray:
        cold = self._group.cold
        if below and cold is not None:
            whole = cold.stored_bytes(blocks) > self._group.layout.block_bytes
        else:
            whole = ~self._may_pack(blocks)
        return np.where(whole, self.most_slots, 1)

    def _widths_now(self, blocks: IntArray) -> IntArray:
        assert self.packed is not None
        whole = self.packed.is_whole(self._group.directory.host_slot[blocks])
        return np.where(whole, self.most_slots, 1)

    def _may_pack(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whole, named, so never written again, and of values that the format can hold."""
        d, size = self._group.directory, self._group.layout.block_size
        is_whole: npt.NDArray[np.bool_] = d.is_named[blocks] & (d.tokens[blocks] == size) & ~d.is_unpackable[blocks]
        return is_whole
