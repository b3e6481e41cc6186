"""Requests of every kind at once, with sessions between them, on tiers that are too small: each says what it says alone.

A failure prints the test that repeats it; on a real backend the order is the machine's, and it may take some tries, or
`--slow SEED`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from kvtier.tiers.cpu import CpuBackend

from .traffic import Traffic

CASES, ROUNDS = 5, 25
SOAK = 3000  # seeds


def run(number: int, rounds: int = ROUNDS, **options) -> Traffic:
    """One seed; whatever goes wrong comes out with how to see it again."""
    case = f"tests/engine/test_mixed_traffic.py::test_each_says_what_it_says_alone[{number % CASES}]"
    with tempfile.TemporaryDirectory(prefix="kvtier-traffic-") as folder:
        try:
            return Traffic(number, Path(folder), **options).run(rounds)
        except Exception as error:
            raise AssertionError(
                f"seed {number}: {error!r}\nagain: pytest '{case}' --seed {number // CASES}"
            ) from error


@pytest.mark.parametrize("case", range(CASES))
def test_each_says_what_it_says_alone(case, seed):
    run(CASES * seed + case)


def test_the_same_seed_gives_the_same_run(seed, tmp_path):
    """Of a world in memory: a disk has times of its own."""
    number = next(n for n in count(10 + seed) if "nvme_path" not in Traffic.shape_of(n, tmp_path).settings)
    first, second = run(number, 20), run(number, 20)
    assert first.ends == second.ends and first.clock.now_s == second.clock.now_s


@pytest.mark.soak
@pytest.mark.timeout(36000)
def test_many_seeds(seed):
    ends: Counter[str] = Counter()
    for number in range(SOAK):
        ends += run(1_000_000 * (seed + 1) + number).ends
    print(ends)


@pytest.mark.soak
@pytest.mark.timeout(36000)
def test_many_seeds_on_real_threads(seed):
    for number in range(SOAK // 10):
        run(2_000_000 * (seed + 1) + number, make_backend=lambda: CpuBackend(poison=True))
