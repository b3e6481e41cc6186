"""Copy plans against plain loops: the planned bytes, performed one by one, equal copying rows on the host."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from kvtier.tiers import copy_paths
from kvtier.tiers.copy_plan import CopyPlan, Descriptors, plan_copy, row_space
from kvtier.tiers.memcpy_batch import MAX_DESCRIPTORS
from kvtier.tiers.streams import copy_rows_now


def perform(copies: Descriptors) -> None:
    for target, source, size in zip(copies.targets, copies.sources, copies.sizes, strict=True):
        ctypes.memmove(int(target), int(source), int(size))


def plan(target, target_rows, source, source_rows) -> CopyPlan:
    return plan_copy(row_space(target), np.asarray(target_rows), row_space(source), np.asarray(source_rows))


def random_rows(random: np.random.Generator, num_rows: int, width: int, is_sliced: bool) -> np.ndarray:
    """Rows of their own, or a column slice of wider ones."""
    extra = int(random.integers(1, 50)) if is_sliced else 0
    low = int(random.integers(0, extra + 1))
    return random.integers(0, 256, (num_rows, width + extra), np.uint8)[:, low : low + width]


def random_case(seed: int):
    """Row lists with runs and gaps, over dense rows or column slices on either side."""
    random = np.random.default_rng(seed)
    width, num_rows = int(random.integers(1, 200)), int(random.integers(1, 60))
    source = random_rows(random, num_rows + 5, width, bool(seed & 1))
    target = random_rows(random, num_rows + 9, width, bool(seed & 2))
    count = int(random.integers(0, num_rows + 1))
    t = random.permutation(len(target))[:count]
    s = random.integers(0, len(source), count)
    if seed % 3:  # neighbours on both sides
        t = np.sort(t)
        s = (t + 2) % len(source)
    return target, t, source, s


@pytest.mark.parametrize("first_seed", [0, 100, 200, 300])
def test_descriptors_move_the_same_bytes_as_a_plain_copy(first_seed, seed):
    for case in range(seed + first_seed, seed + first_seed + 100):
        target, t, source, s = random_case(case)
        expected = target.copy()
        copy_rows_now(expected, t, source, s)
        perform(plan(target, t, source, s).descriptors())
        assert np.array_equal(target, expected), f"case {case}"


@pytest.mark.parametrize("copy", [copy_paths.copy_by_tensors, copy_paths.copy_on_host], ids=lambda f: f.__name__)
def test_other_paths_move_the_same_bytes(copy, seed):
    for case in range(seed, seed + 100):
        target, t, source, s = random_case(case)
        expected = target.copy()
        copy_rows_now(expected, t, source, s)
        copy(plan(target, t, source, s), target, source)
        assert np.array_equal(target, expected), f"case {case}"


def test_calls_get_the_planned_stretches_and_rectangles(seed):
    def line(target, source, size, stream):
        ctypes.memmove(target, source, size)

    def rectangle(target, target_pitch, source, source_pitch, width, height, stream):
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    for case in range(seed, seed + 100):
        target, t, source, s = random_case(case)
        expected = target.copy()
        copy_rows_now(expected, t, source, s)
        copy_paths.copy_by_calls(plan(target, t, source, s), line, rectangle, 7)
        assert np.array_equal(target, expected), f"case {case}"


def test_neighbours_are_one_descriptor_and_column_slices_one_per_row():
    pool = np.zeros((10, 64), np.uint8)
    dense = plan(pool, [2, 3, 4, 8], np.zeros((10, 64), np.uint8), [5, 6, 7, 0]).descriptors()
    assert dense.sizes.tolist() == [192, 64]
    assert (dense.targets - pool.ctypes.data).tolist() == [128, 512]
    sliced = plan(pool[:, 16:48], [2, 3, 4], np.zeros((10, 32), np.uint8), [5, 6, 7]).descriptors()
    assert sliced.sizes.tolist() == [32] * 3
    assert (sliced.targets - pool.ctypes.data).tolist() == [2 * 64 + 16, 3 * 64 + 16, 4 * 64 + 16]


@pytest.mark.parametrize("count", [0, 1, MAX_DESCRIPTORS, MAX_DESCRIPTORS + 1, 3 * MAX_DESCRIPTORS])
def test_long_lists_are_split_and_nothing_is_lost(count):
    source, target = np.arange(2 * count + 2, dtype=np.uint8)[:, None], np.zeros((count + 1, 1), np.uint8)
    source = np.ascontiguousarray(source)
    rows = np.arange(count)
    copies = plan(target, rows, source, 2 * rows).descriptors()  # every second row: no two can be merged
    parts = list(copies.parts(MAX_DESCRIPTORS))
    assert [len(p) for p in parts[:-1]] == [MAX_DESCRIPTORS] * (len(parts) - 1)
    assert sum(len(p) for p in parts) == count
    for part in parts:
        assert part.targets.flags.c_contiguous and part.targets.dtype == part.sizes.dtype == np.uint64
        perform(part)
    assert np.array_equal(target[:count, 0], source[: 2 * count : 2, 0])


def test_rows_that_do_not_fit_are_refused_before_anything_moves():
    pool, narrow = np.zeros((4, 64), np.uint8), np.zeros((4, 32), np.uint8)
    with pytest.raises(ValueError, match="target 64 bytes, source 32"):
        plan(pool, [0], narrow, [0])
    for t, s, what in (([4], [0], "target_rows"), ([-1], [0], "target_rows"), ([0, 1], [3, 4], "source_rows")):
        with pytest.raises(ValueError, match=what):
            plan(pool, t, pool, s)
    with pytest.raises(ValueError, match="same length"):
        plan(pool, [0, 1], pool, [0])
    for rows in (pool.T, pool.astype(np.float32), pool[0], pool[::-1]):
        with pytest.raises(ValueError, match="uint8"):
            row_space(rows)


def test_tensors_are_described_like_arrays():
    rows = np.zeros((5, 96), np.uint8)
    tensor = torch.from_numpy(rows)
    assert row_space(tensor) == row_space(rows)
    assert row_space(tensor[:, 32:64]) == row_space(rows[:, 32:64])


def test_the_probe_accepts_a_true_copy_and_refuses_a_wrong_one():
    shape = (copy_paths.PROBE_ROWS, copy_paths.PROBE_ROW_BYTES)
    source, device, back = (np.zeros(shape, np.uint8) for _ in range(3))
    assert copy_paths.is_exact(copy_paths.copy_on_host, source, device, back, lambda: None)

    def loses_the_last(plan, target, source):
        perform(next(plan.descriptors().parts(2)))

    assert not copy_paths.is_exact(loses_the_last, source, device, back, lambda: None)
