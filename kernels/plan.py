"""The plans of a step: which rows belong to which pages and slots, checked once and used by every layer.

Block tables and slots arrive from the pager as host arrays, and every layer of a step uses the same ones. A plan checks
them and keeps what follows from them: on a GPU the copies on the device, on a CPU which pages are read together. So a
step pays for that once and not once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .checks import (
    IntArray,
    check_rows_cut,
    check_slots,
    check_spans,
    check_table,
    check_turns,
    check_whole_blocks,
    is_debug,
    to_host,
)
from .uploads import to_device

T = TypeVar("T")


class _Memory:
    """What follows from a plan, worked out when first asked for."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """make() at the first call for this key; the same answer from then on."""
        if key not in self._known:
            self._known[key] = make()
        return cast(T, self._known[key])


class StepPlan(_Memory):
    """Block table, lengths and row bounds of one step on the host, and on the device what was asked for there."""

    def __init__(
        self, block_table: IntArray, kv_lens: IntArray, cu_q: IntArray, *, block_size: int, num_pages: int
    ) -> None:
        super().__init__()
        self.kv_lens, self.cu_q = to_host(kv_lens), to_host(cu_q)
        self.block_size, self.num_pages = block_size, num_pages
        self.num_tokens = int(self.cu_q[-1]) if len(self.cu_q) else 0
        self._given_table = block_table
        self.q_lens = self._check_lengths()  # rows per sequence
        is_remote = isinstance(block_table, Tensor) and block_table.is_cuda
        if is_remote and not is_debug():  # looking at its entries would wait for the device
            if tuple(block_table.shape[:1]) != (len(self.kv_lens),):  # type: ignore[union-attr]
                raise ValueError(f"block_table must have {len(self.kv_lens)} rows, got {block_table.shape}")  # type: ignore[union-attr]
            return
        self.table = np.ascontiguousarray(to_host(block_table))
        check_table(self.table, self.kv_lens, block_size, num_pages)

    def _check_lengths(self) -> np.ndarray:
        return check_spans(self.num_tokens, self.kv_lens, self.cu_q)

    def table_on(self, device: torch.device) -> Tensor:
        """Return the block table as int32 on the device."""
        if isinstance(self._given_table, Tensor) and self._given_table.device == device:
            return self._given_table.to(torch.int32)
        return self.on(device, "block_table", self.table)

    def on(self, device: torch.device, name: str, values: np.ndarray) -> Tensor:
        """Return integers as int32 on the device, copied at the first call for this name."""
        return self.remember((device, name), lambda: to_device(values, device, torch.int32))


class PagesPlan(StepPlan):
    """A step's compressed blocks, all before its rows: row i of a sequence sits at kv_len + ahead + i.

    turn_ids [n, max_blocks], where given, names for each block the rotation by which q meets its keys.
    """

    def __init__(
        self,
        block_table: IntArray,
        kv_lens: IntArray,
        cu_q: IntArray,
        ahead: IntArray | None = None,
        *,
        turn_ids: IntArray | None = None,
        num_turns: int = 0,
        block_size: int,
        num_pages: int,
    ) -> None:
        self.ahead = np.zeros(len(kv_lens), np.int64) if ahead is None else to_host(ahead)
        super().__init__(block_table, kv_lens, cu_q, block_size=block_size, num_pages=num_pages)
        self.turn_ids = None if turn_ids is None else np.ascontiguousarray(to_host(turn_ids))
        if self.turn_ids is not None:
            shape = tuple(block_table.shape) if isinstance(block_table, Tensor) else np.shape(block_table)
            check_turns(self.turn_ids, self.kv_lens, block_size, num_turns, shape)

    def _check_lengths(self) -> np.ndarray:
        q_lens = check_rows_cut(self.num_tokens, self.kv_lens, self.cu_q)
        check_whole_blocks(self.kv_lens, self.ahead, self.block_size)
        return q_lens


class SlotPlan(_Memory):
    """Slot mapping of one step: slot = page * block + offset per new token, -1 writes nothing."""

    def __init__(self, slots: IntArray, *, num_tokens: int, num_slots: int) -> None:
        super().__init__()
        self.num_tokens, self.num_slots = num_tokens, num_slots
        self._given = slots
        is_remote = isinstance(slots, Tensor) and slots.is_cuda
        if is_remote and not is_debug():  # looking at its entries would wait for the device
            return
        self.slots = to_host(slots)
        check_slots(self.slots, num_tokens, num_slots)

    def on(self, device: torch.device) -> Tensor:
        """Return the slots as int64 on the device, copied at the first call."""
        return self.remember(device, lambda: to_device(self._given, device))
