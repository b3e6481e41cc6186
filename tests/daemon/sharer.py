"""Run as a program: one process that shares a daemon, an engine or a prefix cache over the needle model.

Prints one JSON object: what it computed of the prompt, whether every needle came back, and from where its tokens came.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from kvtier import Engine, PagerConfig, PrefixCache, SamplingParams
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt

LENGTH, NEEDLES, SEED = 1024, 4, 7


def engine(address: str) -> dict[str, Any]:
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, NEEDLES, seed=SEED)
    config = PagerConfig(device_bytes=LENGTH * 2048 * 2, backend="cpu")
    with Engine.from_model(build_needle_model(), config, pager=address) as served:
        right, cached, computed = 0, [], []
        for needle in needles:
            (out,) = served.generate([[*ids, needle.key]], SamplingParams(max_tokens=4))
            right += tuple(out.token_ids) == needle.values
            cached.append(out.usage.cached_tokens)
            computed.append(out.usage.prompt_tokens - out.usage.cached_tokens)
        served.pager.drain(10.0)
        while not all_in_daemon(served.pager):
            served.pager.poll()
        return {"right": right, "cached": cached, "computed": computed, "block_size": served.pager.block_size}


def worker(address: str) -> dict[str, Any]:
    """A pipeline of its own around the model: the document from the cache, the question by a plain forward pass."""
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, NEEDLES, seed=SEED)
    model = build_needle_model()
    with PrefixCache.open(model=model, pager=address) as cache:
        right, loaded = 0, 0
        for needle in needles:
            prompt = [*ids, needle.key]
            loaded, past = cache.load(prompt)
            answer, new = [], prompt[loaded:]
            with torch.inference_mode():
                for _ in range(4):
                    logits = model(torch.tensor([new]), past_key_values=past, use_cache=True).logits
                    new = [int(logits[0, -1].argmax())]
                    answer += new
            right += tuple(answer) == needle.values
        return {"right": right, "cached": [loaded], "computed": [LENGTH + 1 - loaded], "block_size": cache.block_size}


def all_in_daemon(pager: Any) -> bool:
    d = pager._core.groups[0].directory
    return bool(d.nvme_valid[d.is_named & d.is_live].all())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"engine": engine, "worker": worker}[sys.argv[1]](sys.argv[2])))
