"""One large block read by several threads at once: its parts come side by side, and each part's crc with it.

A single call to the kernel leaves a disk's queue empty while the crc is computed, and the crc waits for the last byte.
Only for calls that leave workers idle; a batch keeps them busy anyhow. What proves a block is unchanged: the trailer
that the last part brings along must name it, and the crc joined from those of the parts must be the trailer's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checksum import joined_crc
from .blocks import BlockIo
from .layout import PAGE_BYTES

PART_BYTES = 1 << 20
MAX_BLOCKS = 2  # of a call that is read in parts


def num_parts(block_bytes: int, num_blocks: int) -> int:
    """How many parts each block of such a call is worth."""
    return max(1, block_bytes // PART_BYTES) if num_blocks <= MAX_BLOCKS else 1


class PartedRead:
    """One block under way. `jobs` may run in any order, on any worker; `done(ok)` is called by the last."""

    def __init__(
        self,
        io: BlockIo,
        group: int,
        slot: int,
        row: npt.NDArray[np.uint8],
        stamp: Any,
        parts: int,
        done: Callable[[bool], None],
    ) -> None:
        self._io, self._group, self._slot, self._row, self._stamp, self._done = io, group, slot, row, stamp, done
        self._bounds = _bounds(len(row), parts)
        self._crcs: list[int | None] = [None] * parts
        self._tail = b""
        self._lock = threading.Lock()
        self._left = parts

    @property
    def jobs(self) -> list[Callable[[], None]]:
        return [lambda i=i: self._read(i) for i in range(len(self._crcs))]  # type: ignore[misc]

    def _read(self, i: int) -> None:
        first, end = self._bounds[i]
        got = self._io.read_part(self._group, self._slot, self._row, first, end)
        with self._lock:
            if got is not None:
                self._crcs[i], tail = got
                self._tail = tail or self._tail
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._done(self._is_the_block())

    def _is_the_block(self) -> bool:
        sized = [(crc, end - first) for crc, (first, end) in zip(self._crcs, self._bounds) if crc is not None]
        is_whole = len(sized) == len(self._crcs)
        return is_whole and self._io.proves(self._group, self._tail, joined_crc(sized), self._stamp)


def _bounds(nbytes: int, parts: int) -> list[tuple[int, int]]:
    """Parts of about one size, cut at whole pages of the block."""
    size = -(-nbytes // parts // PAGE_BYTES) * PAGE_BYTES
    return [(i * size, min(nbytes, (i + 1) * size)) for i in range(parts)]
