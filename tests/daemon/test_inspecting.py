"""The inspector against a real pagerd: every view, several models, a hang, another user, and no cost to its clients."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from kvtier.pager.daemon.inspecting import may_inspect
from kvtier.pager.inspection.asking import RefusedError, Target, TimedOutError, UnreachableError
from kvtier.pager.inspection.snapshot import page_path
from kvtier.pager.prefix import Match
from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ProtocolError

from ..pager.harness import LAYOUT, WINDOWED, Rig
from ..tools.inspecting import broken_rules, inspect
from .raw import attach, key
from .running import Pagerd, wait_for

SIZE = LAYOUT.block_bytes
TOKENS = list(range(100, 180))


@pytest.fixture
def daemon(tmp_path):
    with Pagerd(tmp_path, host_bytes=64 * SIZE, nvme_bytes=2000 * SIZE) as running:
        yield running
        if running.process is not None and running.process.poll() is None:
            assert "Traceback" not in running.log, running.log


def client(daemon, **options) -> Rig:
    return Rig(daemon=daemon.address, backend=CpuBackend(), **({"pages": 32} | options))


def test_a_daemon_without_a_model_says_so(daemon):
    told = Target.find(str(daemon.socket), timeout_s=60.0).ask("status")
    assert told["source"] == "daemon" and told["models"] == []
    done = inspect("-s", daemon.socket)
    assert done.returncode == 0 and "no model is open" in done.stdout
    with pytest.raises(RefusedError, match="no model is open"):
        Target.find(str(daemon.socket), timeout_s=60.0).ask("sessions")


def test_what_clients_did_is_told_and_the_books_agree(daemon):
    rig = client(daemon)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    rig.pager.park("alice", seq)
    again = client(daemon)
    again.prefill(again.start(TOKENS))
    target = Target.find(str(daemon.socket), timeout_s=60.0)
    assert broken_rules(target.ask("check")) == []
    (row,) = target.ask("sessions")["sessions"]
    assert row["name"] == "alice" and row["tokens"] == len(TOKENS)
    assert target.ask("session", session="alice")["groups"][0]["blocks"] == len(TOKENS) // 4
    kinds = {event["what"] for event in target.ask("trace", limit=500)["events"]}
    assert "written" in kinds
    assert target.ask("advise")["uses"] > 0  # look-ups of clients feed it
    assert "pagerd: model 1" in inspect("-s", daemon.socket).stdout
    for one in (rig, again):
        one.close()


def test_requests_and_turns_of_clients_are_counted_once_each_by_tier(daemon):
    """A client tells of what it had itself too; looking up the same prompt again while it prefills counts nothing."""

    def told() -> dict[str, int]:
        status = target.ask("status")
        hits = {name: tier["hit_tokens"] for name, tier in status["tiers"].items() if tier["hit_tokens"]}
        return hits | {name: status[name] for name in ("miss_tokens", "lookups")}

    rig, target = client(daemon), Target.find(str(daemon.socket), timeout_s=30.0)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    wait_for(lambda: told() == {"miss_tokens": 79, "lookups": 1})
    rig.say(seq, [1, 2, 3])
    wait_for(lambda: told() == {"device": 80, "miss_tokens": 81, "lookups": 2})
    rig.pager.park("alice", seq)
    again = client(daemon)
    seq, _ = again.pager.resume("alice")
    assert told()["lookups"] == 2  # a look-up for its blocks is no request
    again.say(seq, [4, 5])
    wait_for(lambda: told() == {"device": 80, "host": 83, "miss_tokens": 82, "lookups": 3})
    assert target.ask("advise")["ever_reused"] > 0.4
    for one in (rig, again):
        one.close()


def test_a_client_that_says_nothing_of_its_requests_is_counted_by_its_lookups(daemon):
    rig, target = client(daemon), Target.find(str(daemon.socket), timeout_s=30.0)
    rig.prefill(rig.start(TOKENS))
    rig.pager.drain()
    remote = rig.pager._remote._tier.attachment
    wait_for(lambda: target.ask("status")["lookups"] == 1)
    before = target.ask("status")["tiers"]["host"]["hit_tokens"]
    keys = [*rig.pager.block_keys(rig.start(TOKENS), 0, 8), bytes(32)]
    wait_for(lambda: target.ask("status")["lookups"] == 2)
    known = target.ask("status")
    remote.connection.call(m.Lookup(remote.store, b"".join(keys)), m.Found)
    now = target.ask("status")
    assert now["lookups"] == 3 and now["miss_tokens"] == known["miss_tokens"] + 4
    assert now["tiers"]["host"]["hit_tokens"] == known["tiers"]["host"]["hit_tokens"] + 8 and before == 0
    with pytest.raises(ProtocolError, match="9 tokens found of 8"):
        remote.connection.call(m.Used(remote.epoch, remote.store, b"", 8, 9), m.Noted)
    rig.close()


def test_models_are_told_apart(tmp_path):
    with Pagerd(tmp_path, host_bytes=128 * SIZE, nvme_bytes=2000 * SIZE, options=("--max-models", "2")) as daemon:
        check_two_models(daemon)


def check_two_models(daemon: Pagerd) -> None:
    first, second = client(daemon), client(daemon, layouts=[LAYOUT, WINDOWED])
    target = Target.find(str(daemon.socket), timeout_s=60.0)
    assert target.ask("status")["models"] == [1, 2] and target.ask("status")["model"] == 2
    assert len(target.ask("status")["layer_groups"]) == 2
    target.model = 1
    assert len(target.ask("status")["layer_groups"]) == 1
    target.model = 7
    with pytest.raises(RefusedError, match="choose 1, 2"):
        target.ask("blocks")
    assert inspect("-s", daemon.socket, "--model", 1, "blocks").returncode == 0
    for rig in (first, second):
        rig.close()


def test_bad_questions_are_answered_and_the_daemon_goes_on(daemon):
    rig = client(daemon)
    target = Target.find(str(daemon.socket), timeout_s=60.0)
    for verb, arguments in (("evict", {}), ("sessions", {"limit": -1}), ("session", {"session": "nobody"})):
        with pytest.raises(RefusedError):
            target.ask(verb, **arguments)
    assert rig.prefill(rig.start(TOKENS)) == len(TOKENS)
    rig.close()


def test_only_the_daemons_own_user_may_look():
    assert may_inspect(os.geteuid()) and may_inspect(0)
    assert not may_inspect(os.geteuid() + 12345) and not may_inspect(-1)  # -1: not from this machine


def test_a_daemon_that_hangs_can_still_be_read_and_one_that_ends_leaves_no_page(daemon):
    rig = client(daemon)
    rig.prefill(rig.start(TOKENS))
    page = page_path(daemon.socket)
    wait_for(page.exists)
    wait_for(lambda: "status" in _published(daemon))
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimedOutError, match="--offline"):
            Target.find(str(daemon.socket), timeout_s=0.3).ask("status")
        done = inspect("-s", daemon.socket, "top", "--once", "--offline")
        assert done.returncode == 0 and "CAPACITY" in done.stdout
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    rig.close()
    assert daemon.stop() == 0 and not page.exists()


def test_a_daemon_that_hangs_holds_up_nobody_who_tells_it_of_requests(daemon):
    """Nobody waits for those replies, so nothing gives them up."""
    client = attach(daemon.address)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        telling = threading.Thread(
            target=lambda: [client.used([key(i)], 4, Match(0), is_turn=False) for i in range(200)], daemon=True
        )
        telling.start()
        telling.join(30.0)
        assert not telling.is_alive()
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    assert client.lookup([key(1)], prefix=True, hold=False).shape == (1, 0)
    target = Target.find(str(daemon.socket), timeout_s=60.0)
    before = target.ask("status")["lookups"]
    client.used([key(1)], 4, Match(0), is_turn=False)  # it answers again, so it is told again
    wait_for(lambda: target.ask("status")["lookups"] > before)
    client.goodbye()


def _published(daemon) -> dict:
    try:
        return Target.find(str(daemon.socket), timeout_s=60.0).snapshot(watch=True)
    except UnreachableError:
        return {}
