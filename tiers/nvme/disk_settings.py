"""What suits a disk, kept in a file on it: requests in flight each way, and bytes per segment of a new store.

`kvtier doctor --tune` measures (calibrate.py) and keeps; who opens a store looks in its directory and those above it on
the same disk, and the nearest file counts. Guards: a file of somebody else's, or one that says what cannot be, is left
aside with a warning; none of this is ever a reason not to open a store.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cpu import IO_DEPTH
from . import SEGMENT_BYTES

DISK_FILE = "kvtier-disk.json"
VERSION = 1
MAX_IO_DEPTH = 256
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 1 << 20, 1 << 30
_MAX_FILE_BYTES = 1 << 16
_LOG = logging.getLogger("kvtier.nvme")


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """`source` is the file that says so, None for what holds where nobody measured; `measured` are the figures behind it."""

    queue_depth: int = IO_DEPTH
    segment_bytes: int = SEGMENT_BYTES
    source: Path | None = None
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)


def settings_for(path: str | os.PathLike[str] | None) -> DiskSettings:
    """What was measured for a store at this path, which need not exist yet; else the defaults."""
    if path is None:
        return DiskSettings()
    where = Path(path).absolute()
    try:
        folders = [folder for folder in (where, *where.parents) if folder.is_dir()]
        device = folders[0].stat().st_dev
        for folder in folders:
            if folder.stat().st_dev != device:
                break
            if (found := _read(folder / DISK_FILE)) is not None:
                return found
    except OSError as error:
        _LOG.warning("event=no_disk_settings path=%s error=%s: the defaults hold", where, error.strerror or error)
    return DiskSettings()


def keep(folder: Path, queue_depth: int, segment_bytes: int, measured: Mapping[str, Any]) -> Path:
    """Write what suits the disk of this folder there, with the figures behind it. Returns the file. Raises OSError."""
    path, spare = folder / DISK_FILE, folder / f"{DISK_FILE}.{os.getpid()}.new"
    said = {"version": VERSION, "queue_depth": queue_depth, "segment_bytes": segment_bytes, "measured": dict(measured)}
    try:
        with open(spare, "x", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
            file.write(json.dumps(said, indent=1) + "\n")
        spare.replace(path)
    except BaseException:
        spare.unlink(missing_ok=True)
        raise
    return path


def _read(path: Path) -> DiskSettings | None:
    """None where there is no such file, or none to go by."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            owner, raw = os.fstat(file.fileno()).st_uid, file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("event=disk_settings_unread path=%s error=%s", path, error.strerror or error)
        return None
    if owner not in (0, os.geteuid()):
        _LOG.warning(
            "event=disk_settings_foreign path=%s: it belongs to uid %d; remove it, or measure again", path, owner
        )
        return None
    try:
        said = json.loads(raw)
        depth, size = said["queue_depth"], said["segment_bytes"]
        if said["version"] != VERSION or type(depth) is not int or type(size) is not int:
            raise ValueError("not what this version writes")
        if not (1 <= depth <= MAX_IO_DEPTH and MIN_SEGMENT_BYTES <= size <= MAX_SEGMENT_BYTES):
            raise ValueError(f"queue_depth {depth}, segment_bytes {size}: out of bounds")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        _LOG.warning("event=disk_settings_bad path=%s error=%s: `kvtier doctor --tune` writes it anew", path, error)
        return None
    measured = said.get("measured")
    return DiskSettings(depth, size, path, measured if isinstance(measured, dict) else {})
