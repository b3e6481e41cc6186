"""Rows of `kvtier bench decode` for packed pages: one decode step with pages in fewer bits, against full precision.

Same model, same random K/V, same engine and pager; only `device` differs. All of it fits in the device tier: this is what
reading fewer bytes gains and decoding them costs. The engines take turns, a request of one token each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from ...tiers.layout import FULL
from .harness import Row, interleave, medians

ONE = SamplingParams(max_tokens=1)


def packed_rows(
    model: Any, cache: Sequence[Any], formats: Sequence[str], token_bytes: int, vocab: int, rounds: int
) -> list[Row]:
    """Tokens per second per format. `cache`: K and V [kv_heads, tokens, dim] per layer; their copies take their bytes again."""
    context = int(cache[0][0].shape[1])
    with ExitStack() as opened:
        steps = {}
        for name in (FULL, *formats):
            room = 2 * token_bytes * (context + rounds + 4096)
            config = PagerConfig(device_bytes=room, host_bytes=0, backend="auto", device=name)
            session = opened.enter_context(Engine.from_model(model, config)).session("bench")
            session.inject([i % vocab for i in range(context)], cache)
            session.send([1], ONE)
            steps[name] = partial(session.send, [], ONE)
        seconds = medians(interleave(steps, rounds))
    full = 1 / seconds.pop(FULL)
    case = f"{context} tokens, {str(model.dtype).removeprefix('torch.')}"
    return [
        Row(case, f"decode, device={name}", 1 / s, "tokens/s", "full precision", full, 1 / s / full, rounds)
        for name, s in seconds.items()
    ]
