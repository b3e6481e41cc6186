"""`python -m kvtier.tools.gpu_check`: everything that needs a GPU in one command, kept as one JSON file.

Runs the tests marked `gpu` in a process of their own, then the GPU benchmarks. Exit codes: 0 all well, 1 a test or a
benchmark failed, 2 refused, 3 no usable GPU (then nothing is written).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..tiers.backends import cuda_missing
from ..tiers.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TESTS_TIMEOUT_S = 3600
_LIBRARIES = ("kvtier", "torch", "triton", "transformers", "numpy", "cupy-cuda13x", "cupy-cuda12x")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    missing = cuda_missing()
    if missing is not None:
        print(f"gpu_check: no usable GPU: {missing}; nothing was run and nothing written", file=sys.stderr)
        return 3
    try:
        result = _check(arguments.only)
    except ConfigError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    path = write_result(result, Path(arguments.out))
    print(_summary(result), f"kept in {path}", sep="\n")
    from .gpu_bench import has_failed

    tests = result["tests"]
    return 1 if tests.get("failed") or tests.get("timed_out") or has_failed(result["rows"]) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvtier.tools.gpu_check", description="GPU tests and benchmarks.")
    parser.add_argument(
        "--out", default=str(ROOT / "benchmarks" / "results"), metavar="DIR", help="where the JSON file goes"
    )
    parser.add_argument("--only", choices=("tests", "bench"), help="leave the other part out")
    return parser


def _check(only: str | None) -> dict[str, Any]:
    """Tests first, in a process that gives all its device memory back."""
    tests = {} if only == "bench" else run_tests(ROOT / "tests", "-m", "gpu")
    rows: list[dict[str, Any]] = []
    if only != "tests":
        from .gpu_bench import run_gpu_benchmarks

        rows = run_gpu_benchmarks()
    return {
        "bench": "gpu_check",
        "command": "python -m kvtier.tools.gpu_check" + (f" --only {only}" if only else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": _machine(),
        "tests": tests,
        "rows": rows,
    }


def run_tests(folder: Path, *options: str) -> dict[str, Any]:
    """Counts of a pytest run, and the names of what failed. Raises ConfigError when there are no tests there."""
    if not folder.is_dir():
        raise ConfigError(f"no tests at {folder}: run gpu_check from a checkout, or with --only bench")
    with tempfile.TemporaryDirectory(prefix="kvtier-gpu-check-") as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *options, f"--junitxml={report}", str(folder)]
        try:
            code = subprocess.run(command, cwd=folder.parent, timeout=TESTS_TIMEOUT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "timed_out": True}
        if not report.exists():
            raise ConfigError(f"pytest ended with code {code} and wrote no report; run it by hand: {' '.join(command)}")
        return _counts(ElementTree.parse(report))


def _counts(report: Any) -> dict[str, Any]:
    cases = list(report.iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
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


def write_result(result: dict[str, Any], folder: Path) -> Path:
    """Write gpu-check-<device>.json; readers see the old file or the new one, never half of one."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", result["machine"]["device"]).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-check-{device}.json"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
    return path


def _summary(result: dict[str, Any]) -> str:
    tests = result["tests"]
    lines = [f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"] if tests else []
    for row in result["rows"]:
        if row["value"] is None:
            lines.append(f"{row['case']}: {row['reference']}")
            continue
        beside = f"{row['reference']}: {row['reference_value']:.2f}"
        lines.append(f"{row['case']}, {row['metric']}: {row['value']:.2f} {row['unit']} ({beside}; {row['ratio']:.3f})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
