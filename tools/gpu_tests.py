"""The tests marked `gpu` for gpu_check: each file in a process of its own, and a few of them under compute-sanitizer.

A kernel that goes wrong can spoil every later call of its process, so files run one after the other, those first that the
others stand on, and a process that outlasts its time is ended with all that it started. Guards: what was found before a
crash or the limit is kept, and what did not end is named.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tiers.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("tiers", "kernels", "pager", "daemon", "engine")
NEEDED = ("crc32c", "msgpack", "xxhash", "triton", "transformers", "pytest", "pytest_timeout", "hypothesis")
SHORT = (
    "byte_equal or streamed_blocks or quantised_bytes or pages_are_scored or (plain and (int4 or hack2))"
    " or ((marked_as or in_any_order) and int4)"
)
WORKERS = 8  # most of the time is the compiler's
_MARK = "mark.gpu"
_REFUSALS = (3, 4, 5)  # of pytest: a fault of its own, arguments that it does not understand, no test found
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_MESSAGE_CHARACTERS, _TOLD_LINES = 300, 60


def missing_packages() -> list[str]:
    """Packages that the tests need and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def gpu_files(folder: Path) -> list[Path]:
    """Files with such tests. Others are not even imported: they need packages that a machine with a GPU may not have."""
    found = [
        path for path in folder.rglob("test_*.py") if _MARK in path.read_text() and path.name != "test_gpu_check.py"
    ]
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda path: (rank.get(path.parent.name, len(rank)), str(path)))


def run_tests(folder: Path, *options: str, limit_s: float = 3600.0, workers: int = 1) -> dict[str, Any]:
    """Counts over all files, the names of what failed with their first line, and files that did not end.

    Raises: ConfigError when there are no tests there.
    """
    if not folder.is_dir():
        raise ConfigError(f"no tests at {folder}: run gpu_check from a checkout, or with --only bench")
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "not_finished": []}
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        options = (*options, "-n", str(workers), "--dist", "worksteal")
    deadline_s = time.monotonic() + limit_s
    for file in gpu_files(folder):
        name = str(file.relative_to(folder.parent))
        with tempfile.TemporaryDirectory(prefix="kvtier-gpu-check-") as temporary:
            report = Path(temporary) / "report.xml"
            command = [*_pytest(report), *options, str(file)]
            code, _ = _run(command, folder.parent, _environment(Path(temporary)), deadline_s - time.monotonic())
            if report.exists():
                _add(found, ElementTree.parse(report))
            elif code is None:
                found["not_finished"].append(f"{name}: out of time")
            else:
                found["not_finished"].append(f"{name}: pytest ended with code {code} and wrote no report")
    return found


def sanitize(folder: Path, *, limit_s: float = 600.0) -> dict[str, Any]:
    """A few tests under memcheck, every tensor in memory of its own, so that a step outside it is seen."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"not_run": "compute-sanitizer is not on the PATH; it comes with CUDA's toolkit"}
    files = [str(path) for path in gpu_files(folder) if path.parent.name == "kernels"]
    with tempfile.TemporaryDirectory(prefix="kvtier-gpu-check-") as temporary:
        report = Path(temporary) / "report.xml"
        # what the runtime refuses while torch looks around is no error of a kernel
        watched = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--report-api-errors", "no"]
        command = [*watched, *_pytest(report), "-k", SHORT, *files]
        environment = _environment(Path(temporary)) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, told = _run(command, folder.parent, environment, limit_s, is_kept=True)
        counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
        if report.exists():
            _add(counts, ElementTree.parse(report))
    return _judge(code, told, counts)


def _judge(code: int | None, told: str, counts: dict[str, Any]) -> dict[str, Any]:
    """What a run under the sanitizer says. Clean: it ended by itself, counted no error, and the tests passed."""
    summary, lines = _SUMMARY.search(told), told.strip().splitlines()
    if code in _REFUSALS and summary is not None:
        message = f"pytest ended with code {code} and ran no test"
        return {"tool": "memcheck", **counts, "failed": 1, "failures": [message], "told": lines[-_TOLD_LINES:]}
    if code is None or summary is None or not counts["passed"]:
        why = "out of time" if code is None else f"ended with code {code}, {counts['passed']} tests passed"
        return {"not_run": f"compute-sanitizer: {why}", "told": lines[-_TOLD_LINES:]}
    errors = int(summary[1])
    found = {"tool": "memcheck", "errors": errors, **counts}
    return found if not errors and not counts["failed"] else found | {"told": lines[:_TOLD_LINES]}


def has_failed(tests: dict[str, Any], sanitizer: dict[str, Any]) -> bool:
    """A sanitizer that does not run on this machine is no failure; one that finds something is."""
    return bool(
        tests.get("failed")
        or tests.get("not_finished")
        or (tests and not tests["passed"])
        or sanitizer.get("errors")
        or sanitizer.get("failed")
    )


def _pytest(report: Path) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]


def _environment(temporary: Path) -> dict[str, str]:
    """Ours, and this very package by name, installed or not: the tests take the checkout's folder off the path."""
    (temporary / "kvtier").symlink_to(ROOT / "kvtier")
    known = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(temporary), *([known] if known else [])])}


def _run(
    command: Sequence[str], folder: Path, environment: dict[str, str], limit_s: float, *, is_kept: bool = False
) -> tuple[int | None, str]:
    """Exit code, None at the limit, and what was printed if that is kept."""
    kept = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if is_kept else {}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, text=True, **kept)  # type: ignore[call-overload]
    try:
        told, _ = process.communicate(timeout=max(0.0, limit_s))
        return process.returncode, told or ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # workers, too
        told, _ = process.communicate()
        return None, told or ""
    except BaseException:  # Ctrl-C reaches us alone: the session is another
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _add(found: dict[str, Any], report: Any) -> None:
    """Add the counts of one pytest report."""
    cases = list(report.iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    found["passed"] += len(cases) - len(bad) - skipped
    found["failed"] += len(bad)
    found["skipped"] += skipped
    found["failures"] += [f"{case.get('classname')}::{case.get('name')}: {_message(case)}" for case in bad]


def _message(case: Any) -> str:
    """The first line of what a test failed with."""
    told = case.find("failure") if case.find("failure") is not None else case.find("error")
    return str(told.get("message") or told.text or "").strip().partition("\n")[0][:_MESSAGE_CHARACTERS]
