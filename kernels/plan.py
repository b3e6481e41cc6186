"""The plan of a step: which rows belong to which sequence and pages, checked once and used by every layer.

Block tables arrive from the pager as host arrays, and every layer of a step reads the same ones. A plan checks them,
and on a GPU keeps what the kernels need on the device, so that a step costs one set of copies and not one per layer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import IntArray, check_spans, check_table, is_debug, to_host


class StepPlan:
    """Block table, lengths and row bounds of one step on the host, and on the device what was asked for there."""

    def __init__(
        self, block_table: IntArray, kv_lens: IntArray, cu_q: IntArray, *, block_size: int, num_pages: int
    ) -> None:
        self.kv_lens, self.cu_q = to_host(kv_lens), to_host(cu_q)
        self.block_size, self.num_pages = block_size, num_pages
        self.num_tokens = int(self.cu_q[-1]) if len(self.cu_q) else 0
        self._given_table = block_table
        self._on_device: dict[tuple[torch.device, str], Tensor] = {}
        check_spans(self.num_tokens, self.kv_lens, self.cu_q)
        is_remote = isinstance(block_table, Tensor) and block_table.is_cuda
        if is_remote and not is_debug():  # looking at its entries would wait for the device
            if tuple(block_table.shape[:1]) != (len(self.kv_lens),):  # type: ignore[union-attr]
                raise ValueError(f"block_table must have {len(self.kv_lens)} rows, got {block_table.shape}")  # type: ignore[union-attr]
            return
        self.table = np.ascontiguousarray(to_host(block_table))
        check_table(self.table, self.kv_lens, block_size, num_pages)

    @property
    def q_lens(self) -> np.ndarray:
        """Rows per sequence."""
        return np.diff(self.cu_q)

    def table_on(self, device: torch.device) -> Tensor:
        """Return the block table as int32 on the device."""
        if isinstance(self._given_table, Tensor) and self._given_table.device == device:
            return self._given_table.to(torch.int32)
        return self.on(device, "block_table", self.table)

    def on(self, device: torch.device, name: str, values: np.ndarray) -> Tensor:
        """Return integers as int32 on the device, copied at the first call for this name."""
        key = (device, name)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)
        return self._on_device[key]
