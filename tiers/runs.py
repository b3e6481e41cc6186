"""Runs: which rows of a copy lie next to each other on both sides, so that they can move as one.

Pure arithmetic on row numbers; the CPU copy and the CUDA copy plan with the same function.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def plan_runs(target_rows: IntArray, source_rows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Merge neighbours: starts in the target, starts in the source, lengths.

    Shapes: inputs int64 [n] -> three int64 [m], m <= n; run i copies target[t : t + length] <- source[s : s + length].
    Raises: ValueError when the two differ in length.
    """
    t, s = np.asarray(target_rows, np.int64), np.asarray(source_rows, np.int64)
    if t.shape != s.shape or t.ndim != 1:
        raise ValueError(f"target_rows {t.shape} and source_rows {s.shape} must be lists of the same length")
    if not len(t):
        return t, s, t
    is_start = np.ones(len(t), bool)
    is_start[1:] = (np.diff(t) != 1) | (np.diff(s) != 1)
    starts = np.flatnonzero(is_start)
    return t[starts], s[starts], np.diff(starts, append=len(t))
