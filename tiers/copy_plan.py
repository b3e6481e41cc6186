"""Copy plans: which bytes a copy of rows moves, as pointers and sizes, before any device is asked.

Pure arithmetic on addresses, the same for pinned host memory and device memory. Guards the memory around the rows: a
row number outside its rows is refused here, because a copy engine would not notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .runs import IntArray, plan_runs
from .streams import Rows

PointerArray = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class RowSpace:
    """Where rows lie: row i is the row_bytes bytes at address + i * stride_bytes."""

    address: int
    num_rows: int
    row_bytes: int
    stride_bytes: int
    is_device: bool

    @property
    def is_dense(self) -> bool:
        """Whether neighbouring rows touch."""
        return self.stride_bytes == self.row_bytes


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What copy i moves: sizes[i] bytes from sources[i] to targets[i]."""

    targets: PointerArray
    sources: PointerArray
    sizes: PointerArray

    def __len__(self) -> int:
        return len(self.sizes)

    def parts(self, limit: int) -> Iterator[Descriptors]:
        """The same copies in order, at most `limit` at a time."""
        for start in range(0, len(self), limit):
            part = slice(start, start + limit)
            yield Descriptors(self.targets[part], self.sources[part], self.sizes[part])


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """One copy of rows as runs: lengths[i] rows from source row source_starts[i] to target row target_starts[i]."""

    target: RowSpace
    source: RowSpace
    target_starts: IntArray
    source_starts: IntArray
    lengths: IntArray

    @property
    def is_dense(self) -> bool:
        """Whether a run is one stretch of bytes on both sides."""
        return self.target.is_dense and self.source.is_dense

    def descriptors(self) -> Descriptors:
        """One per run where a run is one stretch of bytes, else one per row."""
        if self.is_dense:
            t, s, rows = self.target_starts, self.source_starts, self.lengths
        else:
            within = np.arange(int(self.lengths.sum())) - np.repeat(
                np.cumsum(self.lengths) - self.lengths, self.lengths
            )
            t = np.repeat(self.target_starts, self.lengths) + within
            s = np.repeat(self.source_starts, self.lengths) + within
            rows = np.ones(len(t), np.int64)
        return Descriptors(
            (self.target.address + t * self.target.stride_bytes).astype(np.uint64),
            (self.source.address + s * self.source.stride_bytes).astype(np.uint64),
            (rows * self.target.row_bytes).astype(np.uint64),
        )


def row_space(rows: Rows) -> RowSpace:
    """Describe numpy or tensor rows. Raises ValueError unless they are uint8 [rows, row_bytes] with a dense last axis."""
    if isinstance(rows, np.ndarray):
        shape, strides, is_bytes = rows.shape, rows.strides, rows.dtype == np.uint8
        address, is_device = rows.ctypes.data, False
    else:
        shape, strides, is_bytes = tuple(rows.shape), tuple(rows.stride()), rows.element_size() == 1
        address, is_device = rows.data_ptr(), bool(rows.is_cuda)
    if len(shape) != 2 or not is_bytes or (shape[1] > 1 and strides[1] != 1) or strides[0] < 0:
        raise ValueError(f"rows must be uint8 [rows, row_bytes] with a dense last axis, got {shape}, strides {strides}")
    return RowSpace(address, shape[0], shape[1], strides[0], is_device)


def plan_copy(target: RowSpace, target_rows: IntArray, source: RowSpace, source_rows: IntArray) -> CopyPlan:
    """Plan target[target_rows[i]] <- source[source_rows[i]]. Raises ValueError for rows that do not fit."""
    if target.row_bytes != source.row_bytes:
        raise ValueError(f"rows of different width: target {target.row_bytes} bytes, source {source.row_bytes}")
    starts = plan_runs(target_rows, source_rows)
    for space, first, what in ((target, starts[0], "target_rows"), (source, starts[1], "source_rows")):
        if len(first) and (int(first.min()) < 0 or int((first + starts[2]).max()) > space.num_rows):
            raise ValueError(f"{what}: a row is outside [0, {space.num_rows})")
    return CopyPlan(target, source, *starts)
