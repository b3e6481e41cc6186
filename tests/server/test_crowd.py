"""Clients that come, hang up and ask for anything, all at once on a small device tier: who stays gets what is theirs."""

from __future__ import annotations

import random
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx

from .running import WAIT_S, WORDS, serving

CLIENTS, ROUNDS = 24, 6


class Client:
    """One of the crowd, with its own mind."""

    def __init__(self, server, seed: int, wanted: dict[str, str]) -> None:
        self.server, self.random, self.wanted = server, random.Random(seed), wanted
        self.http = httpx.Client(base_url=server.url, timeout=WAIT_S)
        self.name = f"c{seed}"

    def run(self) -> None:
        self.http.post("/v1/sessions", json={"id": self.name})
        for _ in range(ROUNDS):
            self.random.choice([self.ask, self.ask, self.leave, self.talk, self.draw, self.hang_up_early, self.pin])()
        self.http.close()

    def ask(self) -> None:
        text = self.random.choice(list(self.wanted))
        reply = self.http.post("/v1/completions", json={"prompt": text, "max_tokens": 6, "temperature": 0})
        assert reply.json()["choices"][0]["text"].rstrip("\ufffd") == self.wanted[text]

    def leave(self) -> None:
        body = {"prompt": self.random.choice(WORDS), "max_tokens": 1200, "stream": True, "n": self.random.randint(1, 3)}
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            for _ in zip(range(self.random.randint(0, 5)), reply.iter_lines()):
                pass

    def talk(self) -> None:
        body = {"messages": [{"role": "user", "content": self.random.choice(WORDS)}], "max_tokens": 5}
        reply = self.http.post(f"/v1/sessions/{self.name}/messages", json=body)
        assert reply.status_code in (200, 400), reply.text  # the session may have become too long
        if self.random.random() < 0.3:
            assert self.http.post(f"/v1/sessions/{self.name}/park").status_code == 200

    def draw(self) -> None:
        body = {"prompt": WORDS, "max_tokens": 4, "n": 2, "temperature": 1.2, "stop": ["o", "fox"], "logprobs": 2}
        choices = self.http.post("/v1/completions", json=body).json()["choices"]
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
        assert self.http.post("/v1/cache/pins", json=body).status_code in (200, 400, 429)


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
