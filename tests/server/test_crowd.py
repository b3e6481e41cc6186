"""Clients that come, hang up and ask for anything, all at once on a small device tier: who stays gets what is theirs."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from ..engine.test_crowd import resident_bytes
from .running import WAIT_S, WORDS, serving

CLIENTS, ROUNDS = 24, 6


class Refused(Exception):
    """A 429; `after_s` is when to come again."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(str(reply))
        self.after_s = float(reply.headers["retry-after"])


class Client:
    """One of the crowd, with its own mind."""

    def __init__(self, server, seed: int, wanted: dict[str, str]) -> None:
        self.server, self.random, self.wanted = server, random.Random(seed), wanted
        self.http = httpx.Client(base_url=server.url, timeout=WAIT_S)
        self.name = f"c{seed}"
        self.met: Counter[str] = Counter()
        self.queued_s: list[float] = []

    def run(self) -> None:
        self.post("/v1/sessions", {"id": self.name})
        for _ in range(ROUNDS):
            self.once()
        self.http.close()

    def run_until(self, over: threading.Event) -> None:
        """Where there are more clients than may be at work: who is refused comes again."""
        while not over.is_set():
            try:
                self.once()
            except Refused as refused:
                self.met["refused"] += 1
                over.wait(refused.after_s * self.random.random())
        self.http.close()

    def once(self) -> None:
        do = self.random.choice([self.ask, self.ask, self.leave, self.talk, self.draw, self.hang_up_early, self.pin])
        do()
        self.met[do.__name__] += 1

    def post(self, path: str, body: dict, method: str = "POST") -> httpx.Response:
        """Raises: Refused."""
        reply = self.http.request(method, path, json=body)
        if reply.status_code == 429:
            raise Refused(reply)
        return reply

    def ask(self) -> None:
        text = self.random.choice(list(self.wanted))
        reply = self.post("/v1/completions", {"prompt": text, "max_tokens": 6, "temperature": 0}).json()
        assert reply["choices"][0]["text"].rstrip("\ufffd") == self.wanted[text]
        self.queued_s.append(reply["usage"]["kvtier"]["ledger"].get("queued", 0.0))

    def leave(self) -> None:
        body = {"prompt": self.random.choice(WORDS), "max_tokens": 1200, "stream": True, "n": self.random.randint(1, 3)}
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code == 429:
                raise Refused(reply)
            assert reply.status_code == 200
            for _ in zip(range(self.random.randint(0, 5)), reply.iter_lines()):
                pass

    def talk(self) -> None:
        body = {"messages": [{"role": "user", "content": self.random.choice(WORDS)}], "max_tokens": 5}
        reply = self.post(f"/v1/sessions/{self.name}/messages", body)
        assert reply.status_code in (200, 400, 404), reply.text
        if reply.status_code == 404:
            assert self.post("/v1/sessions", {"id": self.name}).status_code == 200
        elif reply.status_code == 400:  # the session has become too long
            assert self.post(f"/v1/sessions/{self.name}", {}, "DELETE").status_code == 200
        elif self.random.random() < 0.3:
            assert self.post(f"/v1/sessions/{self.name}/park", {}).status_code == 200

    def draw(self) -> None:
        body = {"prompt": WORDS, "max_tokens": 4, "n": 2, "temperature": 1.2, "stop": ["o", "fox"], "logprobs": 2}
        choices = self.post("/v1/completions", body).json()["choices"]
        assert len(choices) == 18 and not [one for one in choices if "o" in one["text"]]

    def hang_up_early(self) -> None:
        """Before there is an answer, or before the request is whole."""
        host, port = urlsplit(self.server.url).netloc.split(":")
        body = b'{"prompt": "the fox", "max_tokens": 1200}'
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall((head % len(body) + body)[: self.random.choice([10, 90, 130, 1000])])

    def pin(self) -> None:
        body = {"prompts": [self.random.choice(list(self.wanted)) * 2], "ttl_s": 0.2}
        assert self.http.post("/v1/cache/pins", json=body).status_code in (200, 400, 429)  # there may be no room


def test_a_crowd_leaves_nothing_behind_and_everybody_hears_their_own(model, tokenizer, tmp_path, seed):
    texts = [" ".join(WORDS[i:] * 3) for i in range(6)]
    with serving(model, tokenizer, blocks=100, host=200, nvme_path=tmp_path / "store", keep_alive_s=0.05) as server:
        wanted = {text: server.stock_text(tokenizer(text)["input_ids"], 6) for text in texts}
        clients = [Client(server, seed * 1000 + i, wanted) for i in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(Client.run, clients))
        server.check_end()
        for one in clients:
            assert server.http.delete(f"/v1/sessions/{one.name}").status_code == 200


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_crowd_over_http_for_half_an_hour(model, tokenizer, tmp_path, seed, capsys):
    """More clients than may be at work, and more than the device tier holds: nobody hangs, and memory stays flat."""
    seconds = float(os.environ.get("KVTIER_SOAK_S", "1800"))
    texts = [" ".join(WORDS[i:] * 3) for i in range(6)]
    options = dict(
        blocks=100, host=200, nvme_path=tmp_path / "store", keep_alive_s=0.05, max_concurrency=32, idle_s=1.0
    )
    with serving(model, tokenizer, **options) as server:
        wanted = {text: server.stock_text(tokenizer(text)["input_ids"], 6) for text in texts}
        clients = [Client(server, seed * 1000 + i, wanted) for i in range(64)]
        over, sizes = threading.Event(), []
        with ThreadPoolExecutor(len(clients)) as pool:
            running = [pool.submit(one.run_until, over) for one in clients]
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s and not any(one.done() for one in running):
                time.sleep(min(1.0, seconds / 30))
                sizes.append(resident_bytes())
            over.set()
            for one in running:
                one.result(2 * WAIT_S)  # nobody hangs
        server.check_end()
        for one in clients:
            assert server.http.delete(f"/v1/sessions/{one.name}").status_code in (200, 404)
    met = sum((one.met for one in clients), Counter())
    queued = sorted(wait_s for one in clients for wait_s in one.queued_s)
    queued_p99_s, third = queued[int(0.99 * (len(queued) - 1))], len(sizes) // 3
    early, late = max(sizes[third : 2 * third]), max(sizes[2 * third :])
    with capsys.disabled():
        print(dict(met), f"queued p99 {queued_p99_s:.2f} s, memory {early / 1e6:.0f} MB, then {late / 1e6:.0f} MB")
    for what in ("ask", "leave", "talk", "draw", "hang_up_early", "pin", "refused"):
        assert met[what] > 0, f"nobody met: {what}; {met}"
    assert queued_p99_s < WAIT_S and late < 1.05 * early
