"""`python -m kvtier.tools.gpu_check`: everything that needs a GPU in one command, kept as one JSON file.

First the tests marked `gpu` (gpu_tests.py), then the benchmarks (gpu_bench.py), then a short run under compute-sanitizer:
what is wrong is known before anything is timed. The file is written anew after each part, so a machine that goes away leaves
what was found until then. Exit codes: 0 all well, 1 a test, a benchmark or the sanitizer found something, 2 refused, 3 no
usable GPU (then nothing is written).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..tiers.backends import cuda_missing
from ..tiers.errors import ConfigError
from .gpu_tests import ROOT, WORKERS, has_failed, missing_packages, run_tests, sanitize

PARTS = ("tests", "bench", "sanitize")
DEFAULT_LIMIT_S = 3600.0
_LIBRARIES = ("kvtier", "torch", "triton", "transformers", "numpy", "cupy-cuda13x", "cupy-cuda12x")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    missing = cuda_missing()
    if missing is not None:
        print(f"gpu_check: no usable GPU: {missing}; nothing was run and nothing written", file=sys.stderr)
        return 3
    try:
        result = _check(_parts(arguments.only), Path(arguments.out), arguments.time_limit)
    except ConfigError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    from .gpu_bench import has_failed as has_failed_bench

    return int(has_failed(result["tests"], result["sanitizer"]) or has_failed_bench(result["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvtier.tools.gpu_check", description="GPU tests and benchmarks.")
    parser.add_argument(
        "--out", default=str(ROOT / "benchmarks" / "results"), metavar="DIR", help="where the JSON file goes"
    )
    parser.add_argument("--only", metavar="PART,..", help=f"of {', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=DEFAULT_LIMIT_S,
        metavar="S",
        help="seconds after which tests are ended and no further part begins (default 3600)",
    )
    return parser


def _parts(text: str | None) -> list[str]:
    asked = PARTS if text is None else text.split(",")
    if unknown := [part for part in asked if part not in PARTS]:
        raise ConfigError(f"--only {unknown[0]!r} is unknown; choose of {', '.join(PARTS)}")
    return [part for part in PARTS if part in asked]


def _check(parts: list[str], folder: Path, limit_s: float) -> dict[str, Any]:
    """Part after part, each kept when it ends. Tests run in processes that give all their device memory back."""
    if parts != ["bench"] and (missing := missing_packages()):
        raise ConfigError(
            f"{', '.join(missing)} not installed, which the tests need: on a machine without a registry, install wheels "
            "that were fetched elsewhere (docs/gpu.md), or use --only bench"
        )
    deadline_s = time.monotonic() + limit_s
    result = _begun(parts)
    for part in parts:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            result["not_run"].append(part)
        elif part == "tests":
            result["tests"] = run_tests(ROOT / "tests", limit_s=left_s, workers=min(WORKERS, os.cpu_count() or 1))
        elif part == "sanitize":
            result["sanitizer"] = sanitize(ROOT / "tests", limit_s=left_s)
        else:
            from .gpu_bench import run_gpu_benchmarks

            result["rows"] = run_gpu_benchmarks()
        path = write_result(result, folder, parts)
    print(_summary(result), f"kept in {path}", sep="\n")
    return result


def _begun(parts: list[str]) -> dict[str, Any]:
    """The result before anything ran."""
    return {
        "bench": "gpu_check",
        "command": "python -m kvtier.tools.gpu_check" + (f" --only {','.join(parts)}" if parts != list(PARTS) else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
        "tests": {},
        "rows": [],
        "sanitizer": {},
        "not_run": [],
    }


def _versions() -> dict[str, str]:
    from ..tiers.cuda import device_facts

    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = device_facts()
    return found | {"driver_cuda": str(facts["driver_cuda"]), "torch_cuda": str(facts["torch_cuda"])}


def _machine() -> dict[str, Any]:
    from ..tiers.cuda import device_facts

    facts = device_facts()
    return {
        "device": facts["name"],
        "device_memory_bytes": facts["memory_bytes"],
        "capability": facts["capability"],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "processor": platform.machine(),
    }


def write_result(result: dict[str, Any], folder: Path, parts: Sequence[str] = PARTS) -> Path:
    """Write gpu-check-<device>.json, or -<parts>.json where some were left out; readers see a whole file, old or new."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", result["machine"]["device"]).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    which = "" if list(parts) == list(PARTS) else "-" + "-".join(parts)
    path = folder / f"gpu-check-{device}{which}.json"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    return path


def _summary(result: dict[str, Any]) -> str:
    tests, sanitizer = result["tests"], result["sanitizer"]
    lines = [f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"] if tests else []
    lines += [f"  {one}" for one in [*tests.get("failures", ()), *tests.get("not_finished", ())]]
    for row in result["rows"]:
        if row["value"] is None:
            lines.append(f"{row['case']}: {row['reference']}")
            continue
        known = row["reference_value"] is not None and row["ratio"] is not None
        beside = f" ({row['reference']}: {row['reference_value']:.2f}; {row['ratio']:.3f})" if known else ""
        lines.append(f"{row['case']}, {row['metric']}: {row['value']:.2f} {row['unit']}{beside}")
    if sanitizer:
        found = f"{sanitizer.get('errors')} errors in {sanitizer.get('passed')} tests"
        lines.append(f"sanitizer: {sanitizer.get('not_run', found)}")
    lines += [f"{part}: not run, out of time" for part in result["not_run"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
