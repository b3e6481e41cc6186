"""Four calls of the Linux kernel that Python has no name for, made through the C library. All let go of the GIL.

`mmap.madvise` holds the GIL: populating 1 GiB with it stopped every other thread for up to 0.8 s, this way for none. Failures
are OSError; on other systems, and for processors whose call numbers are not listed, ENOSYS.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterable

MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE = 14, 15, 23
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_INTERLEAVE = 0, 1, 3
MPOL_F_ADDR = 2
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of mallopt
_MAX_NODES = 1024
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (_MAX_NODES // _WORD_BITS)
_NUMBERS = {  # of mbind, set_mempolicy, get_mempolicy
    "x86_64": (237, 238, 239),
    "aarch64": (235, 237, 236),
    "riscv64": (235, 237, 236),
}


def populate(address: int, nbytes: int) -> None:
    """Fault pages in, ready to be written, without changing a byte of them; pages that are there stay as they are.

    Safe while others write there. Raises: OSError; EINVAL from kernels before 5.14.
    """
    _check(_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), MADV_POPULATE_WRITE))


def advise(address: int, nbytes: int, advice: int) -> None:
    """Raises OSError where the kernel does not know the advice."""
    _check(_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice))


def keep_heap_small() -> None:
    """Ask the C library for few arenas and to give large blocks back at once; for a process with a bound on its memory.

    Does nothing where the library has no such call. Threads that allocate at the same time may wait for each other.
    """
    try:
        mallopt = _libc().mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 2)
    mallopt(_M_MMAP_THRESHOLD, 256 << 10)


def give_back_heap() -> None:
    """What the C library keeps of freed blocks for later, after much was needed once. Nothing where it has no such call."""
    try:
        _libc().malloc_trim(0)
    except (OSError, AttributeError):
        return


def bind_memory(address: int, nbytes: int, policy: int, nodes: Iterable[int]) -> None:
    """Set where pages of this range will be, for those that are not there yet. The address is a page's. Raises OSError."""
    flags = ctypes.c_ulong(0)
    start, length = ctypes.c_void_p(address), ctypes.c_ulong(nbytes)
    _call(0, start, length, ctypes.c_long(policy), _mask(nodes), ctypes.c_ulong(_MAX_NODES), flags)


def set_thread_policy(policy: int, nodes: Iterable[int]) -> None:
    """Set where pages go that this thread faults in and no range has a policy for. Raises OSError."""
    _call(1, ctypes.c_long(policy), _mask(nodes), ctypes.c_ulong(_MAX_NODES))


def memory_policy(address: int | None = None) -> tuple[int, set[int]]:
    """Policy and nodes of the range that holds an address, or of this thread. Raises OSError."""
    policy, mask = ctypes.c_int(), _Mask()
    flags = 0 if address is None else MPOL_F_ADDR
    _call(2, ctypes.byref(policy), mask, ctypes.c_ulong(_MAX_NODES), ctypes.c_void_p(address), ctypes.c_ulong(flags))
    nodes = {i for i in range(_MAX_NODES) if mask[i // _WORD_BITS] >> (i % _WORD_BITS) & 1}
    return policy.value, nodes


def _mask(nodes: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    for node in nodes:
        mask[node // _WORD_BITS] |= 1 << (node % _WORD_BITS)
    return mask


def _call(which: int, *arguments: object) -> None:
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, f"memory policies are not known for {platform.machine()}")
    _check(_libc().syscall(ctypes.c_long(numbers[which]), *arguments))


def _libc() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "not Linux")
    return _LIBC


def _check(code: int) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
