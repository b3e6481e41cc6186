"""Foresight and thrift: what they learn is true of the sessions they learned it from, and wrong predictions stop."""

from __future__ import annotations

import math
import random

import pytest

from kvtier.pager import thrift
from kvtier.pager.foresight import Foresight
from kvtier.pager.thrift import Thrift


def lived(foresight: Foresight, sessions: int, *, goes_on: float, gap, seed: int = 0) -> list[tuple[float, bool]]:
    """Run sessions of up to 20 turns; returns chances given a second after each turn's end, and what came true."""
    pick, events, told = random.Random(seed), [], []
    for number in range(sessions):
        at_s = pick.uniform(0, 20_000)
        pace = gap(pick)
        for turn in range(20):
            ends = turn == 19 or pick.random() > goes_on
            think_s = pace * math.exp(pick.gauss(0, 0.2))
            events += [(at_s, 0, number, turn), (at_s + 1.5, 1, number, not ends and think_s < 301.5)]
            at_s += think_s
            if ends:
                break
    memory: dict[int, object] = {}
    for at_s, kind, number, value in sorted(events):
        foresight.due(at_s, 300.0, 1.0)
        if kind == 1:
            told.append((foresight.chance(number, at_s, 300.0), bool(value)))
        else:
            session = foresight.began(number, at_s) if value else None
            memory[number] = session
            foresight.ended(number, at_s, session)
    return told[len(told) // 2 :]


@pytest.mark.parametrize("goes_on", [0.2, 0.6, 0.95])
def test_chances_come_true_as_often_as_they_say(goes_on):
    told = lived(Foresight(), 500 if goes_on < 0.9 else 150, goes_on=goes_on, gap=lambda pick: pick.uniform(20, 200))
    said = sum(chance for chance, _ in told) / len(told)
    was = sum(came for _, came in told) / len(told)
    assert said == pytest.approx(was, abs=0.1)


def test_a_session_is_expected_at_its_own_pace():
    """Half of the sessions think for 10 s, half for 200 s; after some turns each is known."""
    foresight = Foresight()
    lived(foresight, 150, goes_on=0.9, gap=lambda pick: pick.choice([10.0, 200.0]))
    at_s, sessions = 50_000.0, {}
    for name, gap_s in (("quick", 10.0), ("slow", 200.0)):
        now_s, session = at_s, None
        for _ in range(8):
            foresight.ended(name, now_s, session)
            now_s += gap_s
            session = foresight.began(name, now_s)
        foresight.ended(name, at_s + 10_000.0, session)
        sessions[name] = session
    soon = {name: foresight.chance(name, at_s + 10_000.0, 40.0) for name in sessions}
    assert soon["quick"] > soon["slow"] + 0.3


def test_who_is_due_is_named_at_every_age_until_it_goes_on_or_is_forgotten():
    foresight = Foresight()
    lived(foresight, 100, goes_on=0.95, gap=lambda pick: 60.0)
    foresight.ended("a", 100_000.0)
    foresight.ended("b", 100_000.0)
    named = [who for at in range(100_003, 100_040) for who, _ in foresight.due(float(at), 300.0, 0.5)]
    assert named.count("a") >= 3
    foresight.forget("a")
    assert foresight.began("b", 100_041.0) is not None
    assert not foresight.due(101_000.0, 300.0, 0.0) or foresight.num_idle == 0
    assert foresight.chance("a", 100_050.0, 300.0) == 0.0 and foresight.began("a", 100_050.0) is None


def test_nothing_is_expected_before_there_is_evidence():
    foresight = Foresight()
    foresight.ended("a", 0.0)
    assert foresight.chance("a", 1.0, 1e9) < 0.05


def test_only_so_many_are_waited_for():
    foresight = Foresight(max_idle=10)
    for number in range(100):
        foresight.ended(number, float(number))
    assert foresight.num_idle == 10 and foresight.chance(0, 100.0, 10.0) == 0.0
    assert len(foresight._heap) <= 100


def test_memory_stays_where_nobody_asks_who_is_due():
    foresight = Foresight()
    for number in range(5000):
        foresight.ended(number % 10, float(number))
    assert foresight.num_idle == 10 and len(foresight._heap) <= 100
    assert {entry[2].who for entry in foresight._heap} == set(range(10))  # each of them is still waited for


def test_waste_makes_it_ask_for_more_and_use_for_less():
    one = Thrift()
    for _ in range(200):
        one.useful(1)
    assert one.least_chance == thrift.LEAST_CHANCE and one.wasted_share == 0
    for _ in range(200):
        one.wasted(1)
    assert one.least_chance == thrift.MOST_CHANCE and one.is_resting
    started = sum(one.may_start(0.99) for _ in range(160))
    assert started == 10 and not one.may_start(0.9)
    for _ in range(100):
        one.useful(1)
    assert not one.is_resting and one.may_start(0.99)


def test_with_a_calibrated_predictor_the_share_wasted_keeps_to_the_aim():
    pick, one = random.Random(0), Thrift()
    for _ in range(20_000):
        chance = pick.random()
        if one.may_start(chance):
            (one.useful if pick.random() < chance else one.wasted)(1)
    assert one.wasted_share == pytest.approx(thrift.AIM, abs=0.05)


def test_a_bound_at_its_top_comes_down_again_by_predictions_that_would_not_pass_it():
    """None is as sure as the highest bound, so nothing but probes could ever show that they come true again."""
    one = Thrift()
    for _ in range(200):
        one.wasted(1)
    assert one.least_chance == thrift.MOST_CHANCE > 0.9
    started = 0
    for _ in range(4000):
        if one.may_start(0.9):
            one.started(1)
            one.useful(1)
            started += 1
    assert not one.is_resting and started > 2000


def test_what_is_not_settled_yet_counts_by_its_chances():
    """A room that fills with doubtful pieces, none of which has left yet, must not look like success."""
    one, chance = Thrift(), 0.7
    started = 0
    for number in range(1000):
        if one.may_start(chance if number % 2 else 0.99):
            one.started(1)
            started += 1
    assert one.expected_share < 1.1 * thrift.AIM and 0 < started < 900


def test_chances_that_turn_out_too_high_are_believed_less():
    pick, one = random.Random(0), Thrift()
    for _ in range(20_000):
        chance = pick.random()
        if one.may_start(chance):
            one.started(1)
            (one.useful if pick.random() < chance**2 else one.wasted)(1)  # says 0.9, means 0.81
    assert one.overconfidence > 1.2 and one.wasted_share < 0.2
