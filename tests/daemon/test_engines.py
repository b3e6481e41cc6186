"""Engines over a daemon: answers stay exact while it dies and comes back; conversations go from process to process."""

from __future__ import annotations

import pytest

from kvtier import Engine, PagerConfig, PrefixCache, SamplingParams
from kvtier.engine.conversations import Conversations
from kvtier.engine.loop import EngineLoop
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache, stock_cache
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


def engine(daemon: Pagerd, model, device_bytes: int, **settings) -> Engine:
    config = PagerConfig(device_bytes=device_bytes, backend="cpu", **settings)
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


def test_what_saw_a_part_goes_on_in_another_engine_and_is_found_by_nobody_else(model, daemon):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 8, seed=5)
    some = SamplingParams(max_tokens=40, attention="select:6")
    with engine(daemon, model, "3MiB", selection_bytes="1MiB") as first:
        session = first.session("part")
        session.send(ids, SamplingParams(max_tokens=0))
        said = session.send([needles[0].key], some)
        assert tuple(said.token_ids[:4]) == needles[0].values and said.selection.steps > 30
        known = session.token_ids
        session.park()
    with engine(daemon, model, "3MiB", selection_bytes="1MiB") as second:
        session = second.session("part")
        assert session.num_computed == len(known) - 1 and second.pager.is_branched(session.seq)
        assert second.pager.match(known).tokens == LENGTH
        session.rollback(LENGTH)
        out = session.send([needles[1].key], SamplingParams(max_tokens=4, attention="select:6"))
        assert tuple(out.token_ids) == needles[1].values and out.selection.bytes_fetched > 0
        second.pager.check_integrity()


@pytest.mark.parametrize("device", ["int8", pytest.param("int8; layers 0 heads 1: full", marks=pytest.mark.soak)])
def test_packed_pages_go_through_a_daemon_as_they_are(model, daemon, device):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 2, seed=4)
    with engine(daemon, model, "4MiB", device=device) as served:
        session = served.session("a")
        session.send(ids, SamplingParams(max_tokens=0))
        session.park()
    with engine(daemon, model, "4MiB", device=device) as served:
        session = served.session("a")
        assert session.num_computed == LENGTH
        for needle in needles:
            assert tuple(session.send([needle.key], GREEDY).token_ids) == needle.values
            session.rollback(LENGTH)
        session.park()
        served.pager.check_integrity()


def test_a_prefix_cache_over_a_daemon_packs_what_it_stores(model, daemon):
    ids, _ = needle_prompt(NeedleSpec(), 200, 2, seed=4)
    cache = build_needle_cache(model, ids)
    settings = dict(pager=daemon.address, block_size=32, device_bytes="4MiB", device="int8; layers 0: full")
    with PrefixCache.open(model=model, **settings) as first:
        assert first.store(ids, stock_cache(cache), durable=True) == len(ids)
    with PrefixCache.open(model=model, **settings) as second:
        n, loaded = second.load([*ids, 5])
        assert n == len(ids)
        for layer, (k, v), most in zip(loaded.layers, cache, (0.0, 1 / 200), strict=True):
            for found, exact in ((layer.keys[0], k), (layer.values[0], v)):
                error = (found - exact).abs().max()
                assert error <= most * exact.abs().max() and (error > 0) == (most > 0)
