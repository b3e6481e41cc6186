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

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
HALVES = {"first": FILES[::2], "second": FILES[1::2]}  # two processes load torch, not one for every file


@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", HALVES)
def test_kernels_in_the_interpreter(half):
    env = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *map(str, HALVES[half])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
