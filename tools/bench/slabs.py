"""Part of `kvtier bench host`: what faulting host memory in ahead and huge pages give, to copies and to disk reads.

A fresh slab is made anew before every round and is not touched before the clock runs. The memory compared with takes
its turn in the same round, in an order drawn for each, and ratios are medians of same-round ratios, because a disk
changes its mind between two rounds.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiers.cpu import CpuBackend
from ...tiers.machine import Machine
from ...tiers.memory import resident_bytes
from ...tiers.prefault import Prefault
from .harness import Row, interleave

Call = Callable[[], object]
Slab = npt.NDArray[np.uint8]
KINDS = {"huge pages": "auto", "4 KiB pages": "off"}
NAMES = [f"{how}, {kind}" for how in ("prefaulted", "fresh") for kind in KINDS]
PAUSE_S = 0.1  # before a read: a disk behind a rate limiter gathers tokens meanwhile


class SlabBench:
    """Copies and disk reads into slabs of either page size, fresh and prefaulted, beside one source of blocks."""

    def __init__(self, backend: CpuBackend, source: Slab, folder: Path) -> None:
        self._backend, self._source, self._folder = backend, source, folder
        self._reading = "O_DIRECT read"
        order = np.random.default_rng(1)
        self._t, self._s = order.permutation(len(source)), order.permutation(len(source))
        self._slabs = {f"prefaulted, {kind}": self._make(kind) for kind in KINDS}
        for slab in self._slabs.values():
            Prefault([slab], room=Machine().memory_room_bytes).wait()
            slab[:] = 3  # also where prefaulting was refused

    def rows(self, rounds: int) -> list[Row]:
        """GB/s. Raises OSError when the folder takes no file of that size."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="kvtier-bench-") as file:
            file.write(self._source.data)
            file.flush()
            os.fdatasync(file.fileno())
            fd = self._open(file.name)
            try:
                seconds = self._times(self._copies(), rounds) | self._times(self._reads(fd), rounds)
            finally:
                os.close(fd)
        pairs = self._pairs() if self._has_huge else [pair for pair in self._pairs() if "huge" not in pair[1]]
        return [self._row(*pair, seconds, rounds) for pair in pairs]

    def _copies(self) -> dict[str, Call]:
        cases: dict[str, Call] = {f"put {name}": partial(self._put, name) for name in NAMES}
        return cases | {f"get {name}": partial(self._get, name) for name in NAMES if not name.startswith("fresh")}

    def _reads(self, fd: int) -> dict[str, Call]:
        return {f"read {name}": partial(self._read, fd, name) for name in NAMES}

    def _times(self, cases: dict[str, Call], rounds: int) -> dict[str, list[float]]:
        before = {case: partial(self._prepare, *case.split(" ", 1)) for case in cases}
        return interleave(cases, rounds, warmup=1, before=before, order=random.Random(0))

    def _prepare(self, verb: str, name: str) -> None:
        if name.startswith("fresh"):
            self._slabs.pop(name, None)
            self._slabs[name] = self._make(name.partition(", ")[2])
        if verb == "read":
            time.sleep(PAUSE_S)

    def _pairs(self) -> list[tuple[str, str, str]]:
        """(verb, memory, memory that it is compared with)"""
        huge, small = KINDS
        fresh = [(verb, f"prefaulted, {kind}", f"fresh, {kind}") for verb in ("put", "read") for kind in KINDS]
        return fresh + [(verb, f"prefaulted, {huge}", f"prefaulted, {small}") for verb in ("put", "get", "read")]

    def _row(self, verb: str, ours: str, theirs: str, seconds: dict[str, list[float]], rounds: int) -> Row:
        moved = self._source.nbytes * 1e-9
        spent = {name: seconds[f"{verb} {name}"] for name in (ours, theirs)}
        ratio = statistics.median(b / a for a, b in zip(spent[ours], spent[theirs], strict=True))
        value, limit = (moved / statistics.median(spent[name]) for name in (ours, theirs))
        case, what = f"{len(self._source)} blocks of 2 MiB", {"read": self._reading}.get(verb, verb)
        return Row(case, f"{what}, {ours}", value, "GB/s", theirs, limit, ratio, rounds)

    @property
    def _has_huge(self) -> bool:
        """Without them there is nothing to compare, and no row."""
        slab = self._slabs[f"prefaulted, {next(iter(KINDS))}"]
        return resident_bytes([slab])[1] > slab.nbytes // 2

    def _make(self, kind: str) -> Slab:
        return self._backend.alloc_host(*self._source.shape, huge_pages=KINDS[kind])

    def _put(self, name: str) -> None:
        self._backend.demote.copy_rows(self._slabs[name], self._t, self._source, self._s)
        self._backend.demote.record().wait()

    def _get(self, name: str) -> None:
        self._backend.promote.copy_rows(self._source, self._t, self._slabs[name], self._s)
        self._backend.promote.record().wait()

    def _read(self, fd: int, name: str) -> None:
        """One request per block, all queued at once, as many in flight as the backend has workers."""
        slab = self._slabs[name]
        size = slab.shape[1]

        def job(row: int) -> Callable[[], None]:
            def read() -> None:
                if os.preadv(fd, [slab[row].data], row * size) != size:
                    raise OSError("the file ended early")

            return read

        events: list[Any] = [self._backend.read_io.submit(job(row)) for row in range(len(slab))]
        for event in events:
            event.wait()
            if event.error is not None:
                raise event.error

    def _open(self, name: str) -> int:
        try:
            return os.open(name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            self._reading = "buffered read (O_DIRECT is refused)"
            return os.open(name, os.O_RDONLY)
