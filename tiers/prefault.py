"""Faulting host memory in ahead of its first use, in a thread of its own that nobody waits for.

A fresh page costs its first user a fault, and a disk read into fresh pages runs at half its rate. The kernel is asked to
populate a piece at a time (MADV_POPULATE_WRITE), which never changes a byte, so the memory may be in use meanwhile; no
way that writes would be safe, so where the kernel lacks this one nothing is done. Guards the engine: bounded pieces, no
page that the memory limits could not hold, and no failure that leaves the thread. Its priority is that of any thread: a
lower one would hold the GIL and the kernel's lock on the address space for longer whenever the processors are busy.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .kernel_calls import populate
from .layout import format_bytes
from .memory import address_of

PIECE_BYTES = 4 << 20  # half a millisecond in huge pages, one in small ones: what a closing pager waits for at most
CHECK_BYTES = 256 << 20  # so much between two looks at the memory limits
_RESERVE_SHARE = 32  # a thirty-second of the room stays untouched
_RETRY = (errno.EINTR, errno.EAGAIN)
_LOG = logging.getLogger("kvtier.host")


class Prefault:
    """Populates arrays in order, beginning at once. `state`: running, done, stopped or refused; `notice` says why."""

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[np.uint8]],
        *,
        room: Callable[[], int],
        populate: Callable[[int, int], None] = populate,
    ) -> None:
        """room: bytes that may still be taken, asked for again and again."""
        self.total_bytes = sum(rows.nbytes for rows in arrays)
        self.done_bytes = 0
        self.state, self.notice = "running", ""
        self._arrays, self._room, self._populate = arrays, room, populate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvtier-prefault", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """True when it has ended, whatever came of it."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop after the piece under way."""
        self._stop.set()
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            self.state = self._populate_all()
        except (OSError, ValueError) as error:  # ValueError: a kernel file of another shape
            self.state, self.notice = "refused", _reason(error)
        self._arrays = ()  # whoever drops the memory gets it back
        if self.notice:
            _LOG.warning("event=prefault_%s done_bytes=%d reason=%s", self.state, self.done_bytes, self.notice)

    def _populate_all(self) -> str:
        until_look = 0
        for rows in self._arrays:
            start, nbytes = address_of(rows)
            for address in range(start, start + nbytes, PIECE_BYTES):
                if self._stop.is_set():
                    return "stopped"
                if until_look <= 0:
                    if not self._fits():
                        return "refused"
                    until_look = CHECK_BYTES
                size = min(PIECE_BYTES, start + nbytes - address)
                self._populate_piece(address, size)
                self.done_bytes += size
                until_look -= size
        return "done"

    def _populate_piece(self, address: int, nbytes: int) -> None:
        """The kernel wants to begin at a page; a page that the piece shares with a neighbour is populated too."""
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        while True:
            try:
                return self._populate(first, address + nbytes - first)
            except OSError as error:
                if error.errno not in _RETRY or self._stop.is_set():
                    raise

    def _fits(self) -> bool:
        left, room = self.total_bytes - self.done_bytes, self._room()
        if left <= room - room // _RESERVE_SHARE:
            return True
        self.notice = (
            f"{format_bytes(left)} of the host tier are not prefaulted: the machine and its control group have "
            f"{format_bytes(room)} left; lower host_bytes or raise the memory limit"
        )
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.ENOSYS):
        return (
            "this kernel cannot populate memory (MADV_POPULATE_WRITE, Linux 5.14); first uses of host memory are slower"
        )
    return f"the kernel stopped populating host memory: {error}"
