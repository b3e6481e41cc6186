"""Device tier: one block-contiguous pool per layer group. Bytes only; who is where is the pager's business."""

from __future__ import annotations

from .errors import ConfigError
from .exported import ExportedRows, export_rows
from .layout import KVLayout
from .streams import Backend


class DevicePool:
    """rows: uint8 [num_pages, block_bytes], a CUDA tensor or capped CPU memory, at a stable address.

    `exported`: the same rows as another process can map them, where that was asked for; else `refusal` says why not.
    """

    def __init__(self, layout: KVLayout, num_pages: int, backend: Backend, *, wants_export: bool = False) -> None:
        self.layout, self.num_pages = layout, num_pages
        self.exported: ExportedRows | None = None
        self.refusal = ""
        if wants_export:
            try:
                self.exported = export_rows(backend, num_pages, layout.block_bytes)
            except ConfigError as error:
                self.refusal = str(error)
        self.rows = backend.alloc_device(num_pages, layout.block_bytes) if self.exported is None else self.exported.rows

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.layout.block_bytes
