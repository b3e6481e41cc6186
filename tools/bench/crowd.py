"""The run of `kvtier bench sessions`: sessions, their clients, and the lives of the server that they outlive."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvtier import Engine, PagerConfig, SamplingParams

from ...engine.conversations import Conversations
from ...engine.loop import EngineLoop
from ...engine.needle import Needle, NeedleSpec, build_needle_model, needle_prompt
from ...engine.sampling import Output, TokenLogprob
from ...tiers.errors import ConfigError
from .harness import Row

TOKEN_BYTES = 2048  # of KV, per token of the needle model in float32
BLOCK_SIZE, VALUES, CLIENTS = 256, 4, 16
TURN_TIMEOUT_S = 600.0


@dataclass
class _Answer:
    """A listener that waits."""

    tokens: list[int] = field(default_factory=list)
    output: Output | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def on_token(self, index: int, token: int, logprob: TokenLogprob | None) -> bool:
        self.tokens.append(token)
        return False

    def on_end(self, index: int, output: Output, error: BaseException | None) -> None:
        self.output, self.error = output, error
        self.done.set()

    def wait(self) -> Output:
        if not self.done.wait(TURN_TIMEOUT_S):
            raise RuntimeError(f"a turn took more than {TURN_TIMEOUT_S} s")
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output


class Crowd:
    """All sessions of one run."""

    def __init__(self, arguments: argparse.Namespace, path: Path) -> None:
        self._arguments, self._path = arguments, path
        self._model = build_needle_model(dtype=torch.float32)
        try:
            self._prompts = [
                needle_prompt(NeedleSpec(), arguments.context, arguments.needles, num_values=VALUES, seed=i)
                for i in range(arguments.sessions)
            ]
        except ValueError as error:
            raise ConfigError(f"--context {arguments.context}, --needles {arguments.needles}: {error}") from error
        self._room = arguments.context + arguments.turns * arguments.needles * (VALUES + 1) + BLOCK_SIZE
        self._computed = self._wanted = 0.0
        self._waste = 0.0
        self._asked = self._exact = 0
        self._lock = threading.Lock()

    def rows(self) -> list[Row]:
        arguments = self._arguments
        started_s = time.perf_counter()
        for turn in range(arguments.turns):
            with self._served() as chats:
                if turn == 0:
                    self._each(lambda i: self._begin(chats, i), range(arguments.sessions))
                self._each(lambda i: self._ask(chats, i), range(arguments.sessions))
                self._measure_waste(chats)
        case = f"{arguments.sessions} sessions of {arguments.context} tokens, {arguments.resident} resident"
        budget = self._memory_bytes()
        contiguous = max(1, budget // (self._room * TOKEN_BYTES))
        rows = [
            Row(case, "needles exact", self._exact, "", "asked", self._asked, self._exact / self._asked, 1),
            Row(
                case,
                "tokens computed",
                self._computed,
                "",
                "new tokens",
                self._wanted,
                self._wanted / self._computed,
                1,
            ),
            Row(
                case,
                "sessions in device and host memory",
                arguments.sessions,
                "",
                f"contiguous caches of {self._room} tokens in as much",
                contiguous,
                arguments.sessions / contiguous,
                1,
            ),
            Row(case, "token slots unused", 100 * self._waste, "%", "aim: at most", 4.0, None, 1),
            Row(case, "whole run", time.perf_counter() - started_s, "s", "nothing to compare with", None, None, 1),
        ]
        return rows

    # ------------------------------------------------------------------ a life of the server
    @contextmanager
    def _served(self) -> Iterator[Conversations]:
        arguments = self._arguments
        each = self._room * TOKEN_BYTES
        config = PagerConfig(
            device_bytes=arguments.resident * each,
            host_bytes=2 * arguments.resident * each,
            nvme_path=self._path,
            nvme_bytes=2 * arguments.sessions * each + (64 << 20),
            backend="cpu",
        )
        with Engine.from_model(self._model, config, block_size=BLOCK_SIZE) as engine:
            loop = EngineLoop(engine)
            chats = Conversations(loop)
            try:
                yield chats
                if chats.park_all():
                    raise RuntimeError("a session could not be parked")
            finally:
                chats.close()
                loop.close()
            engine.pager.check_integrity()
            self._computed += engine.pager.counters.get("computed_tokens")

    def _begin(self, chats: Conversations, number: int) -> None:
        chats.create(f"s{number}")
        self._send(chats, number, self._prompts[number][0], SamplingParams(max_tokens=0))

    def _ask(self, chats: Conversations, number: int) -> None:
        for needle in self._prompts[number][1]:
            self._ask_one(chats, number, needle)

    def _ask_one(self, chats: Conversations, number: int, needle: Needle) -> None:
        answer = self._send(chats, number, [needle.key], SamplingParams(max_tokens=VALUES))
        with self._lock:
            self._asked += 1
            self._exact += tuple(answer) == tuple(needle.values)

    def _send(self, chats: Conversations, number: int, tokens: list[int], params: SamplingParams) -> list[int]:
        answer = _Answer()
        chats.send(f"s{number}", tokens, params, answer)
        answer.wait()
        with self._lock:  # the last token of an answer is computed with the next message
            self._wanted += len(tokens) + max(0, params.max_tokens - 1) + (params.max_tokens > 0)
        return answer.tokens

    def _each(self, do: Any, numbers: Iterable[int]) -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            for _ in clients.map(do, numbers):
                pass

    # ------------------------------------------------------------------ memory
    def _memory_bytes(self) -> int:
        """Of the device and the host tier together."""
        return 3 * self._arguments.resident * self._room * TOKEN_BYTES

    def _measure_waste(self, chats: Conversations) -> None:
        """Share of the token slots of all sessions' blocks that hold no token."""
        tokens = [one.computed_tokens for one in chats.list_sessions()]
        slots = sum(-(-count // BLOCK_SIZE) * BLOCK_SIZE for count in tokens)
        self._waste = 1 - sum(tokens) / slots
