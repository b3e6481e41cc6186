"""Host tier: one exact slab of slots per layer group, pinned where there is CUDA, and the memory that slabs are made of.

Bytes only; who is in which slot is the pager's business.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConfigError
from .layout import KVLayout
from .machine import Machine
from .memory import HUGE_PAGES, resident_bytes
from .numa import Placement
from .prefault import Prefault
from .streams import Backend, IntArray

_LOG = logging.getLogger("kvtier.host")


class HostMemory:
    """Makes the host tier's memory: on which nodes, in which pages, faulted in ahead or not; remembers what it could not.

    Raises: ConfigError for a choice that is unknown or that this machine cannot give.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        numa: str | int = "auto",
        huge_pages: str = "auto",
        machine: Machine | None = None,
    ) -> None:
        self._backend, self._machine = backend, machine or Machine()
        self._huge_pages = check_huge_pages(huge_pages)
        self.placement = Placement.choose(numa, near=backend.near_node, machine=self._machine)
        self.notices = [self.placement.notice] if self.placement.notice else []
        if self.placement.policy == "split" and backend.pinned:
            self.placement = self.placement.nearest()
            self._note(
                "host_numa='split': the driver gives pinned memory in one piece; it lies on the node near the device"
            )
        if huge_pages == "reserved" and backend.pinned:
            self._note("host_huge_pages='reserved' has no say: the driver chooses the pages of pinned memory")
        self._arrays: list[npt.NDArray[np.uint8]] = []
        self._prefault: Prefault | None = None
        self._huge_bytes: int | None = None

    def alloc(self, rows: int, row_bytes: int, *, spread: bool = False) -> npt.NDArray[np.uint8]:
        """Zeroed rows on the chosen nodes, on the nearest of them where they are not to be `spread` over a split memory.

        Raises: ConfigError when there is not that much.
        """
        made: npt.NDArray[np.uint8] | None = None
        placement = self.placement if spread else self.placement.nearest()
        try:
            with placement.nearest().around():
                made = self._alloc(rows, row_bytes)
            if not self._backend.pinned:  # fresh: no page of it is anywhere yet
                placement.bind(made)
        except OSError as error:
            self._note(
                f"the kernel refused to place host memory on nodes {', '.join(map(str, self.placement.nodes))} "
                f"({error.strerror}); in a container allow SYS_NICE, or start under numactl"
            )
            made = self._alloc(rows, row_bytes) if made is None else made
        self._arrays.append(made)
        return made

    def adopt(self, rows: npt.NDArray[np.uint8]) -> None:
        """Memory that was allocated elsewhere and belongs to this tier: it is faulted in and counted with the rest."""
        self._arrays.append(rows)

    def start_prefault(self) -> None:
        """Fault in, in the background, everything allocated so far. Pinned memory is there already."""
        if self._backend.pinned or self._prefault is not None:
            return
        is_set_apart = self._huge_pages == "reserved"
        room = (lambda: sys.maxsize) if is_set_apart else self._machine.memory_room_bytes
        self._prefault = Prefault(self._arrays, room=room)

    def status(self) -> dict[str, Any]:
        """Plain values. `huge_page_bytes` is None until prefaulting is done, and where the driver owns the pages."""
        total = sum(rows.nbytes for rows in self._arrays)
        found = {
            "prefault": "pinned" if self._backend.pinned else "off",
            "prefaulted_bytes": total if self._backend.pinned else 0,
            "prefault_total_bytes": total,
            "huge_page_bytes": None,
            "numa_policy": self.placement.policy,
            "numa_nodes": list(self.placement.nodes),
            "notices": list(self.notices),
        }
        if (running := self._prefault) is not None:
            found |= {
                "prefault": running.state,
                "prefaulted_bytes": running.done_bytes,
                "huge_page_bytes": self._huge_page_bytes() if running.state == "done" else None,
                "notices": [*self.notices, *([running.notice] if running.notice else [])],
            }
        return found

    def _huge_page_bytes(self) -> int:
        """Looked up once, when somebody asks: it takes some ms, which the first reads of a pager are better without."""
        if self._huge_bytes is None:
            self._huge_bytes = resident_bytes(self._arrays)[1]
        return self._huge_bytes

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop prefaulting. The memory lives as long as whoever uses it."""
        if self._prefault is not None:
            self._prefault.close(timeout_s)

    def _alloc(self, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        try:
            return self._backend.alloc_host(rows, row_bytes, huge_pages=self._huge_pages)
        except OSError as error:
            raise ConfigError(
                f"host_bytes: {rows * row_bytes} bytes of memory cannot be had ({error.strerror}); lower host_bytes"
            ) from error

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)
            _LOG.warning("event=host_memory reason=%s", text)


class HostSlab:
    """rows: numpy uint8 [num_slots, block_bytes], page aligned, allocated once and never rounded up."""

    def __init__(self, layout: KVLayout, num_slots: int, memory: HostMemory) -> None:
        self.layout, self.num_slots = layout, num_slots
        self.rows = memory.alloc(num_slots, layout.block_bytes, spread=True)
        self.nodes, self.node_rates = memory.placement.parts(num_slots), memory.placement.rates

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.layout.block_bytes

    # A slot of ours is a row, always there to write to, and changes only when we say so.
    is_asking = False

    def place(self, slots: IntArray) -> IntArray:
        return slots

    def room_to_write(self, wanted: int) -> int:
        return wanted

    def begin_write(self, slots: IntArray) -> None:
        pass

    def let_go(self, slots: IntArray) -> None:
        pass

    def intact(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        return np.ones(len(slots), bool)


def check_huge_pages(name: str) -> str:
    """Raises ConfigError."""
    if name not in HUGE_PAGES:
        raise ConfigError(
            f"host_huge_pages={name!r} is unknown; choose auto (transparent where the system allows), off, or reserved "
            "(from vm.nr_hugepages)"
        )
    return name
