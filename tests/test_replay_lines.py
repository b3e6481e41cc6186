"""A randomised test that fails names itself and its seed in one line, however quiet pytest is told to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)
FAILING = """
import pytest
def test_draws(seed):
    assert not seed
@pytest.mark.soak
def test_draws_long(seed):
    assert not seed
def test_draws_nothing():
    assert False
"""


def test_a_failing_test_that_draws_says_how_to_run_it_again(tmp_path):
    (tmp_path / "test_it.py").write_text(FAILING)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    env = {**os.environ, "PYTHONPATH": TESTS}

    def run(*given: str) -> str:
        done = subprocess.run([*command, *given, "test_it.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout

    quick = run("--seed", "7")
    assert quick.count("python -m pytest") == 1 and "python -m pytest 'test_it.py::test_draws' --seed 7" in quick
    assert "python -m pytest -m soak 'test_it.py::test_draws_long' --seed 7" in run("-m", "soak", "--seed", "7")
