"""Sessions that nobody uses are parked by a thread of our own, of which no user ever hears."""

from __future__ import annotations

import threading
import time

import pytest

from kvtier.engine import conversations
from kvtier.engine.session import Session
from kvtier.tiers.errors import Busy

from .test_conversations import Served
from .test_families import tiny
from .test_scheduler import prompt_of

WAIT_S = 60.0


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


class SlowParking:
    """Every park stands still until it may go on."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        park = Session.park

        def slowly(session):
            self.begun.set()
            assert self.may_go_on.wait(WAIT_S)
            return park(session)

        monkeypatch.setattr(Session, "park", slowly)


@pytest.fixture
def parking(monkeypatch):
    return SlowParking(monkeypatch)


def being_parked(llama, path, parking) -> Served:
    served = Served(llama, path, idle_s=0.2)
    served.chats.create("a")
    served.say("a", prompt_of(40, 1))
    assert parking.begun.wait(WAIT_S)
    return served


def in_background(call) -> tuple[threading.Thread, list]:
    found: list = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_a_message_waits_until_its_session_is_parked(llama, tmp_path, parking):
    served = being_parked(llama, tmp_path / "s", parking)
    talking, said = in_background(lambda: served.say("a", [3]))
    time.sleep(0.1)
    assert not said and served.chats.info("a").state != "busy"
    parking.may_go_on.set()
    talking.join(WAIT_S)
    assert len(said[0]) == 5
    served.close()


def test_a_server_that_ends_meanwhile_parks_everything(llama, tmp_path, parking):
    served = being_parked(llama, tmp_path / "s", parking)
    ending, failed = in_background(served.chats.park_all)
    time.sleep(0.1)
    parking.may_go_on.set()
    ending.join(WAIT_S)
    assert failed == [0]
    served.close()


def test_a_park_that_takes_too_long_is_told(llama, tmp_path, parking, monkeypatch):
    monkeypatch.setattr(conversations, "IDLE_PARK_S", 0.05)
    served = being_parked(llama, tmp_path / "s", parking)
    with pytest.raises(Busy):
        served.chats.park("a")
    parking.may_go_on.set()
    served.close()


def test_a_session_that_was_used_or_deleted_since_is_left_alone(llama, tmp_path):
    served = Served(llama, tmp_path / "s")
    chats = served.chats
    chats.create("a")
    served.say("a", prompt_of(40, 1))
    held = chats._held["a"]
    assert not chats._claim_idle("a", held)  # used just now
    held.used_s -= 2 * conversations.IDLE_S
    assert chats._claim_idle("a", held) and not chats._claim_idle("a", held)
    chats._let_go(held)
    chats.delete("a")
    held.used_s -= 2 * conversations.IDLE_S
    assert not chats._claim_idle("a", held)
    served.close()
