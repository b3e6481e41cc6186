"""Warming: run a model over what a prefix cache does not hold yet, in chunks, and store it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .persisting import STORE_TIMEOUT_S

if TYPE_CHECKING:
    from .prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class Warmed:
    """How far warming is: documents done, their tokens, and how many of those had to be computed."""

    documents: int
    num_documents: int
    tokens: int
    computed_tokens: int
    seconds: float


def warm(
    cache: PrefixCache,
    model: Any,
    documents: Sequence[list[int]],
    progress: bool | Callable[[Warmed], None],
    chunk_tokens: int,
) -> Warmed:
    """See PrefixCache.warm. One document at a time: its past is in memory until it is stored."""
    started_s, tokens, computed, stored = time.perf_counter(), 0, 0, list[Future[None]]()

    def so_far(done: int, now: int = 0) -> Warmed:
        return Warmed(done, len(documents), tokens, computed + now, time.perf_counter() - started_s)

    with _shown(progress) as show:
        for done, ids in enumerate(documents):
            num_computed = 0
            for num_computed in _compute(cache, model, ids, chunk_tokens, stored):
                show(so_far(done, num_computed))
            tokens, computed = tokens + len(ids), computed + num_computed
            show(so_far(done + 1))
        for one in stored:
            one.result(STORE_TIMEOUT_S)
    return so_far(len(documents))


@torch.inference_mode()
def _compute(
    cache: PrefixCache, model: Any, ids: list[int], chunk_tokens: int, stored: list[Future[None]]
) -> Iterator[int]:
    """Yields the number of tokens computed after every chunk; nothing when all of them are stored already.

    `stored` gets what ends when all of them are durable.
    """
    whole = cache._persist_whole(ids)
    if whole is not None:
        stored.append(whole)
        return
    first, past = cache.load(ids)
    device = next(model.parameters()).device
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for start in range(first, len(ids), chunk_tokens):
        chunk = torch.tensor([ids[start : start + chunk_tokens]], device=device)
        model(input_ids=chunk, past_key_values=past, use_cache=True, **keep)
        yield min(start + chunk_tokens, len(ids)) - first
    stored.append(cache._store(ids, past)[1])


@contextmanager
def _shown(progress: bool | Callable[[Warmed], None]) -> Iterator[Callable[[Warmed], None]]:
    """What is called after every chunk: the caller's own function, a line on stderr, or nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as screen:
        task = screen.add_task("warming", total=None)
        yield lambda now: screen.update(
            task,
            total=now.num_documents,
            completed=now.documents,
            description=f"warming: {now.computed_tokens:,} tokens computed",
        )
