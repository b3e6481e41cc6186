"""Copy paths: planned copies through plain copy calls, through tensors, or on the host, and a test of any of them.

What runs them is handed in, so that nothing here names a device library. Every path gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from .copy_plan import CopyPlan, plan_copy, row_space
from .streams import Rows

_PROBE_TARGETS, _PROBE_SOURCES = np.array([3, 4, 5, 0, 9, 12]), np.array([7, 8, 9, 2, 0, 1])  # runs and single rows
PROBE_ROWS, PROBE_ROW_BYTES = 16, 512
_PROBE_COLUMNS = (slice(0, PROBE_ROW_BYTES), slice(128, 256))  # whole rows and column slices

Copy = Callable[[CopyPlan, Rows, Rows], None]


def copy_by_calls(plan: CopyPlan, line: Callable[..., None], rectangle: Callable[..., None], *rest: int) -> None:
    """One call per run: of a stretch of bytes or, for column slices, of a rectangle.

    Shapes: line(target, source, size, *rest); rectangle(target, target_pitch, source, source_pitch, width, height, *rest).
    """
    if plan.is_dense:
        d = plan.descriptors()
        for target, source, size in zip(d.targets.tolist(), d.sources.tolist(), d.sizes.tolist(), strict=True):
            line(target, source, size, *rest)
        return
    t, s = plan.target, plan.source
    for target_row, source_row, rows in _runs(plan):
        to, of = t.address + target_row * t.stride_bytes, s.address + source_row * s.stride_bytes
        rectangle(to, t.stride_bytes, of, s.stride_bytes, t.row_bytes, rows, *rest)


def copy_by_tensors(plan: CopyPlan, target: Rows, source: Rows) -> None:
    """Per run where runs are dense, else row by row: torch would take strided rows through memory of its own."""
    import torch

    to, of = (torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows for rows in (target, source))
    for t, s, rows in _runs(plan):
        if plan.is_dense:
            to[t : t + rows].copy_(of[s : s + rows], non_blocking=True)
            continue
        for i in range(rows):
            to[t + i].copy_(of[s + i], non_blocking=True)


def copy_on_host(plan: CopyPlan, target: Rows, source: Rows) -> None:
    """Now, by the caller's thread."""
    for t, s, rows in _runs(plan):
        np.copyto(target[t : t + rows], source[s : s + rows])


def is_exact(
    copy: Copy, source: npt.NDArray[np.uint8], device: Rows, back: npt.NDArray[np.uint8], finish: Callable[[], object]
) -> bool:
    """Whether rows come back as they were from a way to the device and back.

    Shapes: all [PROBE_ROWS, PROBE_ROW_BYTES]. `finish` waits for the copies; what the rows held is lost.
    """
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, np.uint8)
    for columns in _PROBE_COLUMNS:
        start, there, end = source[:, columns], device[:, columns], back[:, columns]
        end[:] = 0
        copy(plan_copy(row_space(there), _PROBE_TARGETS, row_space(start), _PROBE_SOURCES), there, start)
        copy(plan_copy(row_space(end), _PROBE_SOURCES, row_space(there), _PROBE_TARGETS), end, there)
        finish()
        if not np.array_equal(end[_PROBE_SOURCES], start[_PROBE_SOURCES]):
            return False
    return True


def _runs(plan: CopyPlan) -> Iterator[tuple[int, int, int]]:
    """(target row, source row, rows) of each run."""
    return zip(plan.target_starts.tolist(), plan.source_starts.tolist(), plan.lengths.tolist(), strict=True)
