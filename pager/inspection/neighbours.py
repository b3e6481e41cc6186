"""Other live stores on the file system of a store, found by the locks that their processes hold.

Reads /proc and nothing else; sees processes of the same user (all of them for root). Where /proc tells nothing, nothing
is found: this is for advice and guards no data.
"""

from __future__ import annotations

import os
from pathlib import Path

LOCK_NAME, IDENTITY_NAME = "LOCK", "store.json"


def other_stores(path: Path) -> list[tuple[int, str]]:
    """Process and directory of every other open store on the same file system."""
    try:
        ours, device = path.resolve(), path.stat().st_dev
    except OSError:
        return []
    found = set()
    for pid in _lock_holders():
        for directory in _locked_stores(pid):
            try:
                is_near = directory.stat().st_dev == device and (directory / IDENTITY_NAME).exists()
            except OSError:
                continue
            if is_near and directory.resolve() != ours:
                found.add((pid, str(directory)))
    return sorted(found)


def _lock_holders() -> set[int]:
    """Processes with an advisory lock on some file; all processes where the kernel does not list locks."""
    try:
        fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        holders = {int(row[4]) for row in fields if len(row) > 4 and row[1] == "FLOCK" and int(row[4]) > 0}
    except (OSError, ValueError):
        holders = set()
    return holders or {int(name) for name in os.listdir("/proc") if name.isdecimal()}


def _locked_stores(pid: int) -> list[Path]:
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return []
    return [Path(link).parent for link in links if link.endswith(f"/{LOCK_NAME}")]
