"""A short look at a disk: what it gives at several queue depths and segment sizes, past the page cache if it lets us.

A probe, not a benchmark: a second on 64 MiB, so a disk behind a rate limiter shows its burst.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..cpu import IO_DEPTH
from ..streams import aligned_rows

BLOCK_BYTES, NUM_BLOCKS = 2 << 20, 32
DEPTHS = (1, 2, 4, 8, IO_DEPTH, 16)
SEGMENTS = (8 << 20, 16 << 20, 32 << 20, 64 << 20)


@dataclass(frozen=True, slots=True)
class DiskProbe:
    """Bytes per second by queue depth."""

    is_direct: bool
    write_rates: dict[int, float]
    read_rates: dict[int, float]
    segment_rates: dict[int, float]  # of making and first filling segments, by their size in bytes

    @property
    def best_segment_bytes(self) -> int:
        """The smallest segment that is filled at nine tenths of the best rate seen: small ones are recycled sooner."""
        best = max(self.segment_rates.values())
        return min(size for size, rate in self.segment_rates.items() if rate >= 0.9 * best)

    @property
    def best_depth(self) -> int:
        """The smallest depth that reads at nine tenths of the best rate seen."""
        best = max(self.read_rates.values())
        return min(depth for depth, rate in self.read_rates.items() if rate >= 0.9 * best)


def probe_disk(path: Path) -> DiskProbe:
    """Write and read a temporary file in that directory. Raises OSError when that cannot be done."""
    memory = aligned_rows(max(DEPTHS), BLOCK_BYTES)
    memory[:] = 1
    with tempfile.NamedTemporaryFile(dir=path, prefix="kvtier-probe-") as file:
        os.posix_fallocate(file.fileno(), 0, NUM_BLOCKS * BLOCK_BYTES)
        try:
            fd, is_direct = os.open(file.name, os.O_RDWR | os.O_DIRECT), True
        except OSError:
            fd, is_direct = os.open(file.name, os.O_RDWR), False
        try:
            _move(os.pwritev, fd, memory, 8)  # the first pass over new extents is slow
            writes = {depth: _move(os.pwritev, fd, memory, depth) for depth in DEPTHS}
            reads = {depth: _move(os.preadv, fd, memory, depth) for depth in DEPTHS}
        finally:
            os.close(fd)
    segments = {size: _fill_segments(path, memory, size, is_direct) for size in SEGMENTS}
    return DiskProbe(is_direct, writes, reads, segments)


def _fill_segments(path: Path, memory: npt.NDArray[np.uint8], size: int, is_direct: bool) -> float:
    """Bytes per second of making files of this size, filling and syncing them, 64 MiB in all."""
    total = NUM_BLOCKS * BLOCK_BYTES
    start_s = time.perf_counter()
    for _ in range(total // size):
        with tempfile.NamedTemporaryFile(dir=path, prefix="kvtier-probe-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            fd = os.open(file.name, os.O_RDWR | (os.O_DIRECT if is_direct else 0))
            try:
                for offset in range(0, size, BLOCK_BYTES):
                    os.pwritev(fd, [memory[0].data], offset)
                os.fdatasync(fd)
            finally:
                os.close(fd)
    return total / (time.perf_counter() - start_s)


def _move(call: Callable[..., int], fd: int, memory: npt.NDArray[np.uint8], depth: int) -> float:
    """Bytes per second of moving the whole file with so many requests in flight."""
    left = iter(range(NUM_BLOCKS))
    lock, errors = threading.Lock(), list[OSError]()

    def work(row: int) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None or errors:
                return
            try:
                call(fd, [memory[row].data], number * BLOCK_BYTES)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(depth)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return NUM_BLOCKS * BLOCK_BYTES / (time.perf_counter() - start_s)
