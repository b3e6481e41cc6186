"""History: a ring of metrics in one small file, a row every ten seconds, for charts of the last day.

Rows are counters and levels of fixed width; readers take differences. The file is written in place, never synced and
trusted by nobody: a torn row is one wrong point in a chart. Imports neither numpy nor the pager.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from ...tiers.errors import TierUnavailableError

MAGIC = b"KVTHIST1"
COLUMNS = (
    "time_s",  # of day
    "device_used_bytes",
    "host_used_bytes",
    "nvme_used_bytes",
    "device_hit_tokens",
    "host_hit_tokens",
    "nvme_hit_tokens",
    "miss_tokens",
    "ghost_tokens",
    "up_bytes",  # moved towards the device
    "down_bytes",
    "evicted_blocks",
    "sessions",
    "dirty_bytes",
)
_ROW = struct.Struct(f"<{len(COLUMNS)}d")
_HEAD = struct.Struct("<8sII")
NUM_ROWS, STEP_S = 8640, 10.0  # a day
SUFFIX = ".history"


def history_path(socket_path: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(socket_path)}{SUFFIX}")


class HistoryFile:
    """The writer's side; goes on in a file of an earlier process."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        head = _HEAD.pack(MAGIC, len(COLUMNS), NUM_ROWS)
        if os.pread(self._fd, _HEAD.size, 0) != head:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, head, 0)
        rows = _rows(os.pread(self._fd, NUM_ROWS * _ROW.size, _HEAD.size))
        self._next = (max(range(len(rows)), key=lambda i: rows[i][0]) + 1) if rows else 0

    def write(self, row: dict[str, float]) -> None:
        at = _HEAD.size + (self._next % NUM_ROWS) * _ROW.size
        os.pwrite(self._fd, _ROW.pack(*(row.get(name, 0.0) for name in COLUMNS)), at)
        self._next += 1

    def close(self) -> None:
        os.close(self._fd)


def row_of(status: dict[str, Any], now_s: float) -> dict[str, float]:
    """The columns from a pager's status."""
    row = {"time_s": now_s, "sessions": status["sessions"]}
    for name, tier in status["tiers"].items():
        row[f"{name}_used_bytes"], row[f"{name}_hit_tokens"] = tier["used_bytes"], tier["hit_tokens"]
        row["evicted_blocks"] = row.get("evicted_blocks", 0) + tier["evicted_blocks"]
        row["dirty_bytes"] = row.get("dirty_bytes", 0) + tier["dirty_bytes"]
    row["miss_tokens"], row["ghost_tokens"] = status["miss_tokens"], status["ghost_tokens"]
    for counter in status["counters"]:
        if counter["name"] == "moved_bytes":
            way = counter["labels"]["direction"]
            name = {"host_to_device": "up_bytes", "nvme_to_host": "up_bytes"}.get(way, "down_bytes")
            row[name] = row.get(name, 0) + counter["value"]
    return row


def read_history(path: Path, since_s: float = 0.0) -> list[dict[str, float]]:
    """Rows later than a time of day, oldest first. Raises TierUnavailableError when there is no such file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TierUnavailableError(
            f"no history at {path}: {error.strerror}; a pager with a socket writes one"
        ) from error
    if raw[: _HEAD.size] != _HEAD.pack(MAGIC, len(COLUMNS), NUM_ROWS):
        raise TierUnavailableError(f"{path} is not a history of this version")
    rows = sorted(row for row in _rows(raw[_HEAD.size :]) if row[0] > since_s)
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _rows(raw: bytes) -> list[tuple[float, ...]]:
    whole = len(raw) // _ROW.size * _ROW.size
    return [row for row in _ROW.iter_unpack(raw[:whole]) if row[0] > 0]
