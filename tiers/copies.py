"""Copies as descriptors: where bytes come from, where they go, how many; worked out on the host without any CUDA.

Rows may be column slices of wider rows (one layer of each block), so a row's stride and its width are two things. Whole
rows that neighbour each other on both sides become one descriptor; slices stay one descriptor per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .runs import IntArray, plan_runs


@dataclass(frozen=True, slots=True)
class Rows2D:
    """Memory of rows: address of row 0, bytes from row to row, bytes that count in each."""

    address: int
    stride: int
    width: int

    @classmethod
    def of(cls, rows: Any) -> Rows2D:
        """Of uint8 rows [n, width], a numpy array or a torch tensor, dense within a row. Raises ValueError."""
        if isinstance(rows, np.ndarray):
            address, stride, dense = rows.ctypes.data, rows.strides[0], rows.shape[1] <= 1 or rows.strides[1] == 1
        else:
            address, stride, dense = rows.data_ptr(), rows.stride(0), rows.shape[1] <= 1 or rows.stride(1) == 1
        if not dense:
            raise ValueError(f"rows {tuple(rows.shape)} are not dense within a row")
        return cls(int(address), int(stride), int(rows.shape[1]))

    @property
    def is_dense(self) -> bool:
        return self.stride == self.width


@dataclass(frozen=True, slots=True)
class Descriptors:
    """One copy of `sizes[i]` bytes from `sources[i]` to `targets[i]` each. All uint64 [n]."""

    targets: npt.NDArray[np.uint64]
    sources: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.sizes)

    def batches(self, limit: int) -> Iterator[Descriptors]:
        """The same copies, at most `limit` at a time."""
        for start in range(0, len(self), limit):
            part = slice(start, start + limit)
            yield Descriptors(self.targets[part], self.sources[part], self.sizes[part])


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of neighbouring rows: first row in the target, first row in the source, number of rows. All int64 [m]."""

    targets: IntArray
    sources: IntArray
    counts: IntArray


def plan_copies(
    target: Rows2D, target_rows: IntArray, source: Rows2D, source_rows: IntArray
) -> tuple[Descriptors, Runs]:
    """The copies that make target[target_rows[i]] = source[source_rows[i]] for all i, and the runs that they follow.

    Raises: ValueError when rows differ in width or the lists in length.
    """
    if target.width != source.width:
        raise ValueError(f"rows of different width: target {target.width}, source {source.width} bytes")
    runs = Runs(*plan_runs(target_rows, source_rows))
    if target.is_dense and source.is_dense:
        firsts_t, firsts_s, counts = runs.targets, runs.sources, runs.counts
    else:
        firsts_t, firsts_s = np.asarray(target_rows, np.int64), np.asarray(source_rows, np.int64)
        counts = np.ones(len(firsts_t), np.int64)
    return (
        Descriptors(
            (target.address + firsts_t * target.stride).astype(np.uint64),
            (source.address + firsts_s * source.stride).astype(np.uint64),
            (counts * target.width).astype(np.uint64),
        ),
        runs,
    )
