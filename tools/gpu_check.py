"""`python -m kvtier.tools.gpu_check`: the GPU tests and GPU figures in one command, kept as one JSON file.

Run from a checkout (it runs tests/). Exit codes: 0 all passed, 1 a test failed, 2 refused, 3 no usable GPU here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tiers.backends import cuda_missing
from ..tiers.errors import ConfigError, KvTierError
from .bench import harness

TEST_TIMEOUT_S = 1200


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtier.tools.gpu_check", description="GPU tests and figures.")
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR", help="where the JSON file goes")
    parser.add_argument("--only", choices=("tests", "bench"), help="run one part")
    arguments = parser.parse_args(argv)
    missing = cuda_missing()
    if missing is not None:
        print(f"gpu_check: no usable GPU: {missing}; nothing was run and nothing written", file=sys.stderr)
        return 3
    try:
        return _check(arguments)
    except KvTierError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2


def _check(arguments: argparse.Namespace) -> int:
    tests: dict[str, Any] = {}
    rows: list[harness.Row] = []
    if arguments.only != "bench":
        tests = _run_tests(Path("tests"))
    if arguments.only != "tests":
        from .bench import gpu

        rows = gpu.rows()
    result = harness.report("gpu_check", rows)
    result["command"] = "python -m kvtier.tools.gpu_check"
    result["device"], result["tests"] = _device(), tests
    path = Path(arguments.out) / f"gpu-check-{result['device']['name'].replace(' ', '-').lower()}.json"
    harness.save(result, path)
    harness.show(result)
    print(f"tests: {tests or 'not run'}\nkept in {path}")
    return 1 if tests.get("failed") or tests.get("errors") else 0


def _run_tests(folder: Path) -> dict[str, Any]:
    """Counts by outcome, and the names of what failed."""
    if not folder.is_dir():
        raise ConfigError("there is no tests/ here; run gpu_check from the root of a checkout, or with --only bench")
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(folder), f"--junitxml={report}"]
        subprocess.run(command, timeout=TEST_TIMEOUT_S, check=False)
        return count_outcomes(report)


def count_outcomes(report: Path) -> dict[str, Any]:
    """What a JUnit report says: passed, failed, errors, skipped, and the names of failed tests."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise ConfigError(f"pytest wrote no test suite to {report}")
    total, failed, errors, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped"))
    bad = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed,
        "errors": errors,
        "skipped": skipped,
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
    }


def _device() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
