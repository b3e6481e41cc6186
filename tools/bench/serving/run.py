"""The run of `kvtier bench serve`: two servers, every case on both of them in turn, its rows and its panels.

One server has a store and reuses what it can. The other one, for the reference, has no store to write to and never
finds a prompt twice.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ....engine.needle_tokenizer import needle_tokenizer
from ..harness import Row
from . import chats, figures, trace
from .chart import Panel
from .client import Load, ask, connect
from .process import served

PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
OURS, OTHER = "with the cache", "nothing reused"


@dataclass(frozen=True, slots=True)
class ChatCase:
    """One point of the sweep, on both servers."""

    context: int
    concurrency: int
    ours: Load
    without: Load


class Bench:
    """One run; `rows` and `panels` are complete when `run` has ended."""

    def __init__(self, arguments: argparse.Namespace, contexts: list[int], concurrency: list[int]) -> None:
        self._arguments, self._contexts, self._concurrency = arguments, contexts, concurrency
        self._tokenizer: Any = needle_tokenizer()
        self._recorded = trace.read_trace(arguments.trace, arguments.requests)
        self.rows: list[Row] = []
        self.panels: list[Panel] = []

    def run(self, folder: Path) -> None:
        """Raises: ConfigError for a case that cannot be made, RuntimeError when a server does not start."""
        start_s = time.perf_counter()
        arguments = self._arguments
        sizes = ["--device-bytes", arguments.device_bytes, "--host-bytes", arguments.host_bytes]
        sizes += ["--block-size", str(arguments.block_size)]
        store = ["--store", str(folder / "store"), "--nvme-bytes", arguments.nvme_bytes]
        for context in self._contexts:
            self._make_chats("try", context)
        with ExitStack() as stack:
            url = stack.enter_context(served(folder / "ours", [*sizes, *store]))
            other_url = stack.enter_context(served(folder / "other", sizes))
            asyncio.run(self._measure(url, other_url))
        spent_s = time.perf_counter() - start_s
        self.rows.append(Row("all cases", "whole run", spent_s, "s", "nothing to compare with"))

    async def _measure(self, url: str, other_url: str) -> None:
        async with connect(url) as client, connect(other_url) as other:
            for one in (client, other):
                await _warm_up(one)
            if self._recorded:
                await self._replay(client, other)
            await self._chat(client, other)

    async def _replay(self, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        scale, speed = self._arguments.scale, self._arguments.speed
        prompts = trace.prompts_of(self._recorded, scale)
        words = [self._tokenizer.decode([prompt.answer_id]) for prompt in prompts]
        without = await trace.replay(other, prompts, words, speed, "trace")
        ours = await trace.replay(client, prompts, words, speed, None)
        case = f"trace: {len(prompts)} requests, {speed:g} times as fast, 1 token for {scale}"
        self.rows += figures.rows_of(case, ours, without)
        values = {OURS: ours, OTHER: without}
        self.panels.append(
            Panel(
                "Trace: time to first token",
                "percentile",
                "ms",
                [str(share) for share in PERCENTILES],
                {
                    name: [1e3 * figures.percentile(figures.first_token_s(load), share / 100) for share in PERCENTILES]
                    for name, load in values.items()
                },
                is_log=True,
            )
        )

    async def _chat(self, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        arguments = self._arguments
        for context in self._contexts:
            cases = []
            for concurrency in self._concurrency:
                name, length = f"c{context}-{concurrency}", arguments.answer
                without = await chats.talk(
                    other, self._make_chats(name, context), concurrency, length, has_sessions=False
                )
                ours = await chats.talk(client, self._make_chats(name, context), concurrency, length, has_sessions=True)
                case = (
                    f"chat: {context} tokens, {concurrency} at a time, {arguments.sessions} x {arguments.turns} turns"
                )
                self.rows += figures.rows_of(case, ours, without)
                cases.append(ChatCase(context, concurrency, ours, without))
            self.panels += _panels(cases)

    def _make_chats(self, name: str, context: int) -> list[chats.Chat]:
        arguments = self._arguments
        count, turns, length = arguments.sessions, arguments.turns, arguments.answer
        return chats.make_chats(self._tokenizer, name, count, context, turns, length)


def _panels(cases: list[ChatCase]) -> list[Panel]:
    context = cases[0].context
    at_a_time = [str(case.concurrency) for case in cases]

    def panel(title: str, unit: str, value: Any, is_log: bool = False) -> Panel:
        lines = {OURS: [value(case.ours) for case in cases], OTHER: [value(case.without) for case in cases]}
        return Panel(f"{title}, {context} tokens", "turns at a time", unit, at_a_time, lines, is_log)

    return [
        panel(
            "Later turns: TTFT p50", "ms", lambda load: 1e3 * figures.percentile(figures.first_token_s(load), 0.5), True
        ),
        panel(
            "Later turns: TTFT p99",
            "ms",
            lambda load: 1e3 * figures.percentile(figures.first_token_s(load), 0.99),
            True,
        ),
        panel("Chats: output", "tokens/s", figures.output_rate),
    ]


async def _warm_up(client: httpx.AsyncClient) -> None:
    """A process's first steps are slow ones, and belong to no case."""
    for number in range(3):
        prompt = [0, *range(600, 800)]
        await ask(client, "/v1/completions", {"prompt": prompt, "max_tokens": 8, "cache_salt": f"warm-{number}"})
