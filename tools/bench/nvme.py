"""`kvtier bench nvme`: 2 MiB blocks written and read cold through the store, against fio, zarr-python and LMCache.

At the end others read every block back: zarr-python and tensorstore.

Everything bypasses or drops the page cache. fio works on files of the same size beside the store's, with O_DIRECT, the
best of its engines and depths counts, and rounds are interleaved. A write round ends when the bytes are written; `committed`
rounds end when they and the journal are durable, and fio's then end with an fsync too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...tiers.checksum import slice_sum
from ...tiers.cpu import IO_DEPTH, CpuBackend
from ...tiers.errors import ConfigError
from ...tiers.nvme.calibrate import LAYOUT
from ...tiers.nvme.store import STAMP, IoTicket, NvmeTier, StoreIdentity
from . import lmcache, read_back
from .harness import Row, check_folder, resident_bytes
from .lmcache import LmcachePeer
from .page_cache import sync_files

FIO_ENGINES = {"psync": ["--ioengine=psync", "--thread"], "io_uring": ["--ioengine=io_uring"]}
FIO_DEPTHS = (8, IO_DEPTH)  # the better one counts
FIO_SETTINGS = {f"{engine} QD {depth}": (engine, depth) for engine in FIO_ENGINES for depth in FIO_DEPTHS}
ROOM = 512  # slots: a store with room for many segments has large ones
PAUSE_S = 0.3  # before each case
ROWS = 2 * IO_DEPTH  # buffers in turn: as many requests as fio has are in flight, and as many wait for one to end
_GB = 1e-9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", default=".", metavar="DIR", help="a directory on the disk to measure")
    parser.add_argument("--blocks", type=int, default=256, metavar="N", help="2 MiB blocks per round")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument(
        "--lmcache", metavar="PYTHON", help="also measure LMCache, which this interpreter has installed"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in GB/s. Raises ConfigError when the directory cannot be used."""
    if arguments.blocks < 1 or arguments.rounds < 1:
        raise ConfigError(f"--blocks {arguments.blocks}, --rounds {arguments.rounds}: need positive numbers")
    check_folder(arguments.path)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as name, ExitStack() as stack:
        folder, peer = Path(name), None
        if arguments.lmcache:
            peer = stack.enter_context(LmcachePeer(arguments.lmcache, folder / "lmcache", arguments.blocks))
            assert peer.block_bytes == LAYOUT.block_bytes
        return _Disk(folder, arguments.blocks, arguments.rounds, peer).rows()


class _Disk:
    """The cases of one run, side by side in one folder."""

    def __init__(self, folder: Path, blocks: int, rounds: int, peer: LmcachePeer | None) -> None:
        self._folder, self._blocks, self._rounds, self._peer = folder, blocks, rounds, peer
        self._backend = CpuBackend()
        self._slab = self._backend.alloc_host(ROWS, LAYOUT.block_bytes)
        self._slab[:] = np.random.default_rng(0).integers(0, 256, self._slab.shape, np.uint8)
        self._out = self._backend.alloc_host(ROWS, LAYOUT.block_bytes)
        self._out[:] = 0  # faulted in
        self._values: dict[str, list[float]] = {}
        self._cpu: dict[str, list[float]] = {}  # seconds per GB
        self._fio_cpu: dict[str, list[float]] = {}  # by fio's own account, without its start

    def rows(self) -> list[Row]:
        stores = {
            "": _Store(self._folder / "plain", self._blocks, self._backend, with_checksums=False),
            "_checksummed": _Store(self._folder / "checked", self._blocks, self._backend, with_checksums=True),
        }
        settings = self._fio_settings() if shutil.which("fio") else []
        zarr = _StockZarr(self._folder / "stock.zarr", self._slab)
        cases: list[Callable[[], None]] = []
        for suffix, store in stores.items():
            cases += [
                partial(self._take, f"write{suffix}", partial(store.write, self._slab)),
                partial(self._take, f"committed{suffix}", partial(store.write, self._slab, commit=True)),
                partial(self._take, f"read{suffix}", partial(store.read, self._out)),
            ]
        for setting in settings:
            cases += [
                partial(self._take, f"fio {setting} write", partial(self._fio, setting, "write")),
                partial(self._take, f"fio {setting} committed", partial(self._fio, setting, "write", "--end_fsync=1")),
                partial(self._take, f"fio {setting} read", partial(self._fio, setting, "read")),
            ]
        if peer := self._peer:
            cases += [
                partial(self._take, lmcache.value_name(name, setting), partial(peer.gb_s, name, setting))
                for name in lmcache.CASES
                for setting in peer.settings
            ]
        checked = stores["_checksummed"]
        cases += [
            partial(self._take, "zarr write", zarr.write),
            partial(self._take, "zarr read", zarr.read),
            partial(self._take_latencies, checked),
            self._take_one_pass,
        ]
        order, held = random.Random(0), list[int]()
        for number in range(self._rounds + 1):
            self._is_counted = number > 0  # the first pass meets unwritten extents on all sides
            if self._is_counted:
                order.shuffle(cases)  # a disk behind a rate limiter favours whoever comes first
            for case in cases:
                time.sleep(PAUSE_S)
                case()
            held.append(resident_bytes())
        found = self._report(settings)
        found.append(
            Row(
                f"{self._rounds} rounds of all cases",
                "process memory at their end",
                held[-1] / 1e6,
                "MB",
                "after the first",
                held[1] / 1e6,
                held[1] / held[-1],
                1,
            )
        )
        found += checked.read_back(case_of(self._blocks), self._slab)
        if self._peer:
            spoiled = {"one byte flipped": _flip, "truncated to half": _truncate}
            ours = {kind: int(checked.serves(spoil, self._out)) for kind, spoil in spoiled.items()}
            found += lmcache.damage_rows(self._peer.version, self._peer.damage(), ours)
        for store in stores.values():
            store.close()
        self._backend.close(5.0)
        return found

    def _report(self, settings: list[str]) -> list[Row]:
        middle = {name: statistics.median(values) for name, values in self._values.items()}
        case, found = case_of(self._blocks), list[Row]()
        for name in ("write", "committed", "read"):
            best = max(settings, key=lambda each: middle[f"fio {each} {name}"], default="")
            limit = middle.get(f"fio {best} {name}")
            pages = "huge" if _huge_pages() else "4 KiB"  # reserve some (vm.nr_hugepages) for a fair limit
            said = f"{_fio_version()} {best}, O_DIRECT, buffers in {pages} pages" if best else "fio is not installed"
            for suffix in ("", "_checksummed"):
                ours = middle[name + suffix]
                ratio = None if limit is None else self._paired(name + suffix, f"fio {best} {name}")
                found.append(Row(case, name + suffix, ours, "GB/s", said, limit, ratio, self._rounds))
        reference = f"zarr-python {_zarr_version()}, chunk = block, LocalStore, {len(self._slab)} blocks"
        for name in ("write", "read"):
            for suffix in ("", "_checksummed"):
                ours, stock = middle[name + suffix], middle[f"zarr {name}"]
                found.append(Row(case, name + suffix, ours, "GB/s", reference, stock, ours / stock, self._rounds))
        found += lmcache.rows(self._values, self._peer, case, self._rounds)
        latency, limit = middle["latency"] * 1e3, middle["latency limit"] * 1e3
        found.append(
            Row("1 block, cold", "latency", latency, "ms", "one raw pread", limit, limit / latency, self._rounds)
        )
        return found + [self._cpu_row(case, name, settings) for name in ("write", "read")]

    def _cpu_row(self, case: str, name: str, settings: list[str]) -> Row:
        """CPU seconds of ours with checksums, beside a pass of the checksum over as many bytes and fio's cheapest calls."""
        ours = statistics.median(self._cpu[f"{name}_checksummed"])
        theirs = {setting: statistics.median(self._fio_cpu[f"{setting} {name}"]) for setting in settings}
        if not theirs:
            return Row(case, f"{name}_checksummed CPU", ours, "s/GB", "fio is not installed")
        best = min(theirs, key=lambda setting: theirs[setting])
        one_pass = statistics.median(self._values["one pass"])
        said = f"{_fio_version()} {best}, {theirs[best]:.3f}, and crc32c of the bytes, {one_pass:.3f}"
        limit = theirs[best] + one_pass
        return Row(case, f"{name}_checksummed CPU", ours, "s/GB", said, limit, limit / ours, self._rounds)

    def _paired(self, ours: str, theirs: str) -> float:
        """Median of same-round ratios: a disk that slows down slows both."""
        return statistics.median(a / b for a, b in zip(self._values[ours], self._values[theirs], strict=True))

    def _take(self, name: str, call: Callable[[], float]) -> None:
        cpu_s = time.process_time()
        value = call()
        if self._is_counted:
            moved = self._blocks * LAYOUT.block_bytes * _GB
            self._cpu.setdefault(name, []).append((time.process_time() - cpu_s) / moved)
            self._values.setdefault(name, []).append(value)

    def _take_latencies(self, store: _Store) -> None:
        if self._is_counted:
            for name, value in zip(("latency", "latency limit"), store.latencies_s(self._out), strict=True):
                self._values.setdefault(name, []).append(value)

    def _take_one_pass(self) -> None:
        """CPU seconds per GB of the checksum alone: whoever checks bytes has to look at them."""
        start_s = time.thread_time()
        for row in self._slab:
            slice_sum(row)
        if self._is_counted:
            spent_s = time.thread_time() - start_s
            self._values.setdefault("one pass", []).append(spent_s / (self._slab.nbytes * _GB))

    def _fio_settings(self) -> list[str]:
        (self._folder / "fio").mkdir()
        return list(FIO_SETTINGS)

    def _fio(self, setting: str, verb: str, *more: str) -> float:
        """GB/s of fio over one file per job, all blocks once. Raises ConfigError when it fails."""
        engine, depth = FIO_SETTINGS[setting]
        size = self._blocks * LAYOUT.block_bytes // depth // LAYOUT.block_bytes * LAYOUT.block_bytes
        jobs = ["--numjobs=1", f"--iodepth={depth}"] if engine == "io_uring" else [f"--numjobs={depth}"]
        total = size * depth if engine == "io_uring" else size
        files = f"--filename_format={setting.replace(' ', '-')}.$jobnum"
        command = ["fio", "--name=bench", f"--directory={self._folder / 'fio'}", files]
        command += [
            f"--rw={verb}",
            f"--bs={LAYOUT.block_bytes}",
            f"--size={max(total, LAYOUT.block_bytes)}",
            "--direct=1",
        ]
        command += [*jobs, *FIO_ENGINES[engine], *more, *_huge_pages(), "--group_reporting", "--output-format=json"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ConfigError(f"fio failed: {result.stderr.strip() or result.stdout.strip()}")
        job: dict[str, Any] = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
        if self._is_counted:
            share = (job["usr_cpu"] + job["sys_cpu"]) / 100
            moved = job[verb]["io_bytes"] * _GB
            self._fio_cpu.setdefault(f"{setting} {verb}", []).append(share * job["job_runtime"] / 1e3 / moved)
        if "--end_fsync=1" in more:  # its bandwidth leaves the fsync out
            return float(job[verb]["io_bytes"] / (job["job_runtime"] / 1e3 / (depth if engine == "psync" else 1)) * _GB)
        return float(job[verb]["bw_bytes"]) * _GB


class _Store:
    """Our store, written and read whole."""

    def __init__(self, path: Path, blocks: int, backend: CpuBackend, *, with_checksums: bool) -> None:
        self._tier = NvmeTier.open(
            path,
            StoreIdentity("bench", (LAYOUT,)),
            num_slots=[max(blocks, ROOM)],
            backend=backend,
            durability="batch" if with_checksums else "none",
            with_checksums=with_checksums,
        )
        self._stamps = np.zeros(blocks, STAMP)
        self._stamps["tokens"] = LAYOUT.block_size
        self._slots = self._tier.allocate(0, blocks)
        self._line = np.arange(blocks)
        self._path, self._random = path, np.random.default_rng(1)

    def write(self, slab: Any, *, commit: bool = False) -> float:
        """GB/s."""
        start_s = time.perf_counter()
        ticket = self._tier.write(0, self._slots, slab, self._line % len(slab), self._stamps)
        ticket.event.wait()
        if commit:
            self._tier.flush()
        spent_s = time.perf_counter() - start_s
        assert ticket.ok.all()
        self._tier.flush()
        return float(len(self._slots) * LAYOUT.block_bytes / spent_s * _GB)

    def read(self, out: Any) -> float:
        """GB/s."""
        tickets: list[IoTicket] = []
        stamps = self._tier.stamps(0, self._slots)
        start_s = time.perf_counter()
        for i in range(len(self._slots)):  # a row is read into again once what it held has come
            if i >= len(out):
                tickets[i - len(out)].event.wait()
            row = self._line[i % len(out)][None]
            tickets.append(self._tier.read(0, self._slots[i : i + 1], out, row, stamps[i : i + 1]))
        for ticket in tickets[-len(out) :]:
            ticket.event.wait()
        spent_s = time.perf_counter() - start_s
        assert all(ticket.ok.all() for ticket in tickets)
        return float(len(self._slots) * LAYOUT.block_bytes / spent_s * _GB)

    def latencies_s(self, out: Any, tries: int = 16) -> tuple[float, float]:
        """Median seconds of reading one block, checked, and of one pread of as many bytes of the same files, in turn."""
        geometry, ours, raw = self._tier.geometry(0), list[float](), list[float]()
        files = sorted((self._path / "blocks.zarr" / "g0").glob("c.*"))
        with _descriptors(files) as fds:
            for slot in self._random.choice(self._slots, tries):
                ours.append(self._latency_s(np.array([slot]), out))
                fd = fds[int(self._random.integers(len(fds)))]
                place = int(self._random.integers(geometry.slots_per_segment))
                start_s = time.perf_counter()
                os.preadv(fd, [out[0].data], geometry.header_bytes + place * geometry.stride)
                raw.append(time.perf_counter() - start_s)
        return statistics.median(ours), statistics.median(raw)

    def _latency_s(self, slot: Any, out: Any) -> float:
        start_s = time.perf_counter()
        self._tier.read(0, slot, out, self._line[:1], self._tier.stamps(0, slot)).event.wait()
        return time.perf_counter() - start_s

    def serves(self, spoil: Callable[[Path, int], None], out: Any) -> bool:
        """Spoil the last block in its file. Whether it is served all the same."""
        one, (segment, offset) = self._slots[-1:], self._tier.geometry(0).place(int(self._slots[-1]))
        self._tier.write(0, one, out, self._line[:1], self._stamps[:1]).event.wait()
        self._tier.flush()

        def is_ok() -> bool:
            ticket = self._tier.read(0, one, out, self._line[:1], self._tier.stamps(0, one))
            ticket.event.wait()
            return bool(ticket.ok.all())

        assert is_ok()
        spoil(next((self._path / "blocks.zarr" / "g0").glob(f"c.{segment}.*")), offset)
        return is_ok()

    def read_back(self, case: str, slab: Any) -> list[Row]:
        values = [row.tobytes() for row in slab]
        wanted = {slot: values[i % len(values)] for i, slot in enumerate(self._slots.tolist())}
        return read_back.rows(case, self._path / "blocks.zarr", wanted)

    def close(self) -> None:
        self._tier.close()


def case_of(blocks: int) -> str:
    return f"{blocks} blocks of 2 MiB"


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset + LAYOUT.block_bytes // 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _truncate(path: Path, offset: int) -> None:
    os.truncate(path, offset + LAYOUT.block_bytes // 2)


class _StockZarr:
    """zarr-python as its users would store blocks: one chunk per block, and whatever its defaults are."""

    def __init__(self, path: Path, blocks: Any) -> None:
        import zarr

        values = blocks.view(np.uint16)
        self._blocks, self._path = values, path
        self._array = zarr.create_array(
            str(path), shape=values.shape, chunks=(1, values.shape[1]), dtype="uint16", compressors=None
        )

    def write(self) -> float:
        start_s = time.perf_counter()
        for i in range(len(self._blocks)):
            self._array[i] = self._blocks[i]
        sync_files(self._path)
        return float(self._blocks.nbytes / (time.perf_counter() - start_s) * _GB)

    def read(self) -> float:
        sync_files(self._path, drop=True)
        start_s = time.perf_counter()
        for i in range(len(self._blocks)):
            self._array[i]
        return float(self._blocks.nbytes / (time.perf_counter() - start_s) * _GB)


@contextmanager
def _descriptors(paths: list[Path]) -> Iterator[list[int]]:
    fds = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _huge_pages() -> list[str]:
    """Huge-page buffers for fio where the machine has any reserved; without them it understates the disk."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) for line in lines if line.startswith("HugePages_Free")), 0)
    return ["--iomem=shmhuge"] if free >= 2 * max(FIO_DEPTHS) else []


def _fio_version() -> str:
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False).stdout.strip()


def _zarr_version() -> str:
    from importlib.metadata import version

    return version("zarr")
