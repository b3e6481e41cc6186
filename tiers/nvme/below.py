"""Stores below a directory that is none itself, for messages that name the one which was probably meant.

pagerd keeps one store per model below its --nvme-path, and those of a trust domain a step deeper; whoever names the
path gets the names of the stores. Standard library only, since inspectors start with it. Names, opens nothing.
"""

from __future__ import annotations

from pathlib import Path

SHOWN = 3


def stores_below(path: Path) -> str:
    """The end of a message: ` Stores below it: ...`, or nothing where there are none."""
    try:
        found = sorted(
            str(file.parent) for pattern in ("*/store.json", "*/*/store.json") for file in path.glob(pattern)
        )
    except OSError:
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f". Stores below it: {', '.join(found[:SHOWN])}{more}" if found else ""
