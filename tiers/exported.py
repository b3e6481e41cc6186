"""Device pools that another process may copy into and out of: how they are made, named, and mapped over there.

Two kinds of name for one thing: a memfd on the CPU backend (its descriptor travels with it), a CUDA IPC handle on a GPU
(cuda_ipc.py, loaded for the first such handle only). The owner exports, the copier maps; both then say rows. Guards the
owner's memory: the copier's mapping keeps it alive until it is closed, a memfd cannot shrink under it, and an owner that
may not free its pool yet hands it to `keep_for_good`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .errors import ConfigError
from .kernel_calls import populate
from .memory import address_of
from .shared import is_allocated, make_rows, map_rows
from .streams import Backend, Event, IntArray, Rows

MEMFD, CUDA = "memfd", "cuda"
KINDS = (MEMFD, CUDA)
PROBE_ROWS = 1  # behind the pages: what a registration is tried with, and nobody's page


@dataclass(slots=True, eq=False)
class ExportedRows:
    """`rows` are the pages, `probe` the row behind them; `handle` and, for a memfd, `fd` name all of them to others."""

    rows: Rows
    probe: Rows
    kind: str
    handle: bytes
    fd: int | None
    owner: object = None  # of memory that the rows do not keep alive by themselves

    def close(self) -> None:
        """No more names of it are given away."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class CopyStream(Protocol):
    """What a copier needs of a stream; see streams.Stream."""

    def copy_rows(self, target: Rows, target_rows: IntArray, source: Rows, source_rows: IntArray) -> None: ...

    def record(self) -> Event: ...


class MappedRows(Protocol):
    """Another process's pool, and streams of ours that copy into it (`promote`) and out of it (`demote`)."""

    rows: Any

    @property
    def promote(self) -> CopyStream: ...

    @property
    def demote(self) -> CopyStream: ...

    def close(self) -> None:
        """After the last copy: let go of the mapping."""


_KEPT: list[ExportedRows] = []


def keep_for_good(exported: ExportedRows) -> None:
    """Somebody may still copy into it, and nobody will tell when that is over: it lives as long as this process."""
    _KEPT.append(exported)


def export_rows(backend: Backend, rows: int, row_bytes: int) -> ExportedRows:
    """Zeroed device memory for `rows` pages and the probe row. Raises ConfigError where this device cannot export it."""
    if backend.name == "cuda":
        from .cuda_ipc import export_device_rows

        return export_device_rows(backend, rows, row_bytes)
    if backend.name != "cpu":
        raise ConfigError(f"backend {backend.name!r} has no memory that another process can map")
    return _export_memfd(rows, row_bytes)


def _export_memfd(rows: int, row_bytes: int) -> ExportedRows:
    """All of it is there at once, as on a device: who copies into it must not be charged for its pages."""
    try:
        made, fd = make_rows(rows + PROBE_ROWS, row_bytes, name="pool", huge_pages=True)
    except OSError as error:
        raise ConfigError(f"device_bytes: no memory of {rows * row_bytes} bytes to share ({error.strerror})") from error
    try:
        populate(*address_of(made))
    except OSError:  # a kernel before 5.14
        made[:] = 0
    return ExportedRows(made[:rows], made[rows:], MEMFD, b"", fd)


def map_exported(
    kind: str, handle: bytes, fd: int | None, rows: int, row_bytes: int, backend: Backend, slab: Rows
) -> MappedRows:
    """What another process exported as `rows` pages and the probe row. The descriptor is not needed afterwards.

    `slab`: host rows of ours that copies come from and go to. Raises ConfigError, saying what is wrong with the handle.
    """
    if kind == MEMFD:
        return _MappedMemfd(fd, rows + PROBE_ROWS, row_bytes, backend)
    if kind == CUDA:
        from .cuda_ipc import map_device_rows

        return map_device_rows(handle, rows + PROBE_ROWS, row_bytes, slab, backend.notify)
    raise ConfigError(f"pool of kind {kind!r} is unknown; this side maps {', '.join(KINDS)}")


class _MappedMemfd:
    """Copies run on the backend's own copy streams."""

    def __init__(self, fd: int | None, rows: int, row_bytes: int, backend: Backend) -> None:
        if fd is None:
            raise ConfigError("no descriptor came with a pool that is a memfd")
        if not is_allocated(fd):
            raise ConfigError("the pool's memory is not all there; fault it in before it is registered")
        self.rows = map_rows(fd, rows, row_bytes)
        self.promote: CopyStream = backend.promote
        self.demote: CopyStream = backend.demote

    def close(self) -> None:
        self.rows = np.empty((0, 0), np.uint8)
