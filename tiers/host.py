"""Host tier: one exact slab of slots per layer group, pinned where there is CUDA. Bytes only."""

from __future__ import annotations

from .layout import KVLayout
from .streams import Backend


class HostSlab:
    """rows: numpy uint8 [num_slots, block_bytes], page aligned, allocated once and never rounded up."""

    def __init__(self, layout: KVLayout, num_slots: int, backend: Backend) -> None:
        self.layout, self.num_slots = layout, num_slots
        self.rows = backend.alloc_host(num_slots, layout.block_bytes)
        self.pinned = backend.pinned

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.layout.block_bytes
