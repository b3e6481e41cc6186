"""Recorder: requests as a replay trace, while somebody reads along.

A row is {timestamp, input_length, output_length, hash_ids}, the Mooncake format: milliseconds since recording began,
tokens, and one small number per whole block of the prompt, the same number for the same content. Numbers are given in
order of first sight, so a trace says what repeats and nothing of what it was. Idle recorders cost nothing and forget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

LEASE_S = 30.0  # recording ends when nobody has asked for rows so long
MAX_ROWS, MAX_NUMBERS = 8192, 1 << 21


class Recorder:
    """Rows wait here until they are read; a reader that is too slow is told how many it lost."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s = float("-inf")
        self._started_s = 0.0
        self._numbers: dict[bytes, int] = {}
        self._open: dict[int, dict[str, Any]] = {}  # by sequence, until it ends
        self._rows: deque[dict[str, Any]] = deque()
        self.num_lost = 0

    @property
    def is_on(self) -> bool:
        return self._clock() < self._until_s

    def asked(self, seq: int, num_tokens: int, keys: list[bytes]) -> None:
        if not self.is_on:
            return
        if len(self._numbers) > MAX_NUMBERS or len(self._open) > MAX_ROWS:
            self.num_lost += 1
            return
        numbers = self._numbers
        self._open[seq] = {
            "timestamp": round((self._clock() - self._started_s) * 1e3),
            "input_length": num_tokens,
            "output_length": 0,
            "hash_ids": [numbers.setdefault(key, len(numbers)) for key in keys],
        }

    def ended(self, seq: int, num_tokens: int) -> None:
        row = self._open.pop(seq, None)
        if row is None:
            return
        row["output_length"] = max(0, num_tokens - row["input_length"])
        if len(self._rows) >= MAX_ROWS:
            self._rows.popleft()
            self.num_lost += 1
        self._rows.append(row)

    def take(self, limit: int, *, is_last: bool = False) -> list[dict[str, Any]]:
        """Finished rows, oldest first; starts recording, or keeps it going. `is_last`: unfinished ones too, and stop."""
        if not self.is_on:
            self._forget()
            self._started_s = self._clock()
        self._until_s = self._clock() + LEASE_S
        if is_last:
            for seq in list(self._open):
                self.ended(seq, 0)
        rows = [self._rows.popleft() for _ in range(min(limit, len(self._rows)))]
        if is_last and not self._rows:
            self._until_s = float("-inf")
            self._forget()
        return sorted(rows, key=lambda row: row["timestamp"])

    def _forget(self) -> None:
        self._numbers.clear()
        self._open.clear()
        self._rows.clear()
        self.num_lost = 0
