"""Host memory that other processes map: rows in a sealed memfd, passed on by descriptor.

The seals forbid changing the size, so that nobody who has the descriptor can make another process fault by cutting the
file; `read_only` ones forbid every later writable mapping too, also through /proc. Whoever may map rows can read every one
of them: one set of rows serves one trust domain. The memory lives until the last mapping is gone, also when its maker
was killed: a copy in flight then still reads what it was promised.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from .cpu import IO_DEPTH, CpuBackend
from .errors import ConfigError
from .kernel_calls import MADV_HUGEPAGE, advise
from .memory import address_of

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_SIZE_SEALS = _SEAL_SHRINK | _SEAL_GROW
_BLOCK_BYTES = 512  # of st_blocks


def make_rows(
    rows: int, row_bytes: int, *, name: str, read_only: bool = False, huge_pages: bool = False
) -> tuple[npt.NDArray[np.uint8], int]:
    """Zeroed rows that this process may write, and the descriptor for others. Raises OSError.

    `huge_pages` asks for them; the system grants them where transparent_hugepage/shmem_enabled is advise or within_size.
    """
    size = max(rows * row_bytes, mmap.PAGESIZE)
    fd = os.memfd_create(f"kvtier-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SIZE_SEALS | (_SEAL_FUTURE_WRITE if read_only else 0) | _SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    made = _rows_of(memory, rows, row_bytes)
    if huge_pages and made.nbytes:
        with contextlib.suppress(OSError):  # a kernel without them: only slower
            advise(*address_of(made), MADV_HUGEPAGE)
    return made, fd


def is_allocated(fd: int) -> bool:
    """Whether every page of a memfd is there, so that mapping them all takes no memory."""
    found = os.fstat(fd)
    return found.st_blocks * _BLOCK_BYTES >= found.st_size


def map_rows(fd: int, rows: int, row_bytes: int, *, read_only: bool = False) -> npt.NDArray[np.uint8]:
    """The rows behind a descriptor that another process made. The descriptor is not needed afterwards.

    Raises: ConfigError when it is smaller than that, or its size could still change under us.
    """
    size = max(rows * row_bytes, mmap.PAGESIZE)
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise ConfigError(f"shared memory: the descriptor is not a sealed memfd ({error.strerror})") from error
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise ConfigError(f"shared memory: seals {seals:#x} let its size change; need {_SIZE_SEALS:#x}")
    if os.fstat(fd).st_size < size:
        raise ConfigError(f"shared memory has {os.fstat(fd).st_size} bytes, {size} were announced")
    protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    return _rows_of(mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection), rows, row_bytes)


class SharingBackend(CpuBackend):
    """A CPU backend whose host memory others can map; `fds` in order of allocation. No device: it moves no pages."""

    def __init__(self, *, io_depth: int = IO_DEPTH) -> None:
        super().__init__(io_depth=io_depth)
        self.fds: list[int] = []

    def alloc_host(self, rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
        if rows == 0:
            return np.empty((0, row_bytes), np.uint8)
        made, fd = make_rows(rows, row_bytes, name="slab", huge_pages=huge_pages != "off")
        self.fds.append(fd)
        return made

    def close(self, timeout_s: float) -> None:
        super().close(timeout_s)
        while self.fds:
            os.close(self.fds.pop())


def _rows_of(memory: mmap.mmap, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory, np.uint8)[: rows * row_bytes].reshape(rows, row_bytes)
