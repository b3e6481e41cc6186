"""What a prefix cache counts. Counters only; whoever reads them divides."""

from __future__ import annotations

import threading
from typing import Any


class PrefixCounters:
    """Of one cache; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys(
            (
                "loads",
                "asked_tokens",
                "loaded_tokens",
                "loaded_bytes",
                "load_seconds",
                "stores",
                "named_tokens",
                "stored_tokens",
                "warmed_tokens",
            ),
            0,
        )

    def loaded(self, asked_tokens: int, loaded_tokens: int, nbytes: int, seconds: float) -> None:
        """One load: tokens of the prompt, tokens and bytes that came back."""
        self._add(
            loads=1, asked_tokens=asked_tokens, loaded_tokens=loaded_tokens, loaded_bytes=nbytes, load_seconds=seconds
        )

    def stored(self, named_tokens: int, stored_tokens: int) -> None:
        """One store: tokens of the prompt, and those that were not there yet."""
        self._add(stores=1, named_tokens=named_tokens, stored_tokens=stored_tokens)

    def warmed(self, computed_tokens: int) -> None:
        self._add(warmed_tokens=computed_tokens)

    def to_dict(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._counts)

    def _add(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count
