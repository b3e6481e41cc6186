"""`kvtier doctor`: what this machine has, and what each missing thing costs. Looks only; leaves nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from ..tiers.backends import cuda_missing
from ..tiers.errors import ConfigError
from ..tiers.kernel_calls import memory_policy, populate
from ..tiers.layout import format_bytes
from ..tiers.machine import Machine
from ..tiers.memory import address_of, aligned_rows
from ..tiers.numa import Placement
from ..tiers.nvme.calibrate import calibrate, probe_disk
from ..tiers.nvme.codecs import CODECS
from ..tiers.nvme.disk_settings import DISK_FILE, keep, settings_for


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `cost` says what its absence costs and `mend` what to do; both empty when it is there."""

    name: str
    is_good: bool
    found: str
    cost: str = ""
    mend: str = ""

    @classmethod
    def of(cls, name: str, is_good: bool, found: str, cost: str, mend: str) -> Finding:
        return cls(name, True, found) if is_good else cls(name, False, found, cost, mend)


def run_doctor(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if not path.is_dir():
        raise ConfigError(f"--path {str(path)!r} is not a directory")
    checks: list[Callable[[], Finding]] = [_torch, _cuda, _cupy, _triton, _codecs, _memory, _memlock]
    checks += [_huge_pages, _reserved_pages, _prefault, _numa, _tuning]
    if arguments.tune:
        if importlib.util.find_spec("torch") is not None:
            _tune()
        _calibrate(path)
    findings = [check() for check in checks] + [_disk(path), *_disk_speed(path)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return 0
    for f in findings:
        print(
            f"{'ok  ' if f.is_good else 'miss'}  {f.name:<14} {f.found}"
            + (f"\n      costs: {f.cost}\n      mend:  {f.mend}" if f.cost else "")
        )
    return 0


def _cuda() -> Finding:
    missing = cuda_missing()
    return Finding.of(
        "CUDA",
        missing is None,
        missing or "torch and CuPy both see a device",
        "the device tier is capped CPU memory, and host memory is not pinned",
        "install kvtier[cuda] and an NVIDIA driver, on a machine with a GPU",
    )


def _tuning() -> Finding:
    """Which row of the table the kernels are cut by, or that it was measured here."""
    if importlib.util.find_spec("torch") is None:
        return Finding("tuning", True, "no kernels without torch")
    from ..kernels import tuning

    row = tuning.current(_kind())
    found = f"row {row.name!r}: blocks of {row.block} tokens"
    if _kind() == "cuda":
        found += f", decode tiles of {row.tile}, {row.warps} warps, {row.programs_per_sm} programs per SM"
    if row.is_measured:
        return Finding("tuning", True, f"{found}; measured on this device ({tuning.cache_path()})")
    return Finding("tuning", True, f"{found}; from the table (`kvtier doctor --tune` measures)")


def _kind() -> str:
    return "cpu" if cuda_missing() else "cuda"


def _tune() -> None:
    """Measure how decodes are best cut here and keep it. Raises ConfigError where it cannot be kept."""
    from ..kernels import tuning
    from .tune import decode_seconds

    try:
        tuning.tune(_kind(), lambda row: decode_seconds(row, _kind()))
    except OSError as error:
        raise ConfigError(f"{tuning.cache_path()} cannot be written: {error.strerror or error}") from error


def _torch() -> Finding:
    return _package("torch", "torch", "no engine", "install kvtier[hf]")


def _cupy() -> Finding:
    return _package("CuPy", "cupy", "host memory is not pinned", "install kvtier[cuda]")


def _triton() -> Finding:
    return _package("Triton", "triton", "no GPU kernels", "install triton, which comes with torch for CUDA")


def _package(name: str, package: str, cost: str, mend: str) -> Finding:
    return Finding.of(name, importlib.util.find_spec(package) is not None, _version(package), cost, mend)


def _codecs() -> Finding:
    """Whether Zarr finds our own codec; the others come with it."""
    is_found = bool(entry_points(group="zarr.codecs", name="kvtier.split"))
    said = ", ".join(CODECS) + f"; numcodecs {_version('numcodecs')}"
    return Finding.of(
        "codecs",
        is_found,
        said if is_found else f"{said}; zarr does not know kvtier.split",
        "zarr cannot read arrays stored under codec split",
        "install kvtier as a package (pip install), so that its entry points are known",
    )


def _version(package: str) -> str:
    """Of an installed package, by its import name; CuPy is distributed under several names."""
    for name in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "installed" if importlib.util.find_spec(package) is not None else "not installed"


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    return Finding.of(
        "memlock limit",
        unlimited,
        "unlimited" if unlimited else format_bytes(soft),
        "where the driver counts it, no more host memory than this can be pinned",
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1)",
    )


def _memory() -> Finding:
    """What the machine has and what is left of it; a host tier larger than that is not prefaulted."""
    machine = Machine()
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), machine.memory_limit_bytes()
    cap = f"container limit {format_bytes(limit)}" if limit is not None else "no container limit"
    room = machine.memory_room_bytes()
    return Finding.of(
        "memory",
        room > 1 << 30,
        f"{format_bytes(total)}, {cap}, {format_bytes(room)} can be taken now",
        "a host tier larger than what is left is not prefaulted, and using it all may end the process",
        "raise the limit (docker: --memory), or lower host_bytes",
    )


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    text = f"{format_bytes(free)} free at {path}"
    return Finding.of("disk", free > 8 << 30, text, "few parked sessions fit", "put the store on a larger disk")


def _disk_speed(path: Path) -> list[Finding]:
    """What a short calibration of the disk shows, and which settings follow from it."""
    try:
        probe = probe_disk(path)
    except OSError as error:
        reason = error.strerror or str(error)
        return [Finding("disk probe", False, reason, "no store can be kept here", "give --path on a writable disk")]
    rates = f"write {probe.write_rate / 1e9:.1f} GB/s, read {probe.read_rate / 1e9:.1f} GB/s"
    return [
        Finding.of(
            "O_DIRECT",
            probe.is_direct,
            f"accepted at {path}" if probe.is_direct else "refused",
            "reads and writes go through the page cache",
            "put the store on ext4 or xfs on a local disk",
        ),
        Finding("disk speed", True, f"{rates} in bursts, in requests of 2 MiB"),
        _disk_settings(path),
    ]


def _disk_settings(path: Path) -> Finding:
    """How stores here use the disk, and whether that was measured."""
    chosen = settings_for(path)
    found = f"queue depth {chosen.queue_depth}, segments of {format_bytes(chosen.segment_bytes)}"
    if chosen.source is None:
        return Finding("disk settings", True, f"{found}; the defaults (`kvtier doctor --tune --path {path}` measures)")
    try:
        figures = "; ".join(f"{name}: {_rates(chosen.measured[name])}" for name in ("write", "read", "fill"))
    except (ValueError, LookupError, TypeError, AttributeError):
        figures = "without figures"
    return Finding("disk settings", True, f"{found}; measured ({chosen.source}) {figures}")


def _rates(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {rate / 1e9:.2f}" for key, rate in rates.items()) + " GB/s"


def _calibrate(path: Path) -> None:
    """Measure what suits the disk here and keep it there. Raises ConfigError where it cannot be kept."""
    try:
        found = calibrate(path)
        measured = {
            "write": found.write_rates,  # bytes per second, by queue depth
            "read": found.read_rates,
            "fill": {format_bytes(size): rate for size, rate in found.segment_rates.items()},
            "day": date.today().isoformat(),
        }
        keep(path, found.queue_depth, found.segment_bytes, measured)
    except OSError as error:
        raise ConfigError(f"--tune: {path / DISK_FILE} cannot be made: {error.strerror or error}") from error


def _huge_pages() -> Finding:
    mode = Machine().huge_page_mode()
    return Finding.of(
        "huge pages",
        mode in ("always", "madvise"),
        f"transparent: {mode}",
        "disk reads into the host tier are some tenth slower, first copies half as fast (`kvtier bench host` measures it)",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or reserve some and set host_huge_pages='reserved'",
    )


def _reserved_pages() -> Finding:
    """Not needed where there are transparent ones."""
    machine = Machine()
    free, size = machine.huge_pages_free(), machine.huge_page_bytes()
    has_other = machine.huge_page_mode() in ("always", "madvise")
    return Finding.of(
        "reserved pages",
        bool(free) or has_other,
        f"{free} free of {format_bytes(size)}" + ("" if free else "; transparent ones serve" if has_other else ""),
        "host_huge_pages='reserved' is refused",
        "sysctl vm.nr_hugepages=N, as root and soon after the machine has started",
    )


def _prefault() -> Finding:
    rows, reason = aligned_rows(1, mmap.PAGESIZE), ""
    try:
        populate(*address_of(rows))
    except OSError as error:
        reason = error.strerror or str(error)
    return Finding.of(
        "prefault",
        not reason,
        f"MADV_POPULATE_WRITE: {reason}" if reason else "in the background (MADV_POPULATE_WRITE)",
        "the first copy into each page of the host tier also faults it in: 1.6 times slower in huge pages, 3.2 in small ones",
        "Linux 5.14 or later",
    )


def _numa() -> Finding:
    """Good where the host tier will lie near this process, or there is one node only."""
    machine, reason = Machine(), ""
    placement = Placement.choose("auto", machine=machine)
    nodes = machine.memory_nodes()
    if placement.policy != "none":
        try:
            memory_policy()
        except OSError as error:
            reason = error.strerror or str(error)
    text = placement.notice or f"{len(nodes)}; host memory: {placement.policy} {', '.join(map(str, placement.nodes))}"
    return Finding.of(
        "NUMA nodes",
        not reason,
        f"{len(nodes)}, memory policies are refused: {reason}" if reason else text,
        "the host tier cannot be bound: it lies wherever it is first touched",
        "in a container allow SYS_NICE (docker: --cap-add SYS_NICE), or start under numactl --membind",
    )
