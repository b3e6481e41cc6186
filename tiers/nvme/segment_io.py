"""Bytes to and from segments, counted: what `blocks` and `encoded` share. A call that fails says False and is not repeated."""

from __future__ import annotations

from typing import Any

from .files import Segment, SegmentFiles


class SegmentIo:
    """Called from many workers at once. Counts are of bytes that the kernel took or gave."""

    def __init__(self, files: SegmentFiles) -> None:
        self._files = files
        self.bytes_read = self.bytes_written = 0
        self.last_write_error: str | None = None

    def read(self, segment: Segment, buffers: list[Any], offset: int, wanted: int) -> bool:
        """Whether all of it came."""
        try:
            with self._files.use(segment) as fd:
                got = self._files.calls.preadv(fd, buffers, offset)
        except OSError:
            return False
        self.bytes_read += got
        return got == wanted

    def write(self, segment: Segment, buffers: list[Any], offset: int, wanted: int, *, is_empty: bool) -> bool:
        """Whether all of it went down. `is_empty`: nothing is listed in this segment (see SegmentFiles.use)."""
        try:
            with self._files.use(segment, create=True, is_empty=is_empty) as fd:
                written = self._files.calls.pwritev(fd, buffers, offset)
        except OSError as error:
            self.last_write_error = error.strerror or str(error)
            return False
        self.bytes_written += written
        return written == wanted
