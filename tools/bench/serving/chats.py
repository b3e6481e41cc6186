"""Many chats over several turns, so many at a time: a closed loop. Each turn asks for a needle of the chat's context.

With sessions, a turn sends what is new. Without, it sends the whole chat, as clients of a plain server do, under a salt
of its own: nothing of it can be reused.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ....engine.needle import FIRST_SYMBOL, NeedleSpec, needle_prompt
from ....tiers.errors import ConfigError
from .client import Answer, Load, ask

NEW_TOKENS = 32  # of a message after the first


@dataclass(slots=True)
class Chat:
    """What one user says turn by turn, the right answers, and what was said so far."""

    name: str
    messages: Sequence[str]
    wanted: Sequence[str]
    turn: int = 0
    num_tokens: int = 0
    history: list[dict[str, str]] = field(default_factory=list)


def make_chats(tokenizer: Any, name: str, count: int, context: int, turns: int, max_tokens: int) -> list[Chat]:
    """A first message of `context` tokens and the first question, then NEW_TOKENS tokens with a question each.

    Raises: ConfigError when so many needles do not fit the context.
    """
    spec, chats = NeedleSpec(), []
    for number in range(count):
        picker = random.Random(f"{name}-{number}")
        try:
            tokens, needles = needle_prompt(spec, context, turns, num_values=max_tokens, seed=picker.getrandbits(32))
        except ValueError as error:
            raise ConfigError(f"--contexts {context}, --turns {turns}, --answer {max_tokens}: {error}") from error
        filler = range(FIRST_SYMBOL + spec.num_symbols, spec.vocab_size)
        said = [tokens[1:]] + [picker.choices(filler, k=NEW_TOKENS - 1) for _ in needles[1:]]
        messages = [tokenizer.decode([*words, needle.key]) for words, needle in zip(said, needles)]
        chats.append(Chat(f"{name}-{number}", messages, [tokenizer.decode(needle.values) for needle in needles]))
    return chats


async def talk(
    client: httpx.AsyncClient, chats: Sequence[Chat], concurrency: int, max_tokens: int, *, has_sessions: bool
) -> Load:
    """Every turn of every chat, `concurrency` turns at a time; a chat's next turn waits for its answer."""
    if has_sessions:
        for chat in chats:
            (await client.post("/v1/sessions", json={"id": chat.name})).raise_for_status()
    due: asyncio.Queue[Chat] = asyncio.Queue()
    for chat in chats:
        due.put_nowait(chat)
    answers: list[Answer] = []
    start_s = time.perf_counter()

    async def user() -> None:
        while not due.empty():
            chat = due.get_nowait()
            answers.append(await _turn(client, chat, max_tokens, has_sessions))
            if chat.turn < len(chat.messages):
                due.put_nowait(chat)

    await asyncio.gather(*(user() for _ in range(concurrency)))
    spent_s = time.perf_counter() - start_s
    if has_sessions:
        for chat in chats:
            (await client.delete(f"/v1/sessions/{chat.name}")).raise_for_status()
    return Load(answers, spent_s)


async def _turn(client: httpx.AsyncClient, chat: Chat, max_tokens: int, has_session: bool) -> Answer:
    turn, chat.turn = chat.turn, chat.turn + 1
    message = {"role": "user", "content": chat.messages[turn]}
    if has_session:
        body = {"messages": [message], "max_tokens": max_tokens}
        answer = await ask(client, f"/v1/sessions/{chat.name}/messages", body)
    else:
        chat.history.append(message)
        body = {"messages": chat.history, "max_tokens": max_tokens, "cache_salt": f"{chat.name}-{turn}"}
        answer = await ask(client, "/v1/chat/completions", body)
        chat.history.append({"role": "assistant", "content": answer.text})
    answer.turn, answer.is_right = turn, answer.text.split() == chat.wanted[turn].split()
    if answer.status == 200:
        answer.known_tokens, chat.num_tokens = chat.num_tokens, answer.prompt_tokens + answer.completion_tokens
    return answer
