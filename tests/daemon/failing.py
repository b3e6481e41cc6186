"""failing.py FILE ARGUMENTS OF PAGERD: a real pagerd whose disk refuses while FILE exists, with the error named in it.

ENOSPC: everything that needs room. EIO: every write and sync, and every third read. It tries again after half a second,
not after thirty.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtier.pager import cold
from kvtier.tiers.nvme.calls import SystemCalls

WRITES = ("pwritev", "append", "fdatasync", "fallocate", "set_size", "replace", "sync_directory")
NEEDS_NO_ROOM = ("fdatasync", "sync_directory", "replace")


def fail_while_told(flag: Path) -> None:
    reads = itertools.count()

    def error_now(name: str) -> str | None:
        try:
            said = flag.read_text().strip()
        except FileNotFoundError:
            return None
        if name == "preadv":
            return said if said == "EIO" and next(reads) % 3 == 0 else None
        return None if said == "ENOSPC" and name in NEEDS_NO_ROOM else said

    def failing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: SystemCalls, *what: Any, **how: Any) -> Any:
            if said := error_now(name):
                raise OSError(getattr(errno, said), os.strerror(getattr(errno, said)))
            return call(self, *what, **how)

        return made

    for name in (*WRITES, "preadv"):
        setattr(SystemCalls, name, failing(name, getattr(SystemCalls, name)))


def main() -> int:
    from kvtier.tools.pagerd import main as pagerd

    fail_while_told(Path(sys.argv[1]))
    cold.RETRY_S = 0.5
    return pagerd(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
