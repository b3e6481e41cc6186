"""A request's ledger: where its time to first token went, line by line, and the lines sum to it.

Phases are exclusive in time: entering one pauses the one around it. What no phase claims is the line `unexplained`;
if it grows, a phase is missing in the engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RequestLedger:
    """Seconds per phase from start to first token. The clock comes in as an argument."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start_s = clock()
        self._first_token_s: float | None = None
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since_s = self._start_s

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time inside the block to `name`; a nested phase takes its own time out of it."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def first_token(self) -> None:
        """The first token is out; later phases no longer count towards TTFT."""
        if self._first_token_s is None:
            self._settle()
            self._first_token_s = self._clock()

    @property
    def ttft_s(self) -> float | None:
        return None if self._first_token_s is None else self._first_token_s - self._start_s

    @property
    def age_s(self) -> float:
        """Since the request came."""
        return self._clock() - self._start_s

    def to_dict(self) -> dict[str, float]:
        """Lines in seconds; `ttft_s` (or time so far) equals the sum of all other lines, `unexplained` included."""
        self._settle()
        end_s = self._first_token_s if self._first_token_s is not None else self._clock()
        lines = dict(self._spent_s)
        total = end_s - self._start_s
        lines["unexplained"] = total - sum(lines.values())
        lines["ttft_s"] = total
        return lines

    def _settle(self) -> None:
        now_s = self._clock()
        if self._open and self._first_token_s is None:
            self._spent_s[self._open[-1]] += now_s - self._since_s
        self._since_s = now_s
