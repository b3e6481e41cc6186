"""One request over HTTP, its answer streamed, and what its client saw: when each token came and what usage says."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT_S = 600.0
REFUSED = 429


@dataclass(slots=True)
class Answer:
    """Times are seconds from when it was asked. `status` is HTTP's, or 0 for one that broke off."""

    status: int = 0
    text: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    known_tokens: int = 0  # of the prompt, sent or answered before: what a cache that forgets nothing has
    is_right: bool = False
    turn: int = 0

    @property
    def token_s(self) -> float | None:
        """Between two tokens on average, when there were two."""
        return (self.last_s - self.first_s) / (self.completion_tokens - 1) if self.completion_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of a case, and how long it took."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def done(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 200]


def connect(url: str) -> httpx.AsyncClient:
    """As many connections as there are requests."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits)


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """Greedily, as a stream. What goes wrong is in the answer."""
    answer, start_s = Answer(), time.perf_counter()
    try:
        async with client.stream("POST", path, json=body | {"stream": True, "temperature": 0}) as reply:
            status = reply.status_code
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return answer
                _take(answer, event, time.perf_counter() - start_s)
    except httpx.HTTPError:
        return answer
    answer.status = status
    return answer


def _take(answer: Answer, event: dict[str, Any], now_s: float) -> None:
    for choice in event["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        if text or (choice["finish_reason"] is not None and not answer.first_s):  # an answer may have no text at all
            answer.first_s, answer.last_s = answer.first_s or now_s, now_s
            answer.text += text
    usage = event.get("usage")
    if usage is not None:
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        answer.recomputed_tokens = usage["prompt_tokens_details"]["recomputed_tokens"]
