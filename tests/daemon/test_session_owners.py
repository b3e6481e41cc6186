"""What a daemon acknowledged of a session is not replaced by who has not seen it: sockets that broke, daemons that were
killed, answers that were lost, puts that were still under way. And what a FLUSH of version 1 covers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import Busy, ConfigError, TierUnavailableError, UnknownSessionError

from ..pager.harness import Rig
from .gated import break_sockets
from .inside import InsideDaemon
from .raw import SIZE, WAIT_S, attach, put
from .running import Pagerd, wait_for
from .test_flushes import begin_flush

TOKENS = list(range(100, 140))
EXTRA = {"n": 1, "of": {"a": [0.1, None, "\u00e9"], "b": b"1"}, "pair": (1, 2)}


@pytest.fixture(params=[2, 1])
def daemon(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[InsideDaemon]:
    """Speaking each version."""
    nvme = {"nvme_path": tmp_path / "nvme", "nvme_bytes": 4 << 20}
    with InsideDaemon(tmp_path, host_bytes=256 * SIZE, version=request.param, **nvme) as running:
        yield running


def client(address: str) -> Rig:
    return Rig(daemon=address, backend=CpuBackend(poison=True), pages=32)


def talking(rig: Rig, extra=EXTRA, tokens=TOKENS) -> int:
    """An active session that is stored."""
    seq = rig.start(tokens)
    rig.prefill(seq)
    rig.pager.checkpoint("chat", seq, extra)
    return seq


def went_on(rig: Rig, tokens=(1, 2, 3), extra=EXTRA) -> int:
    """Another process takes the session on by a turn, which is acknowledged, and gives it back."""
    seq, _ = rig.pager.resume("chat")
    rig.say(seq, list(tokens))
    rig.pager.park("chat", seq, extra)
    return len(TOKENS) + len(tokens)


def break_all(daemon: InsideDaemon, *rigs: Rig) -> None:
    """Every socket, until every client is back."""
    epochs = [rig.pager._core.nvme.attachment.epoch for rig in rigs]
    break_sockets(daemon)
    for rig, epoch in zip(rigs, epochs, strict=True):
        wait_for(lambda rig=rig, epoch=epoch: is_back(rig, epoch))


def is_back(rig: Rig, epoch: int) -> bool:
    said = rig.pager.status()["tiers"]["daemon"]
    return said["is_attached"] and said["epoch"] != epoch


def stored(rig: Rig) -> list[int]:
    """The session's tokens as the daemon has them."""
    seq, parked = rig.pager.resume("chat")
    rig.pager.finish(seq)
    return parked.token_ids


def end(*rigs: Rig) -> None:
    for rig in rigs:
        assert not rig.wrong
        rig.close()


# ---------------------------------------------------------------------- sockets that break
@pytest.mark.parametrize("verb", ["checkpoint", "park"])
def test_a_turn_of_another_process_outlives_who_lost_its_socket(daemon, verb):
    first, second = client(daemon.address), client(daemon.address)
    seq = talking(first)
    break_all(daemon, first, second)
    length = went_on(second)
    first.say(seq, [7, 8])
    for _ in range(2):
        with pytest.raises(ConfigError, match="changed by another process since"):
            getattr(first.pager, verb)("chat", seq)
    assert stored(second) == [*TOKENS, 1, 2, 3]  # it is nobody's, and as it was acknowledged
    first.pager.release(seq)
    seq, parked = first.pager.resume("chat")
    assert parked.num_computed == length
    first.say(seq, [9])
    first.pager.park("chat", seq)
    assert stored(second)[length:] == [9]
    end(first, second)


def test_other_words_about_the_same_tokens_are_a_change_too(daemon):
    first, second = client(daemon.address), client(daemon.address)
    seq = talking(first)
    break_all(daemon, first, second)
    again, _ = second.pager.resume("chat")
    second.pager.park("chat", again, {"n": 2})
    with pytest.raises(ConfigError, match="changed by another process since"):
        first.pager.checkpoint("chat", seq, EXTRA)
    assert second.pager.resume("chat")[1].extra == {"n": 2}
    end(first, second)


def test_who_lost_its_socket_goes_on_where_nobody_changed_the_session(daemon):
    first, second = client(daemon.address), client(daemon.address)
    seq = talking(first)
    break_all(daemon, first, second)
    again, _ = second.pager.resume("chat")  # and gives it back as it was
    second.pager.finish(again)
    first.say(seq, [7, 8])
    first.pager.checkpoint("chat", seq, EXTRA)
    with pytest.raises(Busy):
        second.pager.resume("chat")  # it is the first one's again
    break_all(daemon, first, second)
    first.say(seq, [9])
    first.pager.park("chat", seq, EXTRA)
    assert stored(second) == [*TOKENS, 7, 8, 9]
    break_all(daemon, first, second)
    seq = talking(first, tokens=[5, 6, 7])  # its own, over what it put itself
    assert first.pager.token_ids(seq) == [5, 6, 7]
    end(first, second)


def test_what_another_process_has_is_not_put_over_and_an_unchanged_one_is_once_it_was_given_back(daemon, monkeypatch):
    first, second = client(daemon.address), client(daemon.address)
    seq = talking(first)
    break_all(daemon, first, second)
    again, _ = second.pager.resume("chat")
    monkeypatch.setattr("kvtier.pager.client.tier.PUT_S", 0.3)
    with pytest.raises(Busy, match="active in another process"):
        first.pager.checkpoint("chat", seq, EXTRA)
    second.pager.finish(again)
    first.pager.checkpoint("chat", seq, EXTRA)
    end(first, second)


# ---------------------------------------------------------------------- daemons that end, answers that do not come
def test_a_daemon_that_was_killed_has_the_session_as_its_client_left_it(tmp_path):
    with Pagerd(tmp_path, host_bytes=256 * SIZE, nvme_bytes=4 << 20) as daemon:
        first, second = client(daemon.address), client(daemon.address)
        seq = talking(first)
        for turn in ([7, 8], [9]):
            daemon.kill()
            first.say(seq, turn)
            daemon.start()
            wait_for(lambda: first.pager.status()["tiers"]["daemon"]["is_attached"])
            first.pager.checkpoint("chat", seq, EXTRA)
        daemon.kill()
        daemon.start()
        for rig in (first, second):
            wait_for(lambda rig=rig: rig.pager.status()["tiers"]["daemon"]["is_attached"])
        went_on(second)
        with pytest.raises(ConfigError, match="changed by another process since"):
            first.pager.park("chat", seq, EXTRA)
        assert stored(second) == [*TOKENS, 7, 8, 9, 1, 2, 3]
        end(first, second)


def test_a_daemon_in_memory_alone_that_was_killed_takes_the_session_anew(tmp_path):
    with Pagerd(tmp_path, host_bytes=256 * SIZE) as daemon:
        rig = client(daemon.address)
        seq = talking(rig)
        daemon.kill()
        daemon.start()
        wait_for(lambda: rig.pager.status()["tiers"]["daemon"]["is_attached"])
        rig.say(seq, [7, 8])
        rig.pager.park("chat", seq)
        assert stored(rig) == [*TOKENS, 7, 8]
        end(rig)


def test_a_put_that_was_stored_without_an_answer_is_its_clients_own(daemon):
    rig = client(daemon.address)
    seq = talking(rig)
    rig.say(seq, [7, 8])
    attachment = rig.pager._core.nvme.attachment
    really = attachment.put_session

    def lose_answer(*arguments) -> None:
        really(*arguments)
        raise TierUnavailableError("the answer was lost")

    attachment.put_session = lose_answer
    with pytest.raises(TierUnavailableError):
        rig.pager.checkpoint("chat", seq, EXTRA)
    break_all(daemon, rig)
    rig.say(seq, [9])
    rig.pager.checkpoint("chat", seq, EXTRA)
    rig.pager.park("chat", seq, EXTRA)
    assert stored(rig) == [*TOKENS, 7, 8, 9]
    end(rig)


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_put_that_its_client_does_not_wait_for_keeps_the_session_until_it_is_over(daemon, is_gone):
    """Else it would come down on top of what the next one put meanwhile."""
    first, second = attach(daemon.address), attach(daemon.address)
    older, newer = (
        {"version": 1, "namespace": "default", "num_computed": 0, "extra": {}, "token_ids": bytes(n)} for n in (4, 8)
    )
    reached, slow = threading.Event(), threading.Event()
    flush = daemon.store.core.nvme.flush

    def flush_late(*arguments) -> None:
        reached.set()
        slow.wait(60)
        flush(*arguments)

    daemon.store.core.nvme.flush = flush_late
    late = first.connection.begin(m.PutSession(first.epoch, first.store, "chat", older), m.SessionPut)
    wait_for(reached.is_set)
    with pytest.raises(Busy, match="being stored"):  # nothing of it is there so far, and it will be
        second.take_session("chat")
    if is_gone:
        first.connection.close()
        wait_for(lambda: len(daemon.service.attachments.by_connection) == 1)
    else:
        with pytest.raises(UnknownSessionError):
            first.drop_session("chat", keep=True)
    with pytest.raises(Busy, match="being stored"):
        second.put_session("chat", newer, WAIT_S)
    slow.set()
    wait_for(lambda: not daemon.store.keeper.putting)
    assert late.is_in_doubt == is_gone
    assert second.take_session("chat")["token_ids"] == bytes(4)  # nobody has it
    second.put_session("chat", newer, WAIT_S)
    if not is_gone:
        first.drop_session("chat", keep=True)  # what it has not: nothing to wait for, and nothing changes
        with pytest.raises(Busy, match="active in another"):
            first.take_session("chat")
        first.goodbye()
    second.drop_session("chat", keep=True)
    assert second.take_session("chat")["token_ids"] == bytes(8)
    second.goodbye()


def test_a_put_that_fails_makes_the_session_nobodys(daemon):
    first, second = attach(daemon.address), attach(daemon.address)
    lost = {"version": 1, "namespace": "default", "num_computed": 4, "extra": {}, "token_ids": bytes(16)}
    for _ in range(2):
        with pytest.raises(Exception, match="0 of its 4 tokens are held here"):
            first.put_session("chat", lost, 1.0)
    second.put_session("chat", lost | {"num_computed": 0}, WAIT_S)
    assert daemon.store.keeper.putting == {}
    with pytest.raises(Busy, match="active in another"):
        first.take_session("chat")
    first.goodbye()
    second.goodbye()


# ---------------------------------------------------------------------- two who begin the same one
def test_two_processes_that_choose_the_same_id_do_not_replace_each_other(daemon):
    first, second = client(daemon.address), client(daemon.address)
    seq = talking(first)
    first.pager.park("chat", seq, EXTRA)
    other = second.start([1, 2, 3, 4, 5])
    second.prefill(other)
    with pytest.raises(ConfigError, match="exists already"):
        second.pager.park("chat", other)
    assert stored(first) == TOKENS
    first.pager.forget("chat")
    second.pager.park("chat", other)
    assert stored(first) == [1, 2, 3, 4, 5]
    end(first, second)


# ---------------------------------------------------------------------- flushes of version 1
def test_a_flush_of_version_1_covers_what_its_client_committed_and_holds(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as running:
        raw = attach(running.address, newest_version=1)
        put(raw, [1, 2])
        begin_flush(raw).result(WAIT_S)
        d = running.store.core.groups[0].directory
        assert d.nvme_valid[d.live()].sum() == len(d.live()) == 2
        raw.goodbye()


def test_a_prefix_that_others_committed_is_durable_when_it_was_persisted(daemon):
    rigs = [client(daemon.address) for _ in range(2)]
    for rig in rigs:
        seq = rig.start(TOKENS)
        rig.prefill(seq)
        wait_for(lambda rig=rig: rig.pager.match(TOKENS).tokens == len(TOKENS) and not rig.pager._core.in_flight())
    d = daemon.store.core.groups[0].directory
    named = d.live()[d.is_named[d.live()]]  # without slots that are reserved
    assert len(named) == 10 and not d.nvme_valid[named].any()
    rigs[1].pager.persist([seq])
    assert d.nvme_valid[named].all()
    end(*rigs)
