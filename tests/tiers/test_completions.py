"""Events that must be asked, and the thread that asks: over an event of the host, which has the same two verbs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvtier.tiers.completions import Completions, Pending, PolledEvent
from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.streams import Progress


class HostNative:
    """Ends when told to; may fail instead."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failure: RuntimeError | None = None
        self.num_looks = 0

    def query(self) -> bool:
        self.num_looks += 1
        if self.failure is not None:
            raise self.failure
        return self.ended.is_set()

    def synchronize(self) -> None:
        self.ended.wait(60)
        self.query()


def test_an_event_keeps_its_memory_until_it_is_seen_done():
    native, rows = HostNative(), object()
    event = PolledEvent(native, keeps=(rows,))
    assert not event.is_done() and event.keeps == (rows,)
    assert not event.wait(0.01)
    native.ended.set()
    assert event.wait(0.0) and event.wait() and event.is_done() and event.error is None
    assert event.keeps is None


def test_waiting_without_a_limit_returns_when_it_ends():
    native = HostNative()
    event = PolledEvent(native)
    threading.Timer(0.05, native.ended.set).start()
    assert event.wait() and event.error is None


def test_a_failing_device_ends_the_event_with_an_error():
    for wait in (PolledEvent.is_done, PolledEvent.wait, lambda event: event.wait(1.0)):
        native = HostNative()
        native.failure = RuntimeError("an illegal memory access")
        native.ended.set()
        event = PolledEvent(native)
        assert wait(event)
        assert isinstance(event.error, TierUnavailableError) and event.error.__cause__ is native.failure


def test_an_error_of_the_copy_is_the_error_of_the_event_but_it_ends_like_any_other():
    native, error = HostNative(), OSError("refused")
    event = PolledEvent(native, error)
    assert event.error is error and not event.is_done()
    native.ended.set()
    assert event.is_done() and event.error is error


def test_a_verdict_is_asked_once_the_work_is_done_and_never_of_a_broken_device():
    native, asked, refusal = HostNative(), [], OSError("not these values")

    def verdict():
        asked.append(native.ended.is_set())
        return refusal

    event = PolledEvent(native, verdicts=(lambda: None, verdict))
    assert not event.is_done() and not asked
    native.ended.set()
    assert event.is_done() and event.wait() and event.error is refusal and asked == [True]
    broken = HostNative()
    broken.failure = RuntimeError("an illegal memory access")
    event = PolledEvent(broken, verdicts=(verdict,))
    assert event.is_done() and isinstance(event.error, TierUnavailableError) and asked == [True]


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_every_ended_event_is_noticed_and_an_idle_thread_parks():
    progress, seen = Progress(), []
    progress.callback = lambda: seen.append(time.monotonic())
    completions = Completions(progress.notify)
    for name in ("promote", "demote"):
        completions.add_stream(name)
    natives = [HostNative() for _ in range(40)]
    for i, native in enumerate(natives):
        event = PolledEvent(native)
        completions.watch(("promote", "demote")[i % 2], event)
        if i % 3:
            native.ended.set()
    for native in natives:
        native.ended.set()
    native = HostNative()
    last = PolledEvent(native)
    completions.watch("promote", last)
    until(lambda: len(completions._watched["promote"]) == 1 and not completions._watched["demote"])
    looked = native.num_looks
    until(lambda: native.num_looks >= looked + 2)  # it has told what it had found before it looks again
    count = len(seen)
    assert count >= 1 and not last.is_done()
    native.ended.set()
    for _ in range(200):
        if last.is_done():
            break
        progress.wait_any(0.05)
    until(lambda: len(seen) > count)
    assert last.is_done() and len(seen) == count + 1
    time.sleep(0.1)
    assert len(seen) == count + 1
    completions.close(60)
    assert not completions._thread.is_alive()


def test_closing_waits_for_what_is_under_way_but_not_for_ever():
    completions = Completions(lambda: None)
    completions.add_stream("promote")
    native = HostNative()
    completions.watch("promote", PolledEvent(native))
    completions.close(0.05)
    assert completions._thread.is_alive()
    native.ended.set()
    completions._thread.join(60)
    assert not completions._thread.is_alive()


def test_what_one_thread_queued_is_not_what_another_did():
    pending = Pending()
    pending.error, pending.keeps = OSError("mine"), (1,)
    found = []
    thread = threading.Thread(target=lambda: found.append((pending.error, pending.keeps)))
    thread.start()
    thread.join(60)
    assert found == [(None, ())]
