"""Whether and when a chain will be used again, learned online from the ages at which chains were and were not.

A life table: per kind of chain and bin of age, how many were alive and how many of these were used again. From it comes
the density of a chain: the best ratio, over all horizons, of its chance to be used again to the seconds it is held until
then. Blocks of low density leave first. Kinds are turn number times risk; kinds with little evidence borrow from their
turn, turns from all. Old evidence fades, so that the table follows the traffic.

Sources: the life table is Kaplan and Meier's (1958); ranking by hits per block and second of residence is that of LHD
(Beckmann, Chen, Cidon, NSDI 2018), with the best stopping time of Gittins (1979) in place of a mean life.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import cache

import numpy as np

from .base import FloatArray, IntArray, Request

NUM_AGES = 36
_FIRST_AGE_S = 2.0  # ages below share a bin; above, three bins to a doubling, so the last begins at 1.4 hours
_PER_DOUBLING = 3
AGE_ENDS_S = _FIRST_AGE_S * 2.0 ** (np.arange(NUM_AGES) / _PER_DOUBLING)
_WIDTHS = np.diff(AGE_ENDS_S, prepend=0.0)
TURNS, RISKS = 8, 5
NUM_KINDS = TURNS * RISKS
LEFTOVER = NUM_KINDS  # what a chain's successor did not take over
_TURN_WEIGHT, _KIND_WEIGHT = 20.0, 40.0  # chains' worth of evidence that a prior counts as
_LEFTOVER_SHARE = 0.1  # of the average hazard: forks are rarer than turns, and were not worth counting
_FADE = 0.998  # of evidence, per update
NUM_FEATURES = 4


def age_bin(age_s: float) -> int:
    return 0 if age_s < _FIRST_AGE_S else min(NUM_AGES - 1, 1 + int(_PER_DOUBLING * math.log2(age_s / _FIRST_AGE_S)))


def age_bins(age_s: FloatArray) -> IntArray:
    return np.minimum(np.searchsorted(AGE_ENDS_S, age_s, side="right"), NUM_AGES - 1)


class LifeTable:
    """Chains alive and used again, by kind and age; `density` is refreshed by `update`."""

    def __init__(self, prior_uses: float = 0.5) -> None:
        """`prior_uses`: of 10 chains at every age, so many before there is any evidence."""
        self._prior_uses = prior_uses
        self._used = np.zeros((NUM_KINDS, NUM_AGES))
        self._alive = np.zeros((NUM_KINDS, NUM_AGES))
        self.cumulative, self.hazard, self.density = _without_evidence(prior_uses)

    def note_use(self, kind: int, bin: int) -> None:
        self._used[kind, bin] += 1
        self._alive[kind, bin] += 1

    def note_alive(self, kinds: IntArray, bin: int) -> None:
        """Chains of these kinds grew older than this bin unused."""
        self._alive[:, bin] += np.bincount(kinds, minlength=NUM_KINDS)

    def update(self) -> None:
        """Densities from the evidence, which then fades. Cost: some 10^5 multiplications."""
        self.cumulative, self.hazard, self.density = _rates(self._used, self._alive, self._prior_uses)
        self._used *= _FADE
        self._alive *= _FADE


def _rates(used: FloatArray, alive: FloatArray, prior_uses: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Hazard of all summed by age; hazard by kind and age: used in this bin, of those alive at its start; density likewise."""
    used, alive = (table.reshape(TURNS, RISKS, NUM_AGES) for table in (used, alive))
    of_all = (used.sum((0, 1)) + prior_uses) / (alive.sum((0, 1)) + 10)
    of_turn = _shrunk(used.sum(1), alive.sum(1), of_all, 2.0, _TURN_WEIGHT)
    of_kind = _shrunk(used, alive, of_turn[:, None, :], 5.0, _KIND_WEIGHT)
    hazard = np.vstack([of_kind.reshape(NUM_KINDS, NUM_AGES), _LEFTOVER_SHARE * of_all])
    hazard = np.minimum(hazard, 0.98)
    return np.cumsum(of_all), hazard, _densities(hazard)


@cache
def _without_evidence(prior_uses: float) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The same for every new table, and a third of the time that opening a small pager took."""
    nothing = np.zeros((NUM_KINDS, NUM_AGES))
    return _rates(nothing, nothing, prior_uses)


def _shrunk(used: FloatArray, alive: FloatArray, prior: FloatArray, ratio_weight: float, weight: float) -> FloatArray:
    """Hazards of groups: the prior's shape at the group's own height, as far as its evidence does not say otherwise."""
    ratio = (used.sum(-1) + ratio_weight) / ((alive * prior).sum(-1) + ratio_weight)
    expected = np.minimum(prior * ratio[..., None], 0.9)
    hazard: FloatArray = (used + weight * expected) / (alive + weight)
    return hazard


def _densities(hazard: FloatArray) -> FloatArray:
    """Per row and age: the most uses per second held, over the ages at which one could give up."""
    density = np.empty_like(hazard)
    for age in range(NUM_AGES):
        alive = np.cumprod(1 - hazard[:, age:], axis=1)
        before = np.hstack([np.ones((len(hazard), 1)), alive[:, :-1]])
        held_s = np.cumsum((before + alive) / 2 * _WIDTHS[age:], axis=1)
        density[:, age] = ((1 - alive) / held_s).max(axis=1)
    return density


class Risk:
    """How much likelier than average a chain of these features is used again: a product of one factor per feature.

    Each factor is uses seen over uses expected among chains of that feature, drawn to 1 where they are few. Source:
    indirect standardisation, as in mortality tables; the product form is Cox's proportional hazards (1972).
    """

    _WEIGHT = 30.0  # expected uses that a factor of 1 counts as
    _FADE = 0.9995  # of evidence, per chain of that feature
    _MOST = 8.0

    def __init__(self, num_features: int) -> None:
        self._factors: list[dict[Hashable, list[float]]] = [{} for _ in range(num_features)]  # factor, seen, expected

    def of(self, features: tuple[Hashable, ...]) -> float:
        product = 1.0
        for factors, value in zip(self._factors, features):
            entry = factors.get(value)
            if entry is not None:
                product *= entry[0]
        return min(max(product, 1 / self._MOST), self._MOST)

    def learn(self, features: tuple[Hashable, ...], is_used: bool, cumulative_hazard: float) -> None:
        """A chain was used again, or grew old without, after so much average hazard."""
        expected = min(cumulative_hazard * self.of(features), 4.0)
        for factors, value in zip(self._factors, features):
            entry = factors.get(value)
            if entry is None:
                entry = factors[value] = [1.0, 0.0, 0.0]
            entry[1] = entry[1] * self._FADE + is_used
            entry[2] = entry[2] * self._FADE + expected / entry[0]
            entry[0] = (entry[1] + self._WEIGHT) / (entry[2] + self._WEIGHT)


def half_octave(number: float) -> int:
    return int(2 * math.log2(number)) if number > 0 else -1


def kind_of(turn: int, risk: float) -> int:
    """Of a chain that has had so many turns before and is so much likelier than average to be used again."""
    bucket = turn if turn < 4 else min(TURNS - 1, 2 + half_octave(turn) // 2)
    level = round((RISKS - 1) / 2 + 2 * math.log(risk))
    return bucket * RISKS + min(RISKS - 1, max(0, level))


def features_of(turn: int, gap_s: float, request: Request) -> tuple[Hashable, ...]:
    """What a chain is judged by, besides its turn: lengths, by early turns and later ones, and think time, by powers of 2."""
    early = min(turn, 2)
    return (
        (early, half_octave(request.input_tokens) // 2),
        (early, half_octave(request.output_tokens) // 2),
        half_octave(gap_s) // 2,
        request.input_tokens >> 5 if turn == 0 and request.input_tokens < 4096 else -1,  # prompts from one template
    )
