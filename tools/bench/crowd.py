"""One life of the server in `kvtier bench sessions`, a process of its own: `python -m kvtier.tools.bench.crowd`.

It reads what to do from standard input and writes what came of it to standard output, one JSON object each.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvtier import Engine, PagerConfig, SamplingParams

from ...engine.conversations import Conversations
from ...engine.loop import EngineLoop
from ...engine.needle import Needle, NeedleSpec, build_needle_model, needle_prompt
from ...engine.sampling import Output, TokenLogprob
from .sessions import BLOCK_SIZE, DEVICE_PARTS, HOST_PARTS, VALUES, Result, Work

TOKEN_BYTES = 2048  # of KV, per token of the needle model in float32
CLIENTS = 16
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
    """All sessions of one life."""

    def __init__(self, work: Work) -> None:
        """Raises ValueError for a context that has no room for so many needles."""
        self._work, self._result = work, Result()
        self._model = build_needle_model(dtype=torch.float32)
        self._prompts = [
            needle_prompt(NeedleSpec(), work.context, work.needles, num_values=VALUES, seed=i)
            for i in range(work.sessions)
        ]
        self._lock = threading.Lock()

    def live(self) -> Result:
        with self._served() as chats:
            if self._work.is_first:
                self._each(lambda i: self._begin(chats, i), range(self._work.sessions))
            self._each(lambda i: self._ask(chats, i), range(self._work.sessions))
        return self._result

    # ------------------------------------------------------------------ inside
    @contextmanager
    def _served(self) -> Iterator[Conversations]:
        work, each = self._work, self._work.room * TOKEN_BYTES
        config = PagerConfig(
            device_bytes=DEVICE_PARTS * work.resident * each,
            host_bytes=HOST_PARTS * work.resident * each,
            nvme_path=work.path,
            nvme_bytes=2 * work.sessions * each + (64 << 20),
            backend="cpu",
        )
        with Engine.from_model(self._model, config, block_size=BLOCK_SIZE) as engine:
            loop = EngineLoop(engine)
            chats = Conversations(loop)
            try:
                yield chats
                if chats.park_all():
                    raise RuntimeError("a session could not be parked")
                self._measure_waste(engine, sum(one.computed_tokens for one in chats.list_sessions()))
            finally:
                chats.close()
                loop.close()
            engine.pager.check_integrity()
            self._result.computed += int(engine.pager.counters.get("computed_tokens"))

    def _begin(self, chats: Conversations, number: int) -> None:
        chats.create(f"s{number}")
        self._send(chats, number, self._prompts[number][0], SamplingParams(max_tokens=0))

    def _ask(self, chats: Conversations, number: int) -> None:
        for needle in self._prompts[number][1]:
            self._ask_one(chats, number, needle)

    def _ask_one(self, chats: Conversations, number: int, needle: Needle) -> None:
        answer = self._send(chats, number, [needle.key], SamplingParams(max_tokens=VALUES))
        with self._lock:
            self._result.asked += 1
            self._result.exact += tuple(answer) == tuple(needle.values)

    def _send(self, chats: Conversations, number: int, tokens: list[int], params: SamplingParams) -> list[int]:
        answer = _Answer()
        chats.send(f"s{number}", tokens, params, answer)
        answer.wait()
        with self._lock:  # the last token of an answer is computed with the next message
            self._result.wanted += len(tokens) + max(0, params.max_tokens - 1) + (params.max_tokens > 0)
        return answer.tokens

    def _each(self, do: Any, numbers: Iterable[int]) -> None:
        with ThreadPoolExecutor(CLIENTS) as clients:
            for _ in clients.map(do, numbers):
                pass

    def _measure_waste(self, engine: Engine, num_tokens: int) -> None:
        """Share of the token slots that the pager keeps for all sessions, which are parked, without a token in them."""
        kept_bytes = engine.pager.status()["tiers"]["nvme"]["pinned_bytes"]
        self._result.waste = 1 - num_tokens * TOKEN_BYTES / kept_bytes


if __name__ == "__main__":
    print(json.dumps(asdict(Crowd(Work(**json.load(sys.stdin))).live())))
