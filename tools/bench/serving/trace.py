"""A recorded trace of block ids as prompts of the needle model, asked at their times: an open loop.

A trace has ids of 512-token blocks and no text. Each id becomes the same few tokens wherever it stands, so prompts share
what they shared when they were recorded. In each block lies a pair of symbols, its key given by the block's place in the
prompt and its value by its id; a prompt ends with the key of one of its blocks. The answer's first word is that block's
value: a block that is lost, or another one in its place, is a wrong answer.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from ....engine.needle import BOS, FIRST_SYMBOL, NeedleSpec
from ....tiers.errors import ConfigError
from .client import Answer, Load, ask

BLOCK_TOKENS = 512  # of the trace
LEAST_TOKENS = 4  # of a block of ours, also of a cut one: two tokens and a pair
_SPEC = NeedleSpec()
PAIRS = _SPEC.num_symbols // 2  # blocks of a prompt that have one


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a trace."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ready to be asked at `at_s`. The first `known_tokens` tokens also begin an earlier prompt."""

    at_s: float
    token_ids: list[int]
    max_tokens: int
    known_tokens: int
    answer_id: int


def read_trace(path: Path, count: int | None = None) -> list[Recorded]:
    """The first `count` requests. Raises: ConfigError."""
    try:
        with gzip.open(path, "rt") as file:
            lines = [json.loads(line) for line in file]
        recorded = [
            Recorded(one["timestamp"] / 1e3, one["input_length"], one["output_length"], tuple(one["hash_ids"]))
            for one in lines
        ]
        if not recorded or not all(one.block_ids for one in recorded):
            raise ValueError("there is no request in it, or one without blocks")
    except FileNotFoundError as error:
        raise ConfigError(f"--trace {str(path)!r} is not there; benchmarks/traces of the sources has one") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--trace {str(path)!r} is no gzip file of trace lines: {error}") from error
    return recorded[:count]


def prompts_of(recorded: Sequence[Recorded], scale: int) -> list[Prompt]:
    """With `scale` tokens of the trace to one of ours, in prompts and answers."""
    size = BLOCK_TOKENS // scale
    prompts, seen = [], set[int]()
    for number, one in enumerate(recorded):
        last = -(-(one.input_tokens - BLOCK_TOKENS * (len(one.block_ids) - 1)) // scale)
        last = max(LEAST_TOKENS, min(size, last))
        blocks = [_block(place, block_id, size) for place, block_id in enumerate(one.block_ids)]
        tokens = [token for block in blocks for token in block][: size * (len(blocks) - 1) + last]
        asked = random.Random(number).randrange(min(len(blocks), PAIRS))
        known = next((i for i, block_id in enumerate(one.block_ids) if block_id not in seen), len(blocks))
        seen.update(one.block_ids)
        prompts.append(
            Prompt(
                at_s=one.at_s,
                token_ids=[*tokens, FIRST_SYMBOL + asked],
                max_tokens=max(1, -(-one.output_tokens // scale)),
                known_tokens=min(len(tokens), known * size),
                answer_id=_value(one.block_ids[asked]),
            )
        )
    return prompts


async def replay(
    client: httpx.AsyncClient, prompts: Sequence[Prompt], words: Sequence[str], speed: float, salt: str | None
) -> Load:
    """Ask every prompt at its time, `speed` times as fast, whether or not earlier ones are answered.

    `words` are the right answers. With a `salt`, every prompt has one of its own and can reuse nothing.
    """
    start_s = time.perf_counter()

    async def one(number: int, prompt: Prompt) -> Answer:
        body = {"prompt": prompt.token_ids, "max_tokens": prompt.max_tokens}
        if salt is not None:
            body["cache_salt"] = f"{salt}-{number}"
        await asyncio.sleep((prompt.at_s - prompts[0].at_s) / speed - (time.perf_counter() - start_s))
        answer = await ask(client, "/v1/completions", body)
        answer.known_tokens, answer.is_right = prompt.known_tokens, answer.text.split()[:1] == [words[number]]
        return answer

    answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    return Load(answers, time.perf_counter() - start_s)


def _block(place: int, block_id: int, size: int) -> list[int]:
    picker = random.Random(block_id)
    tokens = [picker.randrange(FIRST_SYMBOL + _SPEC.num_symbols, _SPEC.vocab_size) for _ in range(size)]
    if place == 0:
        tokens[0] = BOS
    if place < PAIRS:
        tokens[1:3] = FIRST_SYMBOL + place, _value(block_id)
    return tokens


def _value(block_id: int) -> int:
    return FIRST_SYMBOL + PAIRS + block_id % PAIRS
