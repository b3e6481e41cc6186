"""Pressure: how many pages the next steps will take, from what the last ones took and from what waits in the queue.

Mean and mean deviation of pages per step, both fading; what is foreseen is the mean, twice, and four deviations: a step that
runs, while copies for the one behind it are under way. Prompts that wait come in chunks, as those before them did, so the
queue only bounds it from below by what is left of its first. Guards nothing: a wrong forecast costs a copy that was made early.
Source: the estimator of Jacobson, "Congestion avoidance and control" (SIGCOMM 1988).
"""

from __future__ import annotations

_MEAN_GAIN, _DEVIATION_GAIN = 1 / 8, 1 / 4
_STEPS_AHEAD, _DEVIATIONS = 2, 4
# of a pool: what is clean leaves first, so the more of it, the earlier it is decided who leaves; a request that waits is sure
_MOST_SHARE, _MOST_QUEUED_SHARE = 0.25, 0.5


class Pressure:
    """Of one layer group. Bookkeeping in pages; no clock."""

    def __init__(self, num_pages: int) -> None:
        self._most, self._most_queued = int(num_pages * _MOST_SHARE), int(num_pages * _MOST_QUEUED_SHARE)
        self._mean = self._deviation = 0.0
        self._taken = 0
        self.queued = 0  # pages that the first request in the queue has yet to fill

    def took(self, pages: int) -> None:
        """For new tokens or copies on write, of the step that is being leased."""
        self._taken += pages

    def step(self) -> None:
        """A lease is full."""
        error = self._taken - self._mean
        self._mean += _MEAN_GAIN * error
        self._deviation += _DEVIATION_GAIN * (abs(error) - self._deviation)
        self.queued = max(0, self.queued - self._taken)
        self._taken = 0

    def foreseen(self) -> int:
        """Pages that should be free or clean now."""
        steps = _STEPS_AHEAD * self._mean + _DEVIATIONS * self._deviation
        return max(min(self._most, int(steps)), min(self._most_queued, self.queued))
