"""Files of a folder made durable and, for a cold read, out of the page cache."""

from __future__ import annotations

import os
from pathlib import Path


def sync_files(folder: Path, *, drop: bool = False) -> None:
    """Sync every file under a folder; `drop`: its pages leave the page cache then, as far as the kernel follows."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            if drop:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
