"""pagerd as a service: what it tells its manager, sockets that are handed over, SIGHUP, SIGTERM, metrics, logs, units."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.pager.daemon import secret_files
from kvtier.pager.daemon.logs import JsonLines, TextLines
from kvtier.pager.daemon.metrics import MetricsServer, check_metrics
from kvtier.pager.daemon.models import Budget
from kvtier.pager.daemon.notify import Notifier, inherited_sockets
from kvtier.pager.daemon.reload import plan_reload
from kvtier.pager.daemon.server import Daemon
from kvtier.pager.daemon.settings import load_daemon_config
from kvtier.pager.daemon.sockets import listen
from kvtier.pager.daemon.threads import AT_ONCE
from kvtier.pager.protocol import fetch_status
from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import ConfigError, KvTierError, ProtocolError, TierUnavailableError

from .running import wait_for
from .service_process import BLOCK, Pagerd, free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SMALL = 'host_bytes = "1MiB"\nhost_prefault = false\n'
KEYS, BLOCKS = [bytes([i]) * 32 for i in range(1, 9)], [bytes([i]) * BLOCK for i in range(1, 9)]


# ---------------------------------------------------------------------- systemd
def test_the_manager_hears_of_start_life_reload_and_end(tmp_path):
    with Pagerd(tmp_path, SMALL, WATCHDOG_USEC="100000") as pagerd:
        heard = pagerd.hear("READY=1")
        assert any(line == f"STATUS=serving on {pagerd.socket}" for line in heard)
        for _ in range(3):
            pagerd.hear("WATCHDOG=1")
        pagerd.reload(SMALL)
        pagerd.process.send_signal(signal.SIGTERM)
        heard = pagerd.hear("STOPPING=1")
        assert pagerd.process.wait(60) == 0 and not pagerd.socket.exists()


def test_a_watchdog_for_another_process_is_not_fed(tmp_path):
    assert Notifier({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "1000000"}).watchdog_s == 0.5
    for text in ("", "0", "-5", "soon"):
        assert Notifier({"WATCHDOG_USEC": text}).watchdog_s is None
    Notifier({}).send("READY=1")  # nobody listens
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send("READY=1")


def test_a_notification_reaches_abstract_sockets_too():
    name = f"\0kvtier-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        Notifier({"NOTIFY_SOCKET": "@" + name[1:]}).send("READY=1", "STATUS=x")
        assert manager.recv(100) == b"READY=1\nSTATUS=x"


def test_a_manager_that_is_held_up_hears_of_every_change_of_state(tmp_path):
    """Its queue is full of signs of life; one more of those may be lost."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        filler.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                filler.sendto(b"WATCHDOG=1", str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        notifier.send("WATCHDOG=1", wait_s=0.0)  # does not wait
        telling = threading.Thread(target=notifier.send, args=("READY=1",), kwargs={"wait_s": 60.0})
        telling.start()
        telling.join(0.2)
        assert telling.is_alive()
        while manager.recv(100) != b"READY=1":
            pass
        telling.join(60)


def test_a_socket_of_the_manager_is_served_and_stays(tmp_path):
    path = tmp_path / "activated.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(8)
        for _ in range(2):  # it outlives the daemon: a client that comes meanwhile waits for the next one
            with Pagerd(tmp_path, SMALL, listener=listener) as pagerd:
                client = pagerd.connect().open()
                assert client.put(KEYS[:1], BLOCKS[:1], "default") == [1] and client.get(KEYS[:1]) == BLOCKS[:1]
                client.close()
                assert pagerd.end() == 0 and path.is_socket()


def test_descriptors_for_somebody_else_or_of_another_kind_are_not_taken():
    assert inherited_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == {}
    assert inherited_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == {}
    code = (
        "import os, socket; from kvtier.pager.daemon.notify import inherited_sockets; "
        "one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); os.dup2(one.fileno(), 3); "
        "env = {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
        "try: inherited_sockets(env)\nexcept Exception as error: print(error, env)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "socket 'unknown' does not listen" in said and said.endswith("{}\n")


def test_the_unit_hides_gpus_and_its_drop_in_shows_them():
    """Copies by the daemon on CUDA go through /dev/nvidia*."""
    unit, drop_in = (DEPLOY / "pagerd.service").read_text(), (DEPLOY / "pagerd.service.d/ipc.conf").read_text()
    assert "PrivateDevices=yes" in unit and "pagerd.service.d/ipc.conf" in unit
    assert "PrivateDevices=no\n" in drop_in and "DeviceAllow=char-nvidia* rw\n" in drop_in


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_units_are_what_systemd_takes(tmp_path):
    program = Path(sys.executable).parent / "pagerd"
    for unit in ("pagerd.service", "pagerd.socket"):
        text = (DEPLOY / unit).read_text().replace("/usr/local/bin/pagerd", str(program))
        (tmp_path / unit).write_text(re.sub(r"(?m)^(User|Group|SocketUser|SocketGroup)=kvtier$", r"\1=root", text))
    shutil.copytree(DEPLOY / "pagerd.service.d", tmp_path / "pagerd.service.d")
    command = ["systemd-analyze", "verify", "--man=no", tmp_path / "pagerd.service", tmp_path / "pagerd.socket"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "pagerd" in line]
    assert not ours, ours


def test_the_example_configuration_is_good_with_and_without_its_comments(tmp_path):
    text = (DEPLOY / "pagerd.toml").read_text()
    (tmp_path / "a.toml").write_text(text)
    load_daemon_config(tmp_path / "a.toml", env={}, nvme_path=str(tmp_path / "s"))
    secret_files.write_new_secret(tmp_path / "root.secret")
    lines = [re.sub(r"^# (?=[a-z_\[]+ ?[=.\]])", "", line) for line in text.splitlines()]
    whole = "\n".join(lines).replace("/etc/kvtier/root.secret", str(tmp_path / "root.secret"), 1)
    (tmp_path / "b.toml").write_text(whole.replace("blake2b:...", "blake2b:" + "0" * 64))
    config = load_daemon_config(tmp_path / "b.toml", env={}, nvme_path=str(tmp_path / "s"))
    assert config.nvme_codec == "zstd+aes" and config.quota("chat").pins == 4096 and config.metrics is not None


# ---------------------------------------------------------------------- SIGHUP
def test_limits_change_while_it_runs_and_what_cannot_says_so(tmp_path):
    with Pagerd(tmp_path, SMALL).ready() as pagerd:
        first = pagerd.connect().open()
        pagerd.reload(SMALL.replace("1MiB", "2MiB") + "[limits]\nconnections = 1\n")
        log = pagerd.wait_for_log("event=reload changed=limits")
        assert "event=reload_needs_restart setting=host_bytes" in log
        with pytest.raises(KvTierError):
            pagerd.connect()
        assert "limits.connections=1" in pagerd.wait_for_log("event=refuse_client")
        pagerd.reload(SMALL + "[limits]\nconnections = 9\n")
        pagerd.wait_for_log("event=reload changed=limits", 2)
        pagerd.connect().close()
        for bad in ("[limits]\nconections = 7\n", "[limits\n"):
            pagerd.reload(bad)
        assert "did you mean 'connections'?" in pagerd.wait_for_log("event=reload_refused", 2)
        assert first.put(KEYS[:1], BLOCKS[:1], "default") == [1]
        first.close()
        assert pagerd.end() == 0


def test_a_reload_lets_a_new_namespace_in_and_keeps_the_secret_of_an_old_one(tmp_path):
    secret_files.write_new_secret(tmp_path / "root")
    secret_files.write_new_secret(tmp_path / "other")
    (alice, kept), (bob, kept_bob) = secret_files.new_token(), secret_files.new_token()
    head = SMALL + f'root_secret_file = "{tmp_path / "root"}"\n'
    with Pagerd(tmp_path, head + f'[namespaces.alice]\ntokens = ["{kept}"]\n').ready() as pagerd:
        client = pagerd.connect(alice).open()
        secret = client.namespaces["alice"]
        with pytest.raises(KvTierError):
            pagerd.connect(bob)
        assert "is not let in" in pagerd.log()
        pagerd.reload(
            head + f'[namespaces.alice]\ntokens = ["{kept}"]\nsecret_file = "{tmp_path / "other"}"\npins = 1\n'
            f'[namespaces.bob]\ntokens = ["{kept_bob}"]\n'
        )
        assert "setting=namespaces.alice.secret" in pagerd.wait_for_log("event=reload changed=namespaces")
        assert pagerd.connect(alice).namespaces["alice"] == secret
        assert list(pagerd.connect(bob).namespaces) == ["bob"]
        slots = client.reserve(1)
        with pytest.raises(KvTierError, match="used up its pins"):  # the new quota holds in the store that was open
            client.connection.call(client_reserve(client), object)
        client.release(slots)
        pagerd.reload(head + f'[namespaces.bob]\ntokens = ["{kept_bob}"]\n')
        pagerd.wait_for_log("event=reload changed=namespaces", 2)
        with pytest.raises(KvTierError):
            pagerd.connect(alice)
        assert pagerd.end() == 0


def client_reserve(client):
    return m.Reserve(client.epoch, client.store, 0, 1)


def test_who_is_taken_off_the_list_is_shown_out_at_once_and_nobody_else(tmp_path):
    """With a slot of theirs half used; a namespace that somebody gets is had with the next connection."""
    secret_files.write_new_secret(tmp_path / "root")
    (alice, kept_alice), (bob, kept_bob) = secret_files.new_token(), secret_files.new_token()
    head = SMALL + f'root_secret_file = "{tmp_path / "root"}"\n[namespaces.alice]\ntokens = ["{kept_alice}"]\n'
    with Pagerd(tmp_path, head + f'[namespaces.bob]\ntokens = ["{kept_bob}"]\n').ready() as pagerd:
        stays, goes = pagerd.connect(alice).open(), pagerd.connect(bob).open()
        slots = goes.reserve(1)
        goes.write(slots[0], bytes(BLOCK))
        pagerd.reload(head + f"tokens_of = []\n[namespaces.bob]\nuids = [{os.getuid() + 1}]\n")
        pagerd.wait_for_log("event=reload_refused")  # a slip in the file shows nobody out
        assert goes.lookup([bytes(32)]) == [0]
        pagerd.reload(head + f"[namespaces.bob]\nuids = [{os.getuid() + 1}]\n")
        pagerd.wait_for_log("event=show_out", 1)
        with pytest.raises((ProtocolError, TierUnavailableError), match=r"configuration has changed|is gone"):
            for _ in range(100):
                goes.lookup([bytes(32)])
        with pytest.raises(ProtocolError, match="is not let in"):
            pagerd.connect(bob)
        assert stays.put([b"k" * 32], [b"b" * BLOCK], "alice") == [1] and pagerd.log().count("event=show_out") == 1
        pagerd.reload(head + f'[namespaces.bob]\ntokens = ["{kept_bob}", "{kept_alice}"]\n')
        assert stays.get([b"k" * 32]) == [b"b" * BLOCK] and set(pagerd.connect(alice).namespaces) == {"alice", "bob"}
        assert pagerd.end() == 0


def test_a_plan_names_what_waits_for_a_restart(tmp_path):
    file = tmp_path / "c.toml"

    def load(text):
        file.write_text(text)
        return load_daemon_config(file, env={})

    old = load('host_bytes = "1GiB"\nlog_level = "info"\n')
    plan = plan_reload(old, load('host_bytes = "2GiB"\nlog_level = "debug"\nsocket = "/x"\n[limits]\ndrain_s = 1\n'))
    assert (plan.changed, set(plan.refused)) == (("limits", "log_level"), {"host_bytes", "socket"})
    assert (plan.config.host_size, plan.config.log_level, plan.config.socket) == (1 << 30, "debug", None)
    assert plan_reload(old, old).changed == plan_reload(old, old).refused == ()


# ---------------------------------------------------------------------- the end
def test_what_was_only_in_memory_is_written_down_by_sigterm_and_found_again(tmp_path):
    config = SMALL + f'nvme_path = "{tmp_path / "s"}"\nnvme_bytes = "4MiB"\n'
    with Pagerd(tmp_path, config).ready() as pagerd:
        client = pagerd.connect().open()
        assert client.put(KEYS, BLOCKS, "default") == [1] * len(KEYS)  # acknowledged, never flushed
        assert pagerd.end() == 0
    with Pagerd(tmp_path, config).ready() as pagerd:
        client = pagerd.connect().open()
        assert client.get(KEYS) == BLOCKS
        assert pagerd.end(signal.SIGINT) == 0


@pytest.mark.parametrize("drain_s", [0, 1])
def test_whoever_waits_longer_than_a_drain_may_take_is_told_so(drain_s, tmp_path):
    """A flush that its namespace's rate holds up for minutes, and more of them than there are threads."""
    secret_files.write_new_secret(tmp_path / "root")
    token, kept = secret_files.new_token()
    config = (
        SMALL + f'nvme_path = "{tmp_path / "s"}"\nnvme_bytes = "4MiB"\nroot_secret_file = "{tmp_path / "root"}"\n'
        f'[limits]\ndrain_s = {drain_s}\n[namespaces.alice]\ntokens = ["{kept}"]\nwrite_bytes_per_s = 1\n'
    )
    with Pagerd(tmp_path, config).ready() as pagerd:
        client = pagerd.connect(token).open()
        client.put([b"\0" * 32], [bytes(BLOCK)], "alice", hold=True)
        client.flush()  # which takes what the rate allows for a while
        waiting = []
        for number in range(1, 2 * AT_ONCE + 1):
            client.put([bytes([number]) * 32], [bytes(BLOCK)], "alice", hold=True)
            waiting.append(client.connection.begin(m.Flush(client.epoch, client.store, 60_000), m.Flushed))
        wait_for(lambda: fetch_status(str(pagerd.socket), 60.0)["daemon"]["waiting_requests"] == len(waiting))
        pagerd.process.send_signal(signal.SIGTERM)
        for reply in waiting:
            with pytest.raises(TierUnavailableError, match="shutting down"):
                reply.result(60.0)
        assert pagerd.process.wait(30) == 0 and "event=drain_cut_short" in pagerd.log()
        assert "Traceback" not in pagerd.log() and "Error" not in pagerd.log(), pagerd.log()


def test_what_a_successor_has_put_in_place_of_our_sockets_stays(tmp_path):
    """It may start while we drain."""
    pytest.importorskip("prometheus_client")
    path, metrics, successors = tmp_path / "d.sock", tmp_path / "m.sock", []

    class Replaced(Daemon):
        async def _serve(self, listener, on_ready):
            ours = await MetricsServer.start(f"unix://{metrics}", bytes)
            listener.close()
            successors.append(listen(path))
            successors.append(await MetricsServer.start(f"unix://{metrics}", lambda: b"ours"))
            ours.close()
            assert "ours" in await asyncio.to_thread(scrape, f"unix://{metrics}")
            return 0

    assert Replaced(path, Budget(1 << 20)).run() == 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    successors[0].close()


def test_the_store_of_a_model_that_is_closed_stays_and_is_named_in_the_log(tmp_path):
    """It may hold sessions that were acknowledged, so the next model does not take its place."""
    config = SMALL + f'nvme_path = "{tmp_path / "s"}"\nnvme_bytes = "4MiB"\n'
    with Pagerd(tmp_path, config).ready() as pagerd:
        first = pagerd.connect().open("first")
        first.put(KEYS, BLOCKS, "default")
        first.connection.call(m.Goodbye(first.epoch), m.Bye)
        (folder,) = (tmp_path / "s").glob("model-*")
        second = pagerd.connect().open("second")
        (said,) = re.findall(r"event=closed_store bytes=(\d+) beside_nvme_bytes=(\d+) path=(\S+)", pagerd.log())
        assert int(said[0]) >= len(KEYS) * BLOCK and said[1:] == (str(4 << 20), str(folder))
        second.connection.call(m.Goodbye(second.epoch), m.Bye)
        assert pagerd.connect().open("first").get(KEYS) == BLOCKS
        assert pagerd.end() == 0


def test_a_refused_configuration_ends_with_2_before_anything_is_made(tmp_path):
    with Pagerd(tmp_path, 'host_bytes = "lots"') as pagerd:
        assert pagerd.process.wait(60) == 2 and not pagerd.socket.exists()
        assert pagerd.log().startswith("pagerd: error: ") and "host_bytes='lots'" in pagerd.log()


# ---------------------------------------------------------------------- metrics
def scrape(address: str) -> str:
    if not address.startswith("unix://"):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
            return reply.read().decode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.connect(address.removeprefix("unix://"))
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        raw = b""
        while piece := one.recv(1 << 16):
            raw += piece
        return raw.decode()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_metrics_are_served_where_they_are_asked_for(tmp_path, kind):
    pytest.importorskip("prometheus_client")
    address = f"unix://{tmp_path / 'm.sock'}" if kind == "unix" else f"127.0.0.1:{free_port()}"
    with Pagerd(tmp_path, SMALL, "--metrics", address).ready() as pagerd:
        assert "kvtier_daemon_models 0.0" in scrape(address)  # before any model is open
        client = pagerd.connect().open()
        client.put(KEYS, BLOCKS, "default")
        text = scrape(address)
        levels = {"kvtier_daemon_connections": 1, "kvtier_daemon_models": 1, "kvtier_ready": 1}
        for name, value in levels.items():
            assert f"{name} {value}.0" in text, text
        held = float(re.search(r'kvtier_tier_bytes\{state="dirty",tier="host"\} (\S+)', text)[1]) + float(
            re.search(r'kvtier_tier_bytes\{state="clean",tier="host"\} (\S+)', text)[1]
        )
        assert held == len(KEYS) * BLOCK
        if kind == "unix":
            assert (tmp_path / "m.sock").stat().st_mode & 0o777 == 0o600
        assert pagerd.end() == 0 and not (tmp_path / "m.sock").exists()


def test_metrics_replace_a_socket_and_nothing_else(tmp_path):
    pytest.importorskip("prometheus_client")
    file = tmp_path / "pagerd.toml"
    file.write_text("kept")
    address = f"unix://{file}"
    for refuse in (lambda: check_metrics(address), lambda: asyncio.run(MetricsServer.start(address, bytes))):
        with pytest.raises(ConfigError, match="is no socket"):
            refuse()
    assert file.read_text() == "kept"


def test_a_metrics_address_that_others_reach_is_refused():
    pytest.importorskip("prometheus_client")
    for address in ("0.0.0.0:9", "192.0.2.1:9", "example.org:9", "unix://relative", "9400", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match=re.escape(f"metrics={address!r}")):
            check_metrics(address)
    for address in ("127.0.0.1:9400", "[::1]:9400", "localhost:1", "unix:///run/m.sock"):
        check_metrics(address)


# ---------------------------------------------------------------------- logs
def record(text: str, *values: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("kvtier.test", level, "f.py", 1, text, values, None)


def test_json_lines_hold_the_fields_of_an_event():
    line = JsonLines().format(record("event=attach pid=%d tenant=%s reason=%s", 7, "a,b", "two words: and more"))
    said = json.loads(line)
    assert {**said, "time": 0} == {
        "time": 0,
        "level": "info",
        "logger": "kvtier.test",
        "event": "attach",
        "pid": 7,
        "tenant": "a,b",
        "reason": "two words: and more",
    }
    assert json.loads(JsonLines().format(record("no fields here")))["message"] == "no fields here"


def test_lines_for_the_journal_carry_their_priority():
    assert TextLines(with_priority=True).format(record("event=x", level=logging.ERROR)) == "<3>kvtier.test event=x"
    assert TextLines().format(record("event=x")).endswith("Z info kvtier.test event=x")


@given(st.text(max_size=60))
def test_nothing_that_a_client_sends_makes_a_second_line(text):
    for formatter in (TextLines(), TextLines(with_priority=True), JsonLines()):
        line = formatter.format(record("event=refuse reason=%s", text))
        assert len(line.splitlines()) == 1
    assert json.loads(JsonLines().format(record("event=refuse reason=%s", text)))["event"] == "refuse"


def test_a_running_daemons_log_is_json_line_by_line(tmp_path):
    with Pagerd(tmp_path, SMALL, "--log-format", "json").ready() as pagerd:
        pagerd.connect().open().close()
        assert pagerd.end() == 0
        events = [json.loads(line)["event"] for line in pagerd.log().splitlines()]
    assert events[0] == "ready" and "attach" in events and events[-1] == "drain"
