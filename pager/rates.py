"""Token buckets: how many bytes a second somebody may use. Pure arithmetic; the clock comes in as an argument.

A bucket lends: whoever finds it above zero may take more than is in it, and the next one waits until the debt is paid.
So a block larger than a second's worth passes, and over any span of time no more than burst + rate * span + one taking
goes through.
"""

from __future__ import annotations

BURST_S = 1.0  # a bucket holds so many seconds' worth


class TokenBucket:
    """Of one namespace. `now_s` must not go backwards; where it does, time stands still."""

    def __init__(self, rate_per_s: float, now_s: float, *, burst: float | None = None) -> None:
        self.rate_per_s = rate_per_s
        self._burst = BURST_S * rate_per_s if burst is None else burst
        self._level, self._at_s = self._burst, now_s

    def level(self, now_s: float) -> float:
        """What may be taken now; negative while in debt."""
        if now_s > self._at_s:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self.rate_per_s)
            self._at_s = now_s
        return self._level

    def num_allowed(self, size: float, now_s: float) -> int:
        """How many pieces of that size may be taken now: the last one may be on credit."""
        level = self.level(now_s)
        return 0 if level <= 0 else int(-(-level // size))

    def take(self, amount: float, now_s: float) -> None:
        """Whether there is enough was the caller's question."""
        self._level = self.level(now_s) - amount

    def wait_s(self, now_s: float) -> float:
        """Until something may be taken again."""
        level = self.level(now_s)
        return 0.0 if level > 0 else (-level / self.rate_per_s) + 1e-9

    def set_rate(self, rate_per_s: float, now_s: float) -> None:
        """From now on; a debt stays."""
        level = self.level(now_s)
        self.rate_per_s, self._burst = rate_per_s, BURST_S * rate_per_s
        self._level = min(level, self._burst)
