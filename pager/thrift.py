"""Thrift: what became of prefetched bytes, and how sure a prediction must be so that few of them are wasted.

    useful   somebody read them from where they had been brought
    late     somebody came while they were on their way: part of the wait was saved
    wasted   they left again before anybody read them

The bound follows the share that is wasted: of what was settled lately, and of what is on its way or waits to be read, as its
chances say, by how far such chances have been right lately. Far below the aim any likely prediction is acted upon, at the
aim those alone that do not raise the share; where even these are wrong, all but a few are left out until those few come true
again. It is made anew from these shares each time, so nothing can lock it where no prediction passes and none could prove it
wrong. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

AIM = 0.15  # of prefetched bytes: what may be wasted
FIRST_CHANCE, LEAST_CHANCE, MOST_CHANCE = 0.8, 0.5, 0.97
_FADE = 0.98  # of what is remembered, per settled piece
_DOUBT_STEP = 0.1  # of the mean doubt, per prediction that was acted upon
_PROBES = 16  # of those that the bound leaves out and that call themselves sure, one in so many is acted upon


@dataclass(slots=True)
class Thrift:
    """Bytes since the start, and the bound."""

    useful_bytes: int = 0
    late_bytes: int = 0
    wasted_bytes: int = 0
    _read: float = 0.0  # bytes, fading
    _wasted: float = 0.0
    _open_bytes: int = 0  # that are neither read nor wasted yet
    _doubt: float = 1.0 - FIRST_CHANCE  # mean of what was acted upon lately
    _foretold: float = 0.0  # bytes of those settled that were doubted, fading
    _num_asked: int = 0

    @property
    def wasted_share(self) -> float:
        """Of all that was settled since the start."""
        total = self.useful_bytes + self.late_bytes + self.wasted_bytes
        return self.wasted_bytes / total if total else 0.0

    @property
    def expected_share(self) -> float:
        """What was wasted lately, and of what is open will be."""
        total = self._read + self._wasted + self._open_bytes
        doubt = min(1.0, self._doubt * self.overconfidence)
        return (self._wasted + doubt * self._open_bytes) / total if total else AIM

    @property
    def overconfidence(self) -> float:
        """How many times as much was wasted lately as chances said; never less than 1, since what is read settles first."""
        settled = self._read + self._wasted
        prior = AIM * settled / 4  # a quarter of what is remembered may be chance
        return max(1.0, (self._wasted + prior) / (self._foretold + prior)) if settled else 1.0

    @property
    def least_chance(self) -> float:
        """Straight lines: from anything that is likely to what keeps the share at the aim, to the surest at twice the aim."""
        if not self._read + self._wasted + self._open_bytes:
            return FIRST_CHANCE
        share, steady = self.expected_share / AIM, 1.0 - AIM
        if share < 1.0:
            return LEAST_CHANCE + share * (steady - LEAST_CHANCE)
        return min(MOST_CHANCE, steady + (share - 1.0) * (MOST_CHANCE - steady))

    @property
    def is_resting(self) -> bool:
        return self.expected_share > 2 * AIM

    def may_start(self, chance: float) -> bool:
        """Whether a prediction of this chance is worth acting upon now."""
        told, chance = chance, 1.0 - min(1.0, (1.0 - chance) * self.overconfidence)
        if self.is_resting or chance < self.least_chance:
            if told < 1.0 - AIM:
                return False
            self._num_asked += 1  # a few that say so themselves are tried, or nothing could ever prove them right
            if self._num_asked % _PROBES:
                return False
        self._doubt += _DOUBT_STEP * (1.0 - told - self._doubt)
        return True

    def started(self, nbytes: int) -> None:
        self._open_bytes += nbytes

    def undone(self, nbytes: int) -> None:
        """Of what was started so much was called off before it came."""
        self._open_bytes = max(0, self._open_bytes - nbytes)

    def useful(self, nbytes: int, *, is_late: bool = False) -> None:
        if is_late:
            self.late_bytes += nbytes
        else:
            self.useful_bytes += nbytes
        self._settle(nbytes, 0)

    def wasted(self, nbytes: int) -> None:
        self.wasted_bytes += nbytes
        self._settle(0, nbytes)

    def _settle(self, read: int, wasted: int) -> None:
        self._open_bytes = max(0, self._open_bytes - read - wasted)
        self._read, self._wasted = _FADE * self._read + read, _FADE * self._wasted + wasted
        self._foretold = _FADE * self._foretold + self._doubt * (read + wasted)
