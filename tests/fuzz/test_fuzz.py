"""Two million bad inputs: none crashes us, hangs us or makes us grow. --seed N takes others; a failure prints its own."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzzing
from targets import TARGETS

BY_NAME = {target.name: target for target in TARGETS}
SOAK_TIMES = 50


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BY_NAME)
def test_bad_input_is_refused_and_nothing_else(name, seed):
    """In a process of its own, whose memory and whose garbage are the target's and not those of earlier tests."""
    inputs = BY_NAME[name].inputs
    command = [sys.executable, fuzzing.__file__, name, str(1_000_000 * seed), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{name}: {done.stdout}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= inputs


def test_two_million_in_all():
    assert sum(target.inputs for target in TARGETS) >= 2_000_000


@pytest.mark.parametrize("name", BY_NAME)
def test_some_inputs_are_good(name, tmp_path):
    """A target whose every input is refused at its door tests the door alone."""
    target = BY_NAME[name]
    verdict = fuzzing.run(target, min(1000, target.inputs), 99)
    assert verdict.refused < verdict.inputs


@pytest.mark.parametrize(("limit", "lowered"), [("SLOWEST_S", -1.0), ("MOST_GROWTH_BYTES", -1)])
def test_a_failure_for_time_or_memory_says_how_to_see_it_again(monkeypatch, limit, lowered):
    monkeypatch.setattr(fuzzing, limit, lowered)
    with pytest.raises(AssertionError, match=r"again: python tests/fuzz/fuzzing.py journal 4 \d+$"):
        fuzzing.run(BY_NAME["journal"], 1, 4)


def test_an_input_that_waits_is_stopped_and_named(monkeypatch):
    monkeypatch.setattr(fuzzing, "LONGEST_S", 0.1)
    waiting = replace(BY_NAME["journal"], make=lambda _: nullcontext(lambda _: time.sleep(60)))
    with pytest.raises(AssertionError, match=r"input 0 of seed 4 raised Hang.*\nagain: python"):
        fuzzing.run(waiting, 1, 4)


@pytest.mark.soak
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("name", BY_NAME)
def test_many_more(name, seed):
    target = BY_NAME[name]
    print(f"{name}: {fuzzing.run(target, SOAK_TIMES * target.inputs, 1_000_000 * (seed + 1))}")


@pytest.mark.timeout(300)
def test_frames_under_coverage_guidance():
    """Where atheris installs: it looks for inputs that reach new code."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris; Python 3.11 or 3.12, Linux)")
    script = Path(__file__).with_name("guided.py")
    done = subprocess.run([sys.executable, script, "-max_total_time=20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
