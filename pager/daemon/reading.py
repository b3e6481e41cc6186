"""Lease requests under way: keys become slots to read from, as soon as the blocks are up.

A request that has to wait for the disk is looked at again whenever a copy has finished. Every block that is up is leased at
once, so that two requests in a small slab cannot push each other's blocks out; what finds no room in time is answered
"no room" and asked for again by the client. While it waits, the request refers to its blocks (none of their ids is reused).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..core import Core
from ..siblings import read_along
from ..states import IntArray
from .holdings import Holdings

MISS, NO_ROOM = -1, -2


class LeaseRequest:
    """Blocks of one group that one client wants to read. `blocks`: NOWHERE where it may not or there is none."""

    def __init__(
        self,
        core: Core,
        holdings: Holdings,
        blocks: IntArray,
        deadline_s: float,
    ) -> None:
        self._core, self._holdings, self.group = core, holdings, holdings.group
        self.blocks, self.deadline_s = blocks, deadline_s
        self.slots = np.full(len(blocks), MISS, np.int64)
        self.generations = np.zeros(len(blocks), np.uint64)
        self._waits = blocks >= 0
        self._referred = blocks[self._waits]
        self.group.ref(self._referred)
        self.group.touch(np.unique(self._referred))
        self._awaited: IntArray | None = None

    @property
    def references(self) -> IntArray:
        return self._referred

    def step(self) -> bool:
        """Lease what is up, start reads for what is not. True when every block has its answer."""
        self._lease_those_up()
        self._give_up_lost()
        if self._waits.any():
            self._start_reads()
        self._say_awaited()
        is_over = not self._waits.any() or self._core.clock() > self.deadline_s or self._holdings.room() == 0
        if is_over:
            self.end()
        return is_over

    def end(self) -> None:
        """Whatever is not there yet is "no room"; the references go."""
        self.slots[self._waits] = NO_ROOM
        self._waits[:] = False
        self._say_awaited()
        referred, self._referred = self._referred, self._referred[:0]
        self.group.unref(referred)

    # ------------------------------------------------------------------ one look
    def _waiting(self) -> tuple[IntArray, IntArray]:
        index = np.flatnonzero(self._waits)
        return index, self.blocks[index]

    def _lease_those_up(self) -> None:
        index, blocks = self._waiting()
        up = self._within_pins(index[self.group.directory.in_host(blocks)])[: self._holdings.room()]
        slots = self.group.directory.host_slot[self.blocks[up]]
        self._holdings.lease(slots)
        self.slots[up] = slots
        self.generations[up] = self.group.host.generation[slots]
        self._waits[up] = False

    def _give_up_lost(self) -> None:
        index, blocks = self._waiting()
        d = self.group.directory
        gone: npt.NDArray[np.bool_] = ~d.is_valid(blocks) & (d.host_slot[blocks] < 0)
        self._waits[index[gone]] = False

    def _start_reads(self) -> None:
        group, d = self.group, self.group.directory
        _, blocks = self._waiting()
        cold = np.unique(blocks[(d.host_slot[blocks] < 0) & d.nvme_valid[blocks]])
        cold = cold[: self._holdings.room()]
        if group.cold is None or not len(cold):
            return
        for own in self._core.quotas.by_owner(group, cold):
            asker = int(d.owner[own[0]])
            self._core.make_host_room(group, len(own), asker)
            for batch in group.batches(own[: group.leaving.host_room(asker=asker)]):
                slots = group.take_host_slots(len(batch), asker=asker)
                if slots is None:
                    break
                read_along(group, batch, slots, asker)

    def _within_pins(self, index: IntArray) -> IntArray:
        """Of these places, those whose namespaces may hold more slots now."""
        kept = []
        for own in self._core.quotas.by_owner(self.group, self.blocks[index]):
            places = index[np.isin(self.blocks[index], own)]
            kept.append(places[: self._core.quotas.pins_left(int(self.group.directory.owner[own[0]]))])
        return np.sort(np.concatenate(kept)) if kept else index

    def _say_awaited(self) -> None:
        """What is coming up for us makes room for nobody."""
        _awaited = self._awaited
        self.group.awaited = [other for other in self.group.awaited if other is not _awaited]
        _, blocks = self._waiting()
        self._awaited = blocks[self.group.directory.host_slot[blocks] >= 0] if len(blocks) else None
        if self._awaited is not None and len(self._awaited):
            self.group.awaited.append(self._awaited)
