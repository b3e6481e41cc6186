"""Group commit: many writes become durable together. Data and index pages first, then the journal that lists them.

`batch` commits in the background after so many bytes or so much time, whichever is first; `always` before a write counts
as done; `none` never (a crash of the machine then costs misses, and still no wrong block: checksums bind bytes to keys).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, get_args

from ..errors import ConfigError

Durability = Literal["none", "batch", "always"]
COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 0.1


def check_durability(name: str) -> Durability:
    if name not in get_args(Durability):
        raise ConfigError(f"durability={name!r} is unknown; choose {', '.join(get_args(Durability))}")
    return name  # type: ignore[return-value]


class Committer:
    """A thread that calls `commit` when enough has been written or waited for. Errors are kept for whoever asks."""

    def __init__(self, commit: Callable[[], None]) -> None:
        self._commit = commit
        self._changed = threading.Condition()
        self._waiting_bytes = 0
        self._since_s: float | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kvtier-commit", daemon=True)
        self._thread.start()

    def wrote(self, nbytes: int) -> None:
        """So much was listed and waits to be durable."""
        with self._changed:
            self._waiting_bytes += nbytes
            if self._since_s is None:
                self._since_s = time.monotonic()
                self._changed.notify()
            elif self._waiting_bytes >= COMMIT_BYTES:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._since_s is not None or self._is_closing)
                if self._is_closing:
                    return
                assert self._since_s is not None
                left_s = self._since_s + COMMIT_SECONDS - time.monotonic()
                self._changed.wait_for(
                    lambda: self._waiting_bytes >= COMMIT_BYTES or self._is_closing, max(0.0, left_s)
                )
                if self._is_closing:
                    return
                self._waiting_bytes, self._since_s = 0, None
            self._commit()
