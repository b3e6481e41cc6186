"""Descriptors, carried out by memmove on host memory, do what the plain row copy does."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from kvtier.tiers.copies import Rows2D, plan_copies
from kvtier.tiers.streams import copy_rows_now


def carry_out(target, t, source, s, limit: int) -> int:
    descriptors, _ = plan_copies(Rows2D.of(target), t, Rows2D.of(source), s)
    for part in descriptors.batches(limit):
        assert 0 < len(part) <= limit
        for into, out_of, size in zip(part.targets.tolist(), part.sources.tolist(), part.sizes.tolist()):
            ctypes.memmove(into, out_of, size)
    return len(descriptors)


@pytest.mark.parametrize("case", range(40))
def test_descriptors_equal_the_plain_copy(case, seed):
    random = np.random.default_rng([seed, case])
    wide = random.integers(0, 256, (30, 64), np.uint8)
    low, high = sorted(random.choice(65, 2, replace=False).tolist())
    source = wide if case % 2 else wide[:, low:high]
    n = int(random.integers(1, 20))
    start = int(random.integers(0, 30 - n))
    s = np.arange(start, start + n) if case % 3 else random.choice(30, n, replace=False)
    t = s[::-1].copy() if case % 5 == 0 else np.arange(n)
    expected, got = (np.zeros((30, source.shape[1]), np.uint8) for _ in range(2))
    copy_rows_now(expected, t, source, s)
    carry_out(got, t, source, s, limit=int(random.integers(1, 8)))
    assert (got == expected).all()


def test_neighbouring_whole_rows_are_one_descriptor_and_slices_one_each():
    rows, target = np.zeros((8, 32), np.uint8), np.zeros((8, 32), np.uint8)
    assert carry_out(target, np.arange(8), rows, np.arange(8), 4096) == 1
    assert carry_out(target[:, :8], np.arange(8), rows[:, 8:16], np.arange(8), 4096) == 8


def test_what_does_not_fit_is_refused():
    rows = np.zeros((4, 32), np.uint8)
    with pytest.raises(ValueError, match="different width"):
        plan_copies(Rows2D.of(rows), np.arange(1), Rows2D.of(rows[:, :8]), np.arange(1))
    with pytest.raises(ValueError, match="same length"):
        plan_copies(Rows2D.of(rows), np.arange(2), Rows2D.of(rows), np.arange(1))
    with pytest.raises(ValueError, match="dense"):
        Rows2D.of(rows[:, ::2])
