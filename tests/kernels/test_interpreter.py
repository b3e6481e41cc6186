"""Runs the tests in `interpreted/` in a process where TRITON_INTERPRET was set before triton was imported.

The variable is read when a kernel is defined, so one process cannot both interpret kernels and compile them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: no kernels to interpret")

FILES = sorted(path.name for path in (Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    path = Path(__file__).parent / "interpreted" / name
    env = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
