"""What every benchmark shares: interleaved rounds, medians, one result object, one table.

Cases of one comparison run in turn within each round, so that a machine that slows down slows all of them. `ratio` is
always "higher is better for kvtier" and its reference was measured in the same run; a reference that is not installed
is said so in its row and not made up.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...tiers.errors import ConfigError

REPORTED_PACKAGES = ("kvtier", "torch", "transformers", "numpy", "zarr", "numcodecs")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `reference_value` and `ratio` are None when there is nothing to compare with in this run."""

    case: str
    metric: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None
    ratio: float | None = None
    rounds: int = 1

    @classmethod
    def of_times(
        cls, case: str, metric: str, unit: str, ours_s: float, reference: str, reference_s: float, scale: float, n: int
    ) -> Row:
        """A row of two durations: value = seconds x scale, ratio = how many times faster than the reference."""
        return cls(case, metric, ours_s * scale, unit, reference, reference_s * scale, reference_s / ours_s, n)


def check_folder(path: str) -> None:
    """Raises ConfigError where --path names none."""
    if not Path(path).is_dir():
        raise ConfigError(f"--path {path!r} is not a directory")


def interleave(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
    order: random.Random | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case in every round, the cases taking turns; `before` a case runs what is not timed.

    With `order`, every round has an order of its own: behind a rate limiter it matters who comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        turns = list(cases.items())
        if order is not None:
            order.shuffle(turns)
        for name, run in turns:
            if before is not None and name in before:
                before[name]()
            start_s = clock()
            run()
            spent_s = clock() - start_s
            if number >= warmup:
                seconds[name].append(spent_s)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def report(bench: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The result object that every benchmark prints."""
    return {
        "bench": bench,
        "command": " ".join(["kvtier", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": _machine(),
        "rows": [asdict(row) for row in rows],
    }


def show(result: Mapping[str, Any]) -> None:
    """The result as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    machine = result["machine"]
    title = f"{result['bench']}: {machine['cpu']}, {machine['cores']} cores"
    table = Table("case", "metric", "value", "unit", "reference", "its value", "ratio", title=title)
    for row in result["rows"]:
        known = row["reference_value"] is not None
        table.add_row(
            row["case"],
            row["metric"],
            f"{row['value']:,.4g}",
            row["unit"],
            row["reference"],
            f"{row['reference_value']:,.4g}" if known else "-",
            f"{row['ratio']:.2f}x" if row["ratio"] is not None else "-",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write the object whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    """What a run that may have used a GPU says about it."""
    from ...tiers.backends import cuda_missing

    if cuda_missing(probe="torch" in sys.modules) is not None:
        return {}
    from ...tiers.cuda import device_facts

    return {"gpu": device_facts() | {"triton": version("triton")}}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
