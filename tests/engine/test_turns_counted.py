"""Turns of sessions are look-ups: counted once each, by the tier that held what they reuse, for advice and thrash too."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.pager.inspection.asking import Target

from .test_engine import open_engine
from .test_families import tiny
from .test_scheduler import open_engine as small_engine
from .test_scheduler import prompt_of

ONE = SamplingParams(max_tokens=1)
TIERS = ("device", "host", "nvme")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


class Counted:
    """What an engine's pager has counted since it was last asked."""

    def __init__(self, engine) -> None:
        self._pager, self._before = engine.pager, {}
        self.since()

    def since(self) -> dict[str, int]:
        counters = self._pager.counters
        now = {tier: int(counters.get("hit_tokens", tier=tier)) for tier in TIERS}
        now |= {name: int(counters.get(f"{name}_tokens")) for name in ("miss", "ghost")}
        found = {name: value - self._before.get(name, 0) for name, value in now.items()}
        self._before = now
        return {name: value for name, value in found.items() if value}


def test_a_turn_counts_what_it_reuses_and_what_is_new(llama):
    with open_engine(llama, 40) as engine:
        counted, session = Counted(engine), engine.session("a")
        session.send(prompt_of(50, 1), ONE)
        assert counted.since() == {"miss": 49}  # the last token of a prompt is always computed
        usage = session.send([1, 2, 3], ONE).usage
        assert counted.since() == {"device": 50, "miss": 3} and usage.device_tokens == usage.cached_tokens == 50
        session.send(prompt_of(20, 2), SamplingParams(max_tokens=3))
        assert counted.since() == {"device": 54, "miss": 20}
        session.send([7], SamplingParams(max_tokens=0))
        assert counted.since() == {"device": 77, "miss": 1}
        assert [(row.tokens, row.hit_tokens, row.is_turn) for row in engine.pager._core.observer.lookups] == [
            (49, 0, False), (53, 50, True), (74, 54, True), (78, 77, True)
        ]  # fmt: skip


def test_a_turn_that_is_undone_and_said_again_is_two_requests(llama):
    with open_engine(llama, 40) as engine:
        counted, session = Counted(engine), engine.session("a")
        session.send(prompt_of(50, 1), ONE)
        counted.since()
        engine.drop(session.turn([5, 6], ONE))
        session.undo()
        session.send([5, 6], ONE)
        assert counted.since() == {"device": 100, "miss": 4}


def test_a_resumed_turn_counts_for_the_tier_it_came_from(llama, tmp_path):
    """Its blocks are on their way up from resume on; the turn that follows counts them where they were."""
    store = dict(nvme_path=tmp_path / "s", nvme_bytes="64MiB")
    with open_engine(llama, 40, **store) as engine:
        session = engine.session("a")
        session.send(prompt_of(64, 1), ONE)
        session.park()
        counted = Counted(engine)
        session.resume()
        assert counted.since() == {}  # nobody has asked for anything yet
        engine.pager.drain()
        usage = session.send([1], ONE).usage
        found = counted.since()
        assert found == {"host": 64, "miss": 1} and usage.host_tokens == 64
        session.park()
    with open_engine(llama, 40, **store) as engine:
        counted, session = Counted(engine), engine.session("a")
        assert counted.since() == {}
        usage = session.send([1], ONE).usage
        assert counted.since() == {"nvme": 66, "miss": 1} and usage.disk_tokens == 66
        session.park()
        session.resume()
        session.rollback(32)  # what it found then is not what it reads now
        engine.pager.drain()
        session.send([1, 2], ONE)
        found = counted.since()
        assert found.pop("miss") == 1 and sum(found.values()) == 32


def test_turns_feed_advice_and_the_thrash_index(llama, tmp_path):
    with small_engine(llama, 12, host=4, status_socket=str(tmp_path / "sock")) as engine:
        target, chats = Target.find(str(tmp_path / "sock"), timeout_s=30.0), [engine.session(name) for name in "ab"]
        for n, chat in enumerate(chats):
            chat.send(prompt_of(33, n), ONE)
        uses = target.ask("advise")["uses"]
        for chat in chats:
            chat.send([1, 2], ONE)
        told = target.ask("advise")
        assert told["uses"] == uses + 2 * (35 // engine.pager.block_size) and told["ever_reused"] > 0
        text = chats[0].token_ids
        for chat in chats:
            chat.close()
        for seed in (8, 9, 10):
            engine.generate([prompt_of(150, seed)], ONE)  # pushes everything out
        before = engine.pager.status()["ghost_tokens"]
        engine.session("c").send(text, ONE)
        told, ghosts = target.ask("thrash"), engine.pager.status()["ghost_tokens"] - before
        assert ghosts == 32 == sum(row["tokens"] for row in told["by_tier"])


def test_a_recorder_sees_every_turn_as_a_request(llama, tmp_path):
    with open_engine(llama, 40, status_socket=str(tmp_path / "sock")) as engine:
        target, session = Target.find(str(tmp_path / "sock"), timeout_s=30.0), engine.session("a")
        target.ask("record")
        session.send(prompt_of(40, 1), SamplingParams(max_tokens=4))
        session.send([1, 2], SamplingParams(max_tokens=3))
        session.close()
        rows = target.ask("record", is_last=True)["rows"]
        assert [(row["input_length"], row["output_length"]) for row in rows] == [(39, 5), (46, 3)]
