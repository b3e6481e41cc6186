"""Threads of a disk and threads that compute for them: who waits for whom, and how much is begun at once."""

from __future__ import annotations

import threading
import time

import pytest

from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.staged import AHEAD, StagedWorkers

HANGS_S = 60.0  # a bound on hanging, not a measure


class Work:
    """One work, each of whose steps says that it was begun and waits until it may end."""

    def __init__(self) -> None:
        self.begun = [threading.Event() for _ in range(3)]
        self.may_end = [threading.Event() for _ in range(3)]
        self.threads = [""] * 3

    @property
    def steps(self):
        return tuple(lambda i=i: self._step(i) for i in range(3))

    def let(self, *steps: int) -> Work:
        for step in steps:
            self.may_end[step].set()
        return self

    def _step(self, i: int) -> None:
        self.threads[i] = threading.current_thread().name
        self.begun[i].set()
        assert self.may_end[i].wait(HANGS_S)


def test_calls_are_made_ready_while_the_disk_works_and_follow_each_other_at_once():
    disk = StagedWorkers("disk", 1, lambda: None)
    first, second, third = Work().let(0), Work().let(0, 1), Work().let(0, 1)
    events = [disk.submit_steps(first.steps), disk.submit_steps(second.steps)]
    assert first.begun[1].wait(HANGS_S) and second.begun[0].wait(HANGS_S)  # while the only thread of the disk waits
    assert not second.begun[1].is_set() and disk.has_backlog()
    first.let(1, 2)
    assert events[0].wait(HANGS_S)
    events.append(disk.submit_steps(third.steps))
    assert second.begun[2].wait(HANGS_S) and third.begun[2].wait(HANGS_S)  # its call did not wait for that computing
    second.let(2), third.let(2)
    assert all(event.wait(HANGS_S) and event.error is None for event in events)
    assert len(set(first.threads)) == 1, "handed over though a thread was idle"
    assert second.threads[1] == first.threads[1] != second.threads[2]
    disk.close(HANGS_S)


def test_no_more_is_begun_than_calls_and_as_many_made_ready():
    disk, count = StagedWorkers("disk", 3, lambda: None), 30
    works = [Work().let(0) for _ in range(count)]
    events = [disk.submit_steps(work.steps) for work in works]
    for work in works[: AHEAD * 3]:
        assert work.begun[0].wait(HANGS_S)
    for work in works[:3]:
        assert work.begun[1].wait(HANGS_S)
    assert sum(work.begun[0].is_set() for work in works) == AHEAD * 3
    assert sum(work.begun[1].is_set() for work in works) == 3
    for work in works:
        work.let(1, 2)
    assert all(event.wait(HANGS_S) for event in events)
    assert all(step.is_set() for work in works for step in work.begun)
    disk.close(HANGS_S)


def test_closing_lets_all_that_was_taken_run():
    disk, ended = StagedWorkers("disk", 1, lambda: None), []
    first = Work().let(0, 2)
    disk.submit_steps(first.steps)
    for i in range(50):
        disk.submit_steps((lambda: None, lambda: None, lambda i=i: ended.append(i)))
    closing = threading.Thread(target=disk.close, args=(HANGS_S,))
    closing.start()
    first.let(1)
    closing.join(HANGS_S)
    assert sorted(ended) == list(range(50))
    with pytest.raises(TierUnavailableError):
        disk.submit_steps(first.steps)


def test_who_waits_for_what_closing_left_behind_hears_of_it():
    disk, heard = StagedWorkers("disk", 1, lambda: heard.append(1)), []
    stuck = Work().let(0, 2)
    events = [disk.submit_steps(stuck.steps)]
    events += [disk.submit_steps((lambda: None, lambda: None, lambda: None)) for _ in range(20)]
    assert stuck.begun[1].wait(HANGS_S)
    disk.close(0.01)
    stuck.let(1)
    assert all(event.wait(HANGS_S) for event in events)
    assert any(isinstance(event.error, TierUnavailableError) for event in events)
    deadline_s = time.monotonic() + HANGS_S
    while len(heard) < len(events):  # an event is over before it is told that it is
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
