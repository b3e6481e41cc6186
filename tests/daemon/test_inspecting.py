"""The inspector against a real pagerd: every view, several models, a hang, another user, and no cost to its clients."""

from __future__ import annotations

import os
import signal

import pytest

from kvtier.pager.daemon.inspecting import may_inspect
from kvtier.pager.inspection.asking import RefusedError, Target, TimedOutError, UnreachableError
from kvtier.pager.inspection.snapshot import page_path
from kvtier.tiers.cpu import CpuBackend

from ..pager.harness import LAYOUT, WINDOWED, Rig
from ..tools.inspecting import inspect
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
    told = Target.find(str(daemon.socket)).ask("status")
    assert told["source"] == "daemon" and told["models"] == []
    done = inspect("-s", daemon.socket)
    assert done.returncode == 0 and "no model is open" in done.stdout
    with pytest.raises(RefusedError, match="no model is open"):
        Target.find(str(daemon.socket)).ask("sessions")


def test_every_view_is_answered_and_the_books_agree(daemon):
    rig = client(daemon)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    rig.pager.park("alice", seq)
    again = client(daemon)
    again.prefill(again.start(TOKENS))
    for words in (
        "status",
        "sessions",
        "session alice",
        "blocks",
        "why",
        "explain alice",
        "trace",
        "thrash",
        "doctor",
        "check",
        "advise",
    ):
        for extra in ([], ["--json"]):
            done = inspect("-s", daemon.socket, *words.split(), *extra)
            assert done.returncode in (0, 1) and done.stdout and not done.stderr, (words, done)
    target = Target.find(str(daemon.socket))
    assert target.ask("check")["findings"] == 0
    (row,) = target.ask("sessions")["sessions"]
    assert row["name"] == "alice" and row["tokens"] == len(TOKENS)
    assert target.ask("session", session="alice")["groups"][0]["blocks"] == len(TOKENS) // 4
    kinds = {event["what"] for event in target.ask("trace", limit=500)["events"]}
    assert "written" in kinds
    assert target.ask("advise")["uses"] > 0  # look-ups of clients feed it
    assert "pagerd: model 1" in inspect("-s", daemon.socket).stdout
    for one in (rig, again):
        one.close()


def test_models_are_told_apart(tmp_path):
    with Pagerd(tmp_path, host_bytes=128 * SIZE, nvme_bytes=2000 * SIZE, options=("--max-models", "2")) as daemon:
        check_two_models(daemon)


def check_two_models(daemon: Pagerd) -> None:
    first, second = client(daemon), client(daemon, layouts=[LAYOUT, WINDOWED])
    target = Target.find(str(daemon.socket))
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
    target = Target.find(str(daemon.socket))
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
    wait_for(lambda: "status" in _published(daemon), 20.0)
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


def _published(daemon) -> dict:
    try:
        return Target.find(str(daemon.socket)).snapshot(watch=True)
    except UnreachableError:
        return {}
