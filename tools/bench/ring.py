"""`kvtier bench ring`: what a put costs once the store is full and every new segment must be reclaimed from an old one.

A pager with a small host tier takes sequences of new blocks, persists each, and reads an earlier one back now and then,
older ones less often (so that reads leave hits and evictions holes all over the ring). `filling` is the time until the
store is full for the first time, `full` what follows for as many times its size as --passes says. A put begins with a new
sequence and ends when its blocks are durable.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvtier import Pager, PagerConfig

from ...pager.lease import Span
from ...pager.reclaim import CLEAN_SEGMENTS
from ...tiers.errors import ConfigError
from ...tiers.nvme.calibrate import LAYOUT
from ...tiers.nvme.store import NvmeTier
from .harness import Row, check_folder, resident_bytes

DEVICE_BLOCKS, HOST_BLOCKS = 48, 64
BLOCKS_PER_PUT = 16
READ_SHARE = 0.5  # of puts after which an earlier sequence is read
READ_BACK = 24  # sequences; so old is the one read, in the mean
_GB, _MB = 1e-9, 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", default=".", metavar="DIR", help="a directory on the disk to measure")
    parser.add_argument("--blocks", type=int, default=1024, metavar="N", help="2 MiB blocks that the store holds")
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="times its size, written when it is full")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for numbers that make no run, and for a directory that is none."""
    if arguments.blocks < 8 * BLOCKS_PER_PUT or arguments.passes < 1:
        raise ConfigError(
            f"--blocks {arguments.blocks}, --passes {arguments.passes}: need {8 * BLOCKS_PER_PUT} blocks and one pass"
        )
    check_folder(arguments.path)
    size = LAYOUT.block_bytes
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        config = PagerConfig(
            device_bytes=DEVICE_BLOCKS * size,
            host_bytes=HOST_BLOCKS * size,
            nvme_path=Path(folder) / "store",
            nvme_bytes=arguments.blocks * size,
            policy="lru",
            prefetch=False,
            backend="cpu",
        )
        with Pager.open(LAYOUT, config, model_fingerprint="bench") as pager:
            return _Writer(pager, arguments.blocks).rows(arguments.passes)


@dataclass(slots=True)
class _Phase:
    """Durations of puts, and how much of what they wrote lies in one piece."""

    put_s: list[float] = field(default_factory=list)
    neighbours: list[float] = field(default_factory=list)
    reads: int = 0
    found: int = 0  # blocks
    asked: int = 0
    fewest_clean: int = 1 << 30

    def rate(self) -> float:
        return BLOCKS_PER_PUT * LAYOUT.block_bytes * len(self.put_s) / sum(self.put_s) * _GB


class _Writer:
    """One pager, written to until its store has been full for a while."""

    def __init__(self, pager: Pager, blocks: int) -> None:
        self._pager, self._blocks, self._dice = pager, blocks, random.Random(0)
        self._tokens: list[list[int]] = []
        self._rows = pager.device_rows(0)
        self._values = np.random.default_rng(0).integers(0, 256, (BLOCKS_PER_PUT, LAYOUT.block_bytes), np.uint8)

    def rows(self, passes: int) -> list[Row]:
        filling, full = _Phase(), _Phase()
        for _ in range(self._most()):
            self._step(filling)
        before, held = self._written(), resident_bytes()
        for _ in range(passes * self._most()):
            self._step(full)
        after = self._written()
        return self._report(filling, full, after - before, (held, resident_bytes()))

    def _most(self) -> int:
        """Puts that write as many bytes as the store holds."""
        return self._blocks // BLOCKS_PER_PUT

    def _written(self) -> int:
        """Bytes that went to the disk as blocks."""
        status = self._cold().status()
        return int(status["bytes_written"])

    def _cold(self) -> NvmeTier:
        tier = self._pager._core.nvme
        assert isinstance(tier, NvmeTier)
        return tier

    def _step(self, phase: _Phase) -> None:
        tokens = [self._dice.randrange(1 << 17) for _ in range(BLOCKS_PER_PUT * LAYOUT.block_size)]
        start_s = time.perf_counter()
        seq = self._put(tokens)
        phase.put_s.append(time.perf_counter() - start_s)
        phase.neighbours.append(self._neighbours(seq))
        self._pager.finish(seq)
        self._tokens.append(tokens)
        phase.fewest_clean = min(phase.fewest_clean, self._cold().num_clean(0))
        if self._dice.random() < READ_SHARE:
            self._read(phase)

    def _put(self, tokens: list[int]) -> int:
        seq = self._pager.begin()
        self._pager.append(seq, tokens)
        with self._pager.lease([Span(seq, 0, len(tokens))], write_only=True) as lease:
            pages = lease.tables[0][0][:BLOCKS_PER_PUT]
            for page, value in zip(pages, self._values, strict=True):
                self._rows[page] = value
            lease.commit()
        self._pager.persist([seq])
        return seq

    def _read(self, phase: _Phase) -> None:
        back = min(len(self._tokens), 1 + int(self._dice.expovariate(1 / READ_BACK)))
        seq = self._pager.begin()
        found = self._pager.attach(seq, self._tokens[-back]).tokens
        phase.reads += 1
        phase.found += found // LAYOUT.block_size
        phase.asked += BLOCKS_PER_PUT
        for _ in self._pager.read_blocks(seq, 0):
            pass
        self._pager.finish(seq)

    def _neighbours(self, seq: int) -> float:
        """Share of the sequence's blocks that lie right behind the one before, on disk."""
        group = self._pager._core.groups[0]
        keys = self._pager.block_keys(seq, 0, BLOCKS_PER_PUT * LAYOUT.block_size)
        slots = group.directory.nvme_slot[group.directory.find(keys)]
        return float((np.diff(slots) == 1).mean())

    def _report(self, filling: _Phase, full: _Phase, written: int, held: tuple[int, int]) -> list[Row]:
        case, n = f"{self._blocks} blocks of 2 MiB", len(full.put_s)
        rate, limit = full.rate(), filling.rate()
        rows = [Row(case, "put", rate, "GB/s", "while the store fills", limit, rate / limit, n)]
        for name, share in (("median", 0.5), ("p99", 0.99), ("longest", 1.0)):
            ours, limit = (1e3 * float(np.quantile(phase.put_s, share)) for phase in (full, filling))
            rows.append(Row(case, f"put {name}", ours, "ms", "while the store fills", limit, limit / ours, n))
        put = n * BLOCKS_PER_PUT * LAYOUT.block_bytes
        ours, limit = (statistics.fmean(phase.neighbours) for phase in (full, filling))
        clean = full.fewest_clean
        return [
            *rows,
            Row(
                case,
                "write amplification",
                written / put,
                "bytes written per byte put",
                "none moved",
                1.0,
                put / written,
                n,
            ),
            Row(case, "blocks behind the one before", ours, "share", "while the store fills", limit, ours / limit, n),
            Row(
                case,
                "clean segments",
                clean,
                "at least",
                "kept ready",
                CLEAN_SEGMENTS,
                clean / CLEAN_SEGMENTS or None,
                n,
            ),
            Row(
                case,
                "blocks found again",
                full.found / full.asked,
                "share of those read",
                "all",
                1.0,
                rounds=full.reads,
            ),
            Row(case, "process memory", held[1] * _MB, "MB", "when full first", held[0] * _MB, held[0] / held[1]),
        ]
