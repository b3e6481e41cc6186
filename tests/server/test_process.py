"""`kvtier serve` as a process: what SIGTERM drains and kill -9 cannot take, sessions go on after a restart."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time

import httpx
import pytest
import transformers as T

from kvtier.engine.server.run import _listen
from kvtier.tools import cli

from .running import WAIT_S, save_tiny, serve_process, stock

LONG_S = 600  # of a drain: a slow machine finishes what it was asked to finish


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(path)
    return path


def flags(checkpoint, store) -> list:
    return [
        "--model",
        checkpoint,
        "--store",
        store,
        "--nvme-bytes",
        "64MiB",
        "--device-bytes",
        "2MiB",
        "--host-bytes",
        "8MiB",
    ]


def alone(checkpoint, text: str, new_tokens: int) -> str:
    """What transformers says without us."""
    tokenizer = T.AutoTokenizer.from_pretrained(checkpoint)
    model = T.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return tokenizer.decode(stock(model, tokenizer(text)["input_ids"], new_tokens), skip_special_tokens=True)


def say(server, name: str, text: str, **options) -> dict:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0} | options
    reply = server.http.post(f"/v1/sessions/{name}/messages", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_for_drain(http: httpx.Client) -> None:
    """Until the first signal has been heard: one that is sent twice before that may come once."""
    deadline_s = time.monotonic() + 60
    while http.get("/ready").status_code != 503:
        assert time.monotonic() < deadline_s


@pytest.mark.timeout(900)  # its long answer is as slow as the machine
def test_sigterm_lets_requests_finish_parks_sessions_and_a_restart_goes_on(checkpoint, tmp_path):
    store = tmp_path / "store"
    with (
        serve_process(*flags(checkpoint, store), "--served-model-name", "mine", "--drain", LONG_S) as server,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as other,
    ):
        assert server.client.models.list().data[0].id == "mine"
        reply = server.client.completions.create(model="mine", prompt="the lazy dog", max_tokens=10, temperature=0)
        assert reply.choices[0].text.rstrip("\ufffd") == alone(checkpoint, "the lazy dog", 10).rstrip("\ufffd")
        server.http.post("/v1/sessions", json={"id": "a"})
        first = say(server, "a", "the quick brown fox")
        body = {"prompt": "the dog", "max_tokens": 3000, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for_drain(other)
            assert other.get("/health").status_code == 200
            for path in ("/ready", "/v1/models"):
                refused = other.get(path)
                assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length" and rest[-1]["usage"]["completion_tokens"] == 3000
        assert server.process.wait(WAIT_S) == 0
    with serve_process(*flags(checkpoint, store)) as server:
        (found,) = server.http.get("/v1/sessions").json()["data"]
        assert found["state"] == "parked" and found["is_durable"]
        again = say(server, "a", "jumps")["usage"]
        assert again["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
        assert again["prompt_tokens_details"]["recomputed_tokens"] == 0


def test_after_kill_9_under_load_every_session_is_at_its_last_finished_turn_and_a_drain_ends_in_time(
    checkpoint, tmp_path
):
    store, names = tmp_path / "store", [f"s{i}" for i in range(6)]
    finished: dict[str, list[dict]] = {name: [] for name in names}
    with serve_process(*flags(checkpoint, store), expect_rc=-signal.SIGKILL) as server:

        def talk(name: str) -> None:
            client = httpx.Client(base_url=server.url, timeout=WAIT_S)
            try:
                client.post("/v1/sessions", json={"id": name})
                for number in range(1000):
                    body = {"messages": [{"role": "user", "content": f"{name} {number}"}], "max_tokens": 8}
                    finished[name].append(client.post(f"/v1/sessions/{name}/messages", json=body).json()["usage"])
            except httpx.HTTPError:
                pass

        threads = [threading.Thread(target=talk, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + WAIT_S
        while min(len(turns) for turns in finished.values()) < 3 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        server.process.kill()
        server.process.wait(60)
        for thread in threads:
            thread.join()
    with serve_process(*flags(checkpoint, store), "--drain", "0.3") as server:
        found = {one["id"]: one["tokens"] for one in server.http.get("/v1/sessions").json()["data"]}
        for name, turns in finished.items():
            assert found[name] >= turns[-1]["total_tokens"], name  # one turn more, if its answer was on its way
            usage = say(server, name, "and now?")["usage"]
            assert usage["prompt_tokens"] > found[name] and usage["prompt_tokens_details"]["recomputed_tokens"] == 0
        sigterm_does_not_wait_longer_than_it_was_told(server)


def sigterm_does_not_wait_longer_than_it_was_told(server) -> None:
    body = {"prompt": "the dog", "max_tokens": 3500, "temperature": 0, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        told = [line for line in lines if line.startswith("data: ")]
    assert json.loads(told[-2][6:])["error"]["code"] == "cancelled" and told[-1] == "data: [DONE]"
    assert server.process.wait(WAIT_S) == 0


def test_the_built_in_model_recalls_over_http_and_a_second_signal_does_not_wait():
    sizes = ("--device-bytes", "8MiB", "--host-bytes", "16MiB")
    with serve_process("--needle", *sizes, "--drain", LONG_S, starts_cold=True) as server:
        content = "s5 s6 s7 " + " ".join(f"f{i}" for i in range(1000)) + " s5"
        reply = server.client.chat.completions.create(
            model="needle", messages=[{"role": "user", "content": content}], max_tokens=2, temperature=0
        )
        assert reply.choices[0].message.content == "s6 s7"
        with server.http.stream(
            "POST", "/v1/completions", json={"prompt": "f1", "max_tokens": 4000, "temperature": 0, "stream": True}
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_for_drain(server.http)  # the stream goes on
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert '"cancelled"' in "".join(lines)
        assert server.process.wait(WAIT_S) == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--needle", "--host", "0.0.0.0"], "give --api-keys FILE"),
        (["--needle", "--api-keys", "nowhere.toml"], "cannot read --api-keys"),
        (["--needle", "--max-concurrency", "0"], "max_concurrency=0"),
        (["--needle", "--port", "99999"], "--port 99999"),
        (["--model", "nowhere"], "no config.json"),
        (["--needle", "--device-bytes", "0"], "device_bytes"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(argv, says, capsys):
    assert cli.main(["serve", *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvtier: error: ")]
    assert len(lines) == 1 and says in lines[0]


def test_no_small_packet_waits_for_an_acknowledgement():
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
