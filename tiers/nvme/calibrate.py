"""A short look at a disk: what it gives, and which queue depth and segment size suit a store of ours there.

`probe_disk` asks the disk itself, a second on 64 MiB; `calibrate` writes and reads a store of 2 MiB blocks, checksums
and all, at several depths and with segments of several sizes, some seconds and 3 GB. Neither is a benchmark: a disk behind
a rate limiter shows its burst.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..cpu import CpuBackend
from ..layout import KVLayout
from ..streams import aligned_rows
from . import SEGMENT_BYTES
from .store import STAMP, NvmeTier, StoreIdentity

LAYOUT = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 2 MiB blocks
NUM_BLOCKS = 32  # 64 MiB
PROBE_DEPTH = 8
DEPTHS = (4, 8, 12, 16, 24)
SEGMENTS = (8 << 20, 16 << 20, 32 << 20, 64 << 20)
ROOM = 1024  # slots of a store whose segments are not cut down for want of room
ROUNDS = 5
NEARLY = 0.95  # of the best rate seen: what is not told apart from it in so short a time


@dataclass(frozen=True, slots=True)
class DiskProbe:
    """Bytes per second, in requests of 2 MiB."""

    is_direct: bool
    write_rate: float
    read_rate: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Bytes per second of a store, medians: by requests in flight, and of making and filling segments and filling them
    again, by their size."""

    write_rates: dict[int, float]
    read_rates: dict[int, float]
    segment_rates: dict[int, float]

    @property
    def queue_depth(self) -> int:
        """The smallest that both writes and reads at nearly the best rate seen: requests that wait hold memory."""
        return max(_least(self.write_rates), _least(self.read_rates))

    @property
    def segment_bytes(self) -> int:
        """The smallest that is filled at nearly the best rate seen: small ones are recycled sooner."""
        return _least(self.segment_rates)


def probe_disk(path: Path) -> DiskProbe:
    """Write and read a temporary file in that directory. Raises OSError when that cannot be done."""
    memory = aligned_rows(PROBE_DEPTH, LAYOUT.block_bytes)
    memory[:] = 1
    with tempfile.NamedTemporaryFile(dir=path, prefix="kvtier-probe-") as file:
        os.posix_fallocate(file.fileno(), 0, NUM_BLOCKS * LAYOUT.block_bytes)
        try:
            fd, is_direct = os.open(file.name, os.O_RDWR | os.O_DIRECT), True
        except OSError:
            fd, is_direct = os.open(file.name, os.O_RDWR), False
        try:
            _move(os.pwritev, fd, memory)  # the first pass over new extents is slow
            return DiskProbe(is_direct, _move(os.pwritev, fd, memory), _move(os.preadv, fd, memory))
        finally:
            os.close(fd)


def calibrate(path: Path, rounds: int = ROUNDS) -> Calibration:
    """Measure stores in a temporary directory there, in rounds whose order changes. Raises OSError, ConfigError."""
    writes: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    reads: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    fills: dict[int, list[float]] = {size: [] for size in SEGMENTS}
    order = random.Random(0)
    with tempfile.TemporaryDirectory(dir=path, prefix="kvtier-probe-") as name:
        folder, memory = Path(name), aligned_rows(NUM_BLOCKS, LAYOUT.block_bytes)
        memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
        _pass(folder / "depths", memory, DEPTHS[0], SEGMENT_BYTES)  # unwritten extents
        for _ in range(rounds):
            for depth in order.sample(DEPTHS, len(DEPTHS)):
                written, read = _pass(folder / "depths", memory, depth, SEGMENT_BYTES)
                writes[depth].append(written)
                reads[depth].append(read)
            for number, size in enumerate(order.sample(SEGMENTS, len(SEGMENTS))):
                with tempfile.TemporaryDirectory(dir=folder, prefix=f"segments-{number}-") as fresh:
                    new, again = (_pass(Path(fresh), memory, DEPTHS[2], size)[0] for _ in range(2))
                    fills[size].append(2 / (1 / new + 1 / again))
    return Calibration(_medians(writes), _medians(reads), _medians(fills))


def _pass(folder: Path, memory: npt.NDArray[np.uint8], depth: int, segment_bytes: int) -> tuple[float, float]:
    """Bytes per second of writing all rows, durably, over what the store held there before, and of reading them."""
    backend = CpuBackend(io_depth=depth)
    try:
        identity = StoreIdentity("calibration", (LAYOUT,))
        with closing(
            NvmeTier.open(folder, identity, num_slots=[ROOM], backend=backend, segment_bytes=segment_bytes)
        ) as tier:
            rows, stamps, slots = np.arange(len(memory)), np.zeros(len(memory), STAMP), tier.recovered()[0][0]
            if not len(slots):
                slots = tier.allocate(0, len(memory))
            stamps["key"] = rows.astype("<u8").view("V8").astype("V32")
            start_s = time.perf_counter()
            tier.write(0, slots, memory, rows, stamps).event.wait()
            tier.flush()
            written_s = time.perf_counter()
            tier.read(0, slots, memory, rows, tier.stamps(0, slots)).event.wait()
            read_s = time.perf_counter() - written_s
            return memory.nbytes / (written_s - start_s), memory.nbytes / read_s
    finally:
        backend.close(5.0)


def _medians(values: Mapping[int, list[float]]) -> dict[int, float]:
    return {key: statistics.median(each) for key, each in values.items()}


def _least(rates: Mapping[int, float]) -> int:
    best = max(rates.values())
    return min(key for key, rate in rates.items() if rate >= NEARLY * best)


def _move(call: Callable[..., int], fd: int, memory: npt.NDArray[np.uint8]) -> float:
    """Bytes per second of moving the whole file with PROBE_DEPTH requests in flight."""
    left = iter(range(NUM_BLOCKS))
    lock, errors = threading.Lock(), list[OSError]()

    def work(row: int) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None or errors:
                return
            try:
                call(fd, [memory[row].data], number * LAYOUT.block_bytes)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(len(memory))]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return NUM_BLOCKS * LAYOUT.block_bytes / (time.perf_counter() - start_s)
