"""Sessions of a server: durable after each turn, parked when idle, as they were after a turn that failed."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from kvtier import SamplingParams
from kvtier.engine.conversations import Conversations
from kvtier.engine.loop import EngineLoop
from kvtier.engine.session import Session
from kvtier.tiers.errors import Busy, ConfigError, TierFullError, UnknownSessionError
from kvtier.tiers.nvme.calls import SystemCalls

from .test_families import stock, tiny
from .test_loop import Heard, Slow
from .test_scheduler import open_engine, prompt_of

GREEDY = SamplingParams(max_tokens=5)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


class Served:
    """An engine, its loop and its conversations, over a store or none."""

    def __init__(self, model, store=None, blocks=40, idle_s=300.0) -> None:
        config = dict(nvme_path=store, nvme_bytes="64MiB") if store else {}
        self.engine = open_engine(model, blocks, **config)
        self.loop = EngineLoop(self.engine)
        self.chats = Conversations(self.loop, idle_s=idle_s)

    def say(self, session_id: str, tokens: list[int], params=GREEDY, namespace="default") -> list[int]:
        heard = Heard()
        self.chats.send(session_id, tokens, params, heard, namespace=namespace)
        heard.wait()
        assert heard.ends[0][1] is None
        return heard.tokens[0]

    def close(self, *, park: bool = True) -> None:
        if park:
            assert self.chats.park_all() == 0
        self.chats.close()
        self.loop.close()
        self.engine.pager.drain()
        self.engine.pager.check_integrity()
        self.engine.close()


def test_a_finished_turn_survives_without_any_park(llama, tmp_path):
    first, later = prompt_of(50, 1), [7, 8, 9]
    answer = stock(llama, first, 5)
    again = stock(llama, [*first, *answer, *later], 5)
    served = Served(llama, tmp_path / "s")
    served.chats.create("a")
    assert served.say("a", first) == answer
    assert served.chats.info("a").is_durable
    served.close(park=False)  # as a crash would: what was told is all that may count
    served = Served(llama, tmp_path / "s")
    assert served.chats.info("a").state == "parked"
    assert served.say("a", later) == again
    assert served.engine.pager.counters.get("computed_tokens") == 1 + 3 + 4
    served.close()


def test_a_cancelled_turn_leaves_the_session_as_it_was(llama, tmp_path):
    first = prompt_of(30, 1)
    answer = stock(llama, first, 5)
    wanted = stock(llama, [*first, *answer, 5], 5)
    served = Served(llama, tmp_path / "s")
    served.chats.create("a")
    served.say("a", first)
    heard = Slow()
    turn = served.chats.send("a", [6], SamplingParams(max_tokens=500), heard)
    with pytest.raises(Busy, match="at work"):
        served.chats.park("a")
    turn.cancel()
    heard.go.set()
    assert heard.wait().ends[0][0] == "cancelled"
    assert served.chats.info("a").tokens == 35
    assert served.say("a", [5]) == wanted
    served.close()


def test_idle_sessions_are_parked_and_come_back_by_themselves(llama, tmp_path):
    served = Served(llama, tmp_path / "s", idle_s=1.0)  # longer than a stall between the next two lines
    served.chats.create("a")
    served.say("a", prompt_of(40, 1))
    deadline_s = time.monotonic() + 60
    while served.chats.info("a").state != "parked":
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert len(served.say("a", [3])) == 5
    served.close()


def test_verbs_do_what_they_say(llama, tmp_path):
    served = Served(llama, tmp_path / "s")
    chats = served.chats
    assert chats.create().id != chats.create().id
    chats.create("a", namespace="one")
    first = served.say("a", prompt_of(40, 1), namespace="one")
    child = chats.fork("a", 2, namespace="one")[1]
    assert child.tokens == 45 and child.is_durable
    assert served.say(child.id, [4], namespace="one") == served.say("a", [4], namespace="one")
    assert chats.rollback("a", 45, namespace="one").tokens == 45
    assert chats.park("a", namespace="one").state == "parked"
    assert chats.resume("a", namespace="one").state == "active"
    assert [one.id for one in chats.list_sessions("one")] == ["a", "a/1", "a/2"]
    chats.delete("a", namespace="one")
    for verb in (chats.info, chats.park, chats.delete):
        with pytest.raises(UnknownSessionError):
            verb("a", namespace="one")
    with pytest.raises(UnknownSessionError):
        chats.info(child.id, namespace="other")
    with pytest.raises(ConfigError, match="exists already"):
        chats.create(child.id, namespace="one")
    with pytest.raises(ConfigError, match="n=0"):
        chats.fork(child.id, 0, namespace="one")
    assert len(first) == 5
    served.close()


def test_sessions_that_are_gone_leave_nothing_in_the_engine(llama, tmp_path):
    served = Served(llama, tmp_path / "s")
    for i in range(5):
        served.chats.create(f"s{i}")
        served.say(f"s{i}", prompt_of(20, i))
        if i % 2:
            served.chats.park(f"s{i}")
        for child in served.chats.fork(f"s{i}", 2):
            served.chats.delete(child.id)
        served.chats.delete(f"s{i}")
    assert not served.engine._sessions and not served.chats._held
    served.close()


def test_many_sessions_take_turns_on_few_pages_and_across_a_restart(llama, tmp_path):
    """Every session of a crowd says what it would say alone, while the device tier holds a few of them."""
    names = [f"s{i}" for i in range(12)]
    openings = {name: prompt_of(60 + i, i) for i, name in enumerate(names)}
    histories, wanted = {}, {}
    for name in names:
        history = list(openings[name])
        wanted[name] = []
        for turn in range(3):
            history += [] if turn == 0 else [turn]
            wanted[name].append(stock(llama, history, 5))
            history += wanted[name][-1]
        histories[name] = history
    served = Served(llama, tmp_path / "s", blocks=20)
    for name in names:
        served.chats.create(name)
    for turn in range(3):
        found: dict[str, list[int]] = {}

        def client(name: str, turn: int = turn, found: dict = found, served: Served = served) -> None:
            found[name] = served.say(name, openings[name] if turn == 0 else [turn])

        threads = [threading.Thread(target=client, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: wanted[name][turn] for name in names}
        served.close(park=turn == 1)
        served = Served(llama, tmp_path / "s", blocks=20)
    served.close()


def test_a_message_that_the_queue_refuses_was_never_said(llama):
    served = Served(llama)
    served.chats.create("a")
    served.say("a", prompt_of(20, 1))
    before = served.chats.info("a")
    served.loop._max_waiting = 0
    with pytest.raises(Busy, match="wait already"):
        served.chats.send("a", [7, 8, 9], GREEDY, Heard())
    assert (served.chats.info("a").tokens, served.chats.info("a").state) == (before.tokens, "active")
    served.loop._max_waiting = 100
    assert served.say("a", [7, 8, 9])
    served.close()


@pytest.mark.parametrize("refused", [dict(attention="select:8"), dict(speculation="model")])
def test_a_message_that_the_engine_refuses_was_never_said(llama, refused):
    first = prompt_of(30, 1)
    again = stock(llama, [*first, *stock(llama, first, 5), 4], 5)
    served = Served(llama)
    served.chats.create("a")
    served.say("a", first)
    for _ in range(3):
        with pytest.raises(ConfigError, match=r"selection_bytes|draft"):
            served.chats.send("a", [7] * 10, SamplingParams(max_tokens=5, **refused), Heard())
        assert (served.chats.info("a").tokens, served.chats.info("a").state) == (35, "active")
    assert served.say("a", [4]) == again
    served.close()


def test_a_message_is_encoded_where_no_step_waits_for_it(llama):
    served, encoded_by = Served(llama), []

    class Tokenizer:
        chat_template = None
        decode = staticmethod(str)

        def __call__(self, text: str, **_) -> dict[str, list[int]]:
            encoded_by.append(threading.current_thread())
            return {"input_ids": [ord(letter) for letter in text]}

    served.engine.tokenizer = Tokenizer()
    served.chats.create("a")
    served.say("a", "the fox")
    served.say("a", [{"role": "user", "content": "and then?"}])
    assert encoded_by == [threading.current_thread()] * 2
    assert served.chats.info("a").tokens == len("the fox") + len("and then?") + 2 * 5
    served.close()


def test_what_is_done_with_a_session_looks_at_no_other_one(llama, tmp_path, monkeypatch):
    served = Served(llama, tmp_path / "s")
    for name in "ab":
        served.chats.create(name)
        served.say(name, prompt_of(20, 1))
    with monkeypatch.context() as patched:
        patched.setattr(served.engine.pager, "sessions", lambda: pytest.fail("all sessions were listed"))
        patched.setattr(served.chats, "list_sessions", lambda *_: pytest.fail("all sessions were listed"))
        served.say("a", [4])
        assert served.chats.info("a").is_durable and served.chats.info("a").tokens == 31
        for verb in (served.chats.park, served.chats.resume, served.chats.fork):
            verb("a")
        assert served.chats.rollback("a", 25).tokens == 25
        with pytest.raises(UnknownSessionError):
            served.chats.info("a", namespace="other")
        with pytest.raises(UnknownSessionError):
            served.say("c", [4])
        with pytest.raises(ConfigError, match="exists already"):
            served.chats.create("b")
        served.chats.delete("a")
    assert [one.id for one in served.chats.list_sessions()] == ["a/1", "b"]
    served.close()


def test_a_listener_hears_the_end_of_a_turn_whatever_happens_to_it(llama, monkeypatch):
    served, heard = Served(llama), Heard()
    served.chats.create("a")

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.chats, "_finish_turn", broken)
    served.chats.send("a", prompt_of(20, 1), GREEDY, heard)
    assert "a bug" in str(heard.wait().ends[0][1])
    served.chats.close()
    served.loop.close()
    served.engine.close()


def test_a_disk_that_refuses_costs_safety_and_no_answer(llama, tmp_path, monkeypatch):
    first = prompt_of(30, 1)
    answer = stock(llama, first, 5)
    again = stock(llama, [*first, *answer, 4], 5)
    served = Served(llama, tmp_path / "s")
    served.chats.create("a")

    def refuse(self, fd, buffers, offset):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as full:
        full.setattr(SystemCalls, "pwritev", refuse)
        assert served.say("a", first) == answer
    assert served.say("a", [4]) == again
    served.close(park=False)


def test_a_turn_that_the_disk_refused_is_not_said_to_be_durable(llama, tmp_path, monkeypatch):
    served = Served(llama, tmp_path / "s")

    def say(tokens: list[int]) -> tuple[bool | None, bool]:
        heard = Heard()
        turn = served.chats.send("a", tokens, GREEDY, heard)
        assert heard.wait().ends[0] == ("length", None)
        return turn.first.output.is_durable, served.chats.info("a").is_durable

    def refuse(session) -> None:
        raise TierFullError("no space left")

    served.chats.create("a")
    assert not served.chats.info("a").is_durable
    assert say(prompt_of(30, 1)) == (True, True)
    with monkeypatch.context() as full:
        full.setattr(Session, "checkpoint", refuse)
        assert say([4]) == (False, False)
        with pytest.raises(TierFullError):
            served.chats.rollback("a", 29)
        assert say([5]) == (False, False)  # as long as what was stored, and something else
        assert served.chats.info("a").tokens == 35
    assert served.chats.park("a").is_durable
    assert say([4]) == (True, True)
    heard = Slow()
    turn = served.chats.send("a", [5], SamplingParams(max_tokens=500), heard)
    assert not served.chats.info("a").is_durable  # a message under way
    turn.cancel()
    heard.go.set()
    assert heard.wait().ends[0][0] == "cancelled" and turn.first.output.is_durable is None
    assert served.chats.info("a").is_durable
    served.close()


def test_a_session_that_is_deleted_while_somebody_asks_for_it_is_unknown(llama, monkeypatch):
    served = Served(llama)
    served.chats.create("a")
    served.say("a", prompt_of(20, 1))
    plain = served.chats.info

    def deleted_meanwhile(session_id: str, *, namespace: str = "default"):
        found = plain(session_id, namespace=namespace)
        monkeypatch.setattr(served.chats, "info", plain)
        served.chats.delete(session_id)
        return found

    monkeypatch.setattr(served.chats, "info", deleted_meanwhile)
    with pytest.raises(UnknownSessionError):
        served.chats.resume("a")
    assert not served.chats.list_sessions()
    served.chats.create("a")  # the id is free again

    class Held(dict):
        """There at the first look, deleted at the second."""

        def __contains__(self, name) -> bool:
            return True

    held = served.chats._held.pop("a")
    served.chats._held, kept = Held(), served.chats._held
    monkeypatch.setattr(served.chats, "info", lambda *_, **__: None)
    with pytest.raises(UnknownSessionError):
        served.chats.resume("a")
    served.chats._held = kept | {"a": held}
    monkeypatch.setattr(served.chats, "info", plain)
    served.chats.delete("a")
    served.close()
