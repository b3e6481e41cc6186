"""The batched rows of `kvtier bench decode`: several answers at once, against transformers' continuous batching.

Both sides get the same prompts and keep the time of every token. The rate counts from when every answer has begun to
when the first one ends, so prompts and set-up are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvtier import Engine, PagerConfig, SamplingParams

from .harness import Row

NEW_TOKENS = 32
Rate = Callable[[], float]


def batched_row(make_model: Callable[[], Any], batch: int, context: int, vocab: int, token_bytes: int) -> Row:
    """Tokens per second of so many answers together. The peer is left out, with the reason, where it does not run."""
    import transformers

    prompts = [[(7 * i + 3 * j + 1) % vocab for j in range(context)] for i in range(batch)]
    ours = _ours(make_model(), prompts, token_bytes)
    name = f"transformers {transformers.__version__} generate_batch"
    case, metric = f"{context} tokens, float32, {batch} answers at once", "decode together"
    try:
        theirs = _theirs(make_model(), prompts, transformers)
    except Exception as error:  # whatever a peer raises is a reason, not our failure
        return Row(case, metric, ours, "tokens/s", f"{name} does not run here: {type(error).__name__}: {error}")
    return Row(case, metric, ours, "tokens/s", name, theirs, ours / theirs)


def _ours(model: Any, prompts: list[list[int]], token_bytes: int) -> float:
    room = 2 * len(prompts) * (len(prompts[0]) + NEW_TOKENS + 512) * token_bytes
    with Engine.from_model(model, PagerConfig(device_bytes=room, host_bytes=0, backend="cpu")) as engine:
        requests = [engine.request(prompt, SamplingParams(max_tokens=NEW_TOKENS)) for prompt in prompts]
        times: list[list[float]] = []
        for request in requests:
            own: list[float] = []
            times.append(own)
            request.on_token = lambda _, token, own=own: own.append(time.perf_counter())
        engine.run(requests)
    return _rate(times)


def _theirs(model: Any, prompts: list[list[int]], transformers: Any) -> float:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    kind = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    blocks = sum(-(-(len(prompt) + NEW_TOKENS) // 256) + 1 for prompt in prompts)
    config = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=2048, use_cuda_graph=False)
    found = model.generate_batch(
        inputs=prompts,
        generation_config=kind,
        continuous_batching_config=config,
        record_timestamps=True,
        warmup=False,
        progress_bar=False,
    )
    return _rate([output.timestamps for output in found.values()])


def _rate(times: list[list[float]]) -> float:
    """Tokens per second while all answers run."""
    start_s, end_s = max(own[0] for own in times), min(own[-1] for own in times)
    count = sum(sum(start_s < at <= end_s for at in own) for own in times)
    if end_s <= start_s:
        raise RuntimeError("the answers did not run together")
    return count / (end_s - start_s)
