"""Engines over a daemon: answers stay exact while it dies and comes back; conversations go from process to process."""

from __future__ import annotations

import pytest

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.conversations import Conversations
from kvtier.engine.loop import EngineLoop
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.tiers.errors import TierFullError

from ..engine.test_loop import Heard
from .running import Pagerd, wait_for

LENGTH = 1024
GREEDY = SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def model():
    return build_needle_model()


@pytest.fixture
def daemon(tmp_path):
    with Pagerd(tmp_path, host_bytes=8 << 20, nvme_bytes=64 << 20) as running:
        yield running


def engine(daemon: Pagerd, model, device_bytes: int) -> Engine:
    config = PagerConfig(device_bytes=device_bytes, backend="cpu")
    return Engine.from_model(model, config, block_size=32, pager=daemon.address)


def is_attached(served: Engine) -> bool:
    return served.pager.status()["tiers"]["daemon"]["is_attached"]


@pytest.mark.parametrize("device_bytes", ["4MiB", "1MiB"])  # all of the context fits, or a third of it
def test_an_engine_outlives_its_daemon_and_answers_exactly(model, daemon, device_bytes):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 8, seed=3)
    with engine(daemon, model, device_bytes) as served:

        def ask(needle) -> None:
            (out,) = served.generate([[*ids, needle.key]], GREEDY)
            assert tuple(out.token_ids) == needle.values

        ask(needles[0])
        ask(needles[1])
        daemon.kill()
        wait_for(lambda: not is_attached(served))
        for needle in needles[2:4]:
            if device_bytes == "4MiB":
                ask(needle)
            else:  # nothing lies below the device: a longer context has no place, and is told so
                with pytest.raises(TierFullError, match="tiers below have no room"):
                    ask(needle)
        daemon.start()
        wait_for(lambda: is_attached(served))
        for needle in needles[4:]:
            ask(needle)
        served.pager.check_integrity()


def test_a_session_goes_on_in_another_engine(model, daemon):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 8, seed=4)
    with engine(daemon, model, "4MiB") as first:
        session = first.session("chat")
        session.send(ids, SamplingParams(max_tokens=0))
        session.park()
        assert first.pager.sessions()["chat"]["is_durable"]
    with engine(daemon, model, "1MiB") as second:
        session = second.session("chat")
        assert session.num_computed == LENGTH
        for needle in needles[:3]:
            out = session.send([needle.key], GREEDY)
            assert tuple(out.token_ids) == needle.values
            session.rollback(LENGTH)
        assert second.pager.counters.get("computed_tokens") <= 3 * 6


def test_conversations_are_kept_by_the_daemon(model, daemon):
    """Each turn is durable when it is told; a crash of both sides loses none."""
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 8, seed=5)
    served = Served(engine(daemon, model, "4MiB"))
    served.chats.create("talk")
    assert tuple(served.say("talk", [*ids, needles[0].key])) == needles[0].values
    assert served.chats.info("talk").is_durable
    daemon.kill()
    served.close()
    daemon.start()
    served = Served(engine(daemon, model, "4MiB"))
    assert served.chats.info("talk").state == "parked"
    assert tuple(served.say("talk", [needles[1].key])) == needles[1].values
    assert served.engine.pager.counters.get("computed_tokens") <= 8
    served.chats.park_all()
    served.close()


class Served:
    """An engine, its loop and its conversations."""

    def __init__(self, over: Engine) -> None:
        self.engine = over
        self.loop = EngineLoop(over)
        self.chats = Conversations(self.loop)

    def say(self, session_id: str, tokens: list[int]) -> list[int]:
        heard = Heard()
        self.chats.send(session_id, tokens, GREEDY, heard)
        heard.wait()
        assert heard.ends[0][1] is None, heard.ends
        return heard.tokens[0]

    def close(self) -> None:
        self.chats.close()
        self.loop.close()
        self.engine.close()
