"""`kvtier doctor`: what this machine has, and what each missing thing costs. Looks only; leaves nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from ..tiers.backends import cuda_missing
from ..tiers.errors import ConfigError
from ..tiers.layout import format_bytes
from ..tiers.nvme.calibrate import probe_disk
from ..tiers.nvme.codecs import CODECS


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `cost` says what its absence costs, empty when it is there."""

    name: str
    is_good: bool
    found: str
    cost: str = ""


def run_doctor(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if not path.is_dir():
        raise ConfigError(f"--path {str(path)!r} is not a directory")
    checks: list[Callable[[], Finding]] = [
        _torch,
        _cuda,
        _cupy,
        _triton,
        _codecs,
        _memlock,
        _memory,
        _huge_pages,
        _numa,
    ]
    findings = [check() for check in checks] + [_disk(path), *_disk_speed(path)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return 0
    for f in findings:
        print(
            f"{'ok  ' if f.is_good else 'miss'}  {f.name:<14} {f.found}"
            + (f"\n      costs: {f.cost}" if f.cost else "")
        )
    return 0


def _cuda() -> Finding:
    missing = cuda_missing()
    if missing is None:
        return Finding("CUDA", True, "torch and CuPy both see a device")
    return Finding("CUDA", False, missing, "the device tier is capped CPU memory, and host memory is not pinned")


def _torch() -> Finding:
    found = importlib.util.find_spec("torch") is not None
    return Finding("torch", found, _version("torch"), "" if found else "no engine; install kvtier[hf]")


def _cupy() -> Finding:
    found = importlib.util.find_spec("cupy") is not None
    return Finding("CuPy", found, _version("cupy"), "" if found else "host memory is not pinned; install kvtier[cuda]")


def _triton() -> Finding:
    found = importlib.util.find_spec("triton") is not None
    return Finding("Triton", found, _version("triton"), "" if found else "no GPU kernels")


def _codecs() -> Finding:
    """Whether Zarr finds our own codec; the others come with it."""
    is_found = bool(entry_points(group="zarr.codecs", name="kvtier.split"))
    said = ", ".join(CODECS) + f"; numcodecs {_version('numcodecs')}"
    return Finding(
        "codecs",
        is_found,
        said if is_found else f"{said}; zarr does not know kvtier.split",
        "" if is_found else "zarr cannot read arrays stored under codec split; install kvtier as a package",
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
    text = "unlimited" if unlimited else format_bytes(soft)
    return Finding("memlock limit", unlimited, text, "" if unlimited else "pinning more than this fails")


def _memory() -> Finding:
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cap = f", container limit {format_bytes(int(text))}" if text.isdigit() else ", no container limit"
    return Finding("memory", True, f"{format_bytes(total)}{cap}")


def _disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free
    enough = free > 8 << 30
    return Finding("disk", enough, f"{format_bytes(free)} free at {path}", "" if enough else "few parked sessions fit")


def _disk_speed(path: Path) -> list[Finding]:
    """What a half-second probe of the disk shows."""
    try:
        probe = probe_disk(path)
    except OSError as error:
        return [Finding("disk probe", False, error.strerror or str(error), "no store can be kept here")]
    depth = probe.best_depth
    rates = (
        f"write {max(probe.write_rates.values()) / 1e9:.1f} GB/s, read {max(probe.read_rates.values()) / 1e9:.1f} GB/s"
    )
    return [
        Finding(
            "O_DIRECT",
            probe.is_direct,
            f"accepted at {path}" if probe.is_direct else "refused",
            "" if probe.is_direct else "reads and writes go through the page cache",
        ),
        Finding("disk probe", True, f"{rates} in bursts; best from {depth} requests of 2 MiB in flight"),
    ]


def _huge_pages() -> Finding:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", file.read_text()) if file.exists() else None
    mode = chosen[1] if chosen else "unknown"
    good = mode in ("always", "madvise")
    return Finding("huge pages", good, mode, "" if good else "disk reads into the host tier are up to a fifth slower")


def _numa() -> Finding:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    cost = "" if nodes == 1 else "the host tier is not bound to a node: start under numactl --membind"
    return Finding("NUMA nodes", nodes == 1, str(nodes), cost)
