"""Device tier: one block-contiguous pool per layer group. Bytes only; who is where is the pager's business."""

from __future__ import annotations

from .layout import KVLayout
from .streams import Backend


class DevicePool:
    """rows: uint8 [num_pages, block_bytes], a CUDA tensor or capped CPU memory, at a stable address."""

    def __init__(self, layout: KVLayout, num_pages: int, backend: Backend) -> None:
        self.layout, self.num_pages = layout, num_pages
        self.rows = backend.alloc_device(num_pages, layout.block_bytes)

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.layout.block_bytes
