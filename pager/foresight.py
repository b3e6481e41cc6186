"""Foresight: which idle sessions will go on, and how soon; learned online from the think times of those that did.

A life table over kinds of sessions (turns so far, lengths, template, last think time) says how many of those still idle go
on at each age. Each session has a pace of its own: its think times against the usual one, drawn towards the usual one as
far as think times of one session have turned out to differ from each other. Ages are counted at that pace. Nothing here
is fitted to a trace; old evidence fades. No I/O, no blocks and no clock: who asks brings the time.

Cost: a heap entry per session and bin of age (three to a doubling), so it does not grow with the sessions that idle.
Sources: the life table is that of policies/reuse.py; the pace is the best linear predictor under equal correlation
(Henderson, Biometrics 1975), its median the sign step of Robbins and Monro (1951).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from .policies.base import UNKNOWN, Request
from .policies.reuse import AGE_ENDS_S, NUM_AGES, NUM_FEATURES, LifeTable, Risk, age_bin, features_of, kind_of

MAX_IDLE = 1 << 18  # sessions waited for; who has been idle longest is given up first
_UPDATE_EVERY = 256  # ends and beginnings of turns
_SPARE_ENTRIES = 64  # of the heap, that may be over
_ENDS_S: list[float] = AGE_ENDS_S.tolist()
_STARTS_S = [0.0, *_ENDS_S[:-1]]
_MEDIAN_STEP = 0.03  # of the logarithm of the usual think time, per think time
_PACE_FADE = 0.99
_MOST_RESIDUAL = 2.0  # a think time counts as at most e^2 times the usual one
_HOPELESS = 8.0  # times the usual think time (at its own pace): then it counts as not gone on


@dataclass(slots=True)
class Session:
    """What is remembered of one session between its turns; whoever runs the turn carries it along."""

    turns: int = 0
    gap_s: float = -1.0  # its last think time
    num_gaps: int = 0
    residuals: float = 0.0  # sum of log(think time / usual)
    last_residual: float | None = None


@dataclass(slots=True)
class _Idle:
    who: Hashable
    start_s: float
    pace: float
    kind: int
    features: tuple[Hashable, ...]
    session: Session
    age: int = 0  # bins that it has outlived
    is_judged: bool = False


@dataclass(slots=True)
class _Paces:
    """How think times are spread: the usual one, and how alike those of one session are."""

    log_usual: float = math.log(60.0)  # until there are any
    variance: float = 1.0
    covariance: float = 0.2  # of one think time of a session and its next

    def learn(self, session: Session, gap_s: float) -> None:
        log_gap = math.log(max(gap_s, 0.1))
        residual = min(max(log_gap - self.log_usual, -_MOST_RESIDUAL), _MOST_RESIDUAL)
        self.log_usual += math.copysign(_MEDIAN_STEP, log_gap - self.log_usual)
        self.variance = _PACE_FADE * self.variance + (1 - _PACE_FADE) * residual**2
        if session.last_residual is not None:
            self.covariance = _PACE_FADE * self.covariance + (1 - _PACE_FADE) * residual * session.last_residual
        session.residuals, session.num_gaps = session.residuals + residual, session.num_gaps + 1
        session.last_residual, session.gap_s = residual, gap_s

    def of(self, session: Session) -> float:
        if not session.num_gaps:
            return 1.0
        alike = min(max(self.covariance / max(self.variance, 1e-6), 0.0), 0.9)
        weight = alike / (1 + (session.num_gaps - 1) * alike)  # of each of its think times
        return math.exp(weight * session.residuals)


@dataclass(slots=True)
class Foresight:
    """`ended` and `began` tell of turns; `due` says who is likely to go on soon."""

    max_idle: int = MAX_IDLE
    _idle: dict[Hashable, _Idle] = field(default_factory=dict)  # in order of their ends
    _heap: list[tuple[float, int, _Idle]] = field(default_factory=list)
    _paces: _Paces = field(default_factory=_Paces)
    _table: LifeTable = field(default_factory=lambda: LifeTable(prior_uses=0.0))  # what was not seen is not expected
    _risk: Risk = field(default_factory=lambda: Risk(NUM_FEATURES))
    _hazards: list[list[float]] = field(default_factory=list)  # summed up to the start of each bin, by kind
    _serial: count[int] = field(default_factory=count)
    _turns: int = 0
    _refresh_at: int = 16

    def __post_init__(self) -> None:
        self._sum_up()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def knows(self, who: Hashable) -> bool:
        return who in self._idle

    # ------------------------------------------------------------------ what happened
    def ended(self, who: Hashable, now_s: float, session: Session | None = None, request: Request = UNKNOWN) -> None:
        """A turn is over. `who` is how its next one will be known, `session` what `began` gave for this one."""
        self.forget(who)
        session = session or Session()
        features = features_of(session.turns, session.gap_s, request)
        kind = kind_of(session.turns, self._risk.of(features))
        idle = self._idle[who] = _Idle(who, now_s, self._paces.of(session), kind, features, session)
        self._wait(idle)
        self._learned()
        if len(self._idle) > self.max_idle:
            self.forget(next(iter(self._idle)))

    def began(self, who: Hashable, now_s: float) -> Session | None:
        """Its next turn begins. None for who is not known."""
        idle = self._idle.pop(who, None)
        if idle is None:
            return None
        age_s = max(0.0, now_s - idle.start_s)
        bin = max(idle.age, age_bin(age_s / idle.pace))
        self._table.note_use(idle.kind, bin)
        if not idle.is_judged:
            self._risk.learn(idle.features, True, float(self._table.cumulative[bin]))
        self._paces.learn(idle.session, age_s)
        idle.session.turns += 1
        self._learned()
        return idle.session

    def forget(self, who: Hashable) -> None:
        """Nobody waits for this one any more: it is over, and teaches nothing."""
        self._idle.pop(who, None)

    # ------------------------------------------------------------------ what will
    def chance(self, who: Hashable, now_s: float, within_s: float) -> float:
        """That this idle session goes on within so many seconds from now."""
        idle = self._idle.get(who)
        return 0.0 if idle is None else self._chance(idle, now_s, within_s)

    def due(self, now_s: float, within_s: float, least: float) -> list[tuple[Hashable, float]]:
        """Idle sessions that have reached another age and go on within that time with at least this chance.

        Each is named again at every age, so whoever could not be served, or lost its blocks since, has another turn.
        """
        found, outlived = [], []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, idle = heapq.heappop(self._heap)
            if self._idle.get(idle.who) is not idle:
                continue
            outlived.append((idle.kind, idle.age))
            idle.age += 1
            self._judge(idle, now_s)
            if idle.age < NUM_AGES:
                self._wait(idle)
            chance = self._chance(idle, now_s, within_s)
            if chance >= least:
                found.append((idle.who, chance))
        for age in {age for _, age in outlived}:
            self._table.note_alive(np.array([kind for kind, at in outlived if at == age]), age)
        return found

    def next_s(self) -> float:
        """When `due` may have something new."""
        return self._heap[0][0] if self._heap else math.inf

    # ------------------------------------------------------------------ inside
    def _learned(self) -> None:
        """One more end or beginning of a turn; often refreshed while there is little evidence."""
        self._turns += 1
        if self._turns >= self._refresh_at:
            self._refresh_at += min(self._turns, _UPDATE_EVERY)
            self._refresh()

    def _wait(self, idle: _Idle) -> None:
        if len(self._heap) > 2 * len(self._idle) + _SPARE_ENTRIES:  # most went on, and nobody asks who is due
            self._heap = [entry for entry in self._heap if self._idle.get(entry[2].who) is entry[2]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (idle.start_s + idle.pace * _ENDS_S[idle.age], next(self._serial), idle))

    def _judge(self, idle: _Idle, now_s: float) -> None:
        """Past hope, it counts as one that did not go on; it is still waited for while its age is known."""
        if not idle.is_judged and now_s - idle.start_s > _HOPELESS * idle.pace * math.exp(self._paces.log_usual):
            idle.is_judged = True
            self._risk.learn(idle.features, False, float(self._table.cumulative[min(idle.age, NUM_AGES - 1)]))
        if idle.age >= NUM_AGES:
            self._idle.pop(idle.who, None)

    def _chance(self, idle: _Idle, now_s: float, within_s: float) -> float:
        age_s = max(0.0, now_s - idle.start_s) / idle.pace
        hazards = self._hazards[idle.kind]
        return 1.0 - math.exp(_up_to(hazards, age_s) - _up_to(hazards, age_s + within_s / idle.pace))

    def _refresh(self) -> None:
        self._table.update()
        self._sum_up()

    def _sum_up(self) -> None:
        summed = np.cumsum(-np.log1p(-self._table.hazard), axis=1)
        self._hazards = np.hstack([np.zeros((len(summed), 1)), summed]).tolist()


def _up_to(hazards: list[float], age_s: float) -> float:
    """Cumulative hazard at an age: even within a bin."""
    bin = bisect_right(_ENDS_S, age_s)
    if bin >= NUM_AGES:
        return hazards[NUM_AGES]
    share = (age_s - _STARTS_S[bin]) / (_ENDS_S[bin] - _STARTS_S[bin])
    return hazards[bin] + share * (hazards[bin + 1] - hazards[bin])
