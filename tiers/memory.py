"""Rows of host memory: exact, aligned, zeroed by being fresh, in huge pages where the system grants them.

A row array owns its mapping, which goes when the last view of it does. Nothing is faulted in here; prefault.py does
that. Guards the size: no advice reaches past the last row, so the kernel never backs more than was asked for.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import ConfigError
from .kernel_calls import MADV_HUGEPAGE, MADV_NOHUGEPAGE, advise
from .machine import Machine

HUGE_PAGES = ("auto", "off", "reserved")
_HUGE_BYTES = 2 << 20  # of a transparent huge page
_MAP_HUGETLB = 0x40000


def aligned_rows(rows: int, row_bytes: int, *, huge_pages: str = "auto") -> npt.NDArray[np.uint8]:
    """Zeroed host rows of exactly that size; from 2 MiB on they begin where a huge page does, else where a page does.

    huge_pages: auto asks for transparent ones, off forbids them, reserved takes them from vm.nr_hugepages (rounded up to
    whole ones).
    Raises: ConfigError when there are not enough reserved pages.
    Source: huge pages make disk reads into such memory 1.1 to 1.2 times faster; `mmap(-1, n)` alone is shared
    memory, which never gets them.
    """
    size = rows * row_bytes
    if size == 0:
        return np.empty((rows, row_bytes), np.uint8)
    if huge_pages == "reserved":
        return _reserved(size).reshape(rows, row_bytes)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size < _HUGE_BYTES:
        return np.frombuffer(mmap.mmap(-1, size, flags=private), np.uint8).reshape(rows, row_bytes)
    memory = np.frombuffer(mmap.mmap(-1, size + _HUGE_BYTES, flags=private), np.uint8)
    start = -memory.ctypes.data % _HUGE_BYTES  # what lies before and after the slab is never touched
    whole = size // _HUGE_BYTES * _HUGE_BYTES if huge_pages == "auto" else 0
    address = memory.ctypes.data + start
    try:
        if whole:
            advise(address, whole, MADV_HUGEPAGE)
        advise(address + whole, memory.nbytes - start - whole, MADV_NOHUGEPAGE)
    except OSError:  # a kernel without huge pages: only slower
        pass
    return memory[start : start + size].reshape(rows, row_bytes)


def address_of(rows: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Address and length of contiguous rows."""
    return rows.ctypes.data, rows.nbytes


def resident_bytes(arrays: Sequence[npt.NDArray[np.uint8]]) -> tuple[int, int]:
    """(faulted in, of that in huge pages) of arrays made by `aligned_rows`, after /proc/self/smaps; zeros where there is
    none.

    Cost: the kernel walks the page tables of the whole process, some ms per 10 GiB in pages of 4 KiB.
    """
    resident = huge = 0
    spans = [address_of(rows) for rows in arrays if rows.nbytes]
    for fields in _mappings_of(spans):
        reserved = fields.get("Private_Hugetlb", 0) + fields.get("Shared_Hugetlb", 0)
        resident += fields.get("Rss", 0) + reserved
        huge += fields.get("AnonHugePages", 0) + reserved
    total = sum(nbytes for _, nbytes in spans)
    return min(resident, total), min(huge, total)


def _reserved(size: int) -> npt.NDArray[np.uint8]:
    machine = Machine()
    page = machine.huge_page_bytes()
    count = -(-size // page)
    try:
        memory = mmap.mmap(-1, count * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB)
    except OSError as error:
        raise ConfigError(
            f"host_huge_pages='reserved': {count} huge pages of {page >> 10} KiB are needed, {machine.huge_pages_free()} are "
            f"free; raise vm.nr_hugepages, lower host_bytes, or use host_huge_pages='auto'"
        ) from error
    return np.frombuffer(memory, np.uint8)[:size]


def _mappings_of(spans: Sequence[tuple[int, int]]) -> list[dict[str, int]]:
    """Sizes in bytes by name of every mapping of this process in which one of these (address, bytes) lies.

    A process has tens of thousands of lines here: those of other mappings cost no more than a look at their first letter.
    """
    found: list[dict[str, int]] = []
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return found
    is_ours = False
    for line in lines:
        if not line[0].isupper():
            start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
            is_ours = any(start < address + nbytes and address < end for address, nbytes in spans)
            if is_ours:
                found.append({})
        elif is_ours and (field := re.match(r"(\w+):\s+(\d+) kB", line)):
            found[-1][field[1]] = int(field[2]) << 10
    return found
