"""What the tests of the prefix cache share: caches that are checked before they are closed, and a model to run."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

from kvtier import PrefixCache

from .test_families import prompts, tiny

SIZES: dict[str, Any] = dict(device_bytes="8MiB", host_bytes="8MiB", nvme_bytes="64MiB", block_size=16)
DOCUMENT = prompts()[3]


class Caches:
    """Opens caches on one store, and checks each before it is closed."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.open_now: list[PrefixCache] = []

    def __call__(self, model: Any = None, **settings: Any) -> PrefixCache:
        if model is None and "layout" not in settings:
            model = tiny("llama")
        cache = PrefixCache.open(self.path, model, **(SIZES | settings))
        self.open_now.append(cache)
        return cache

    def close(self) -> None:
        while self.open_now:
            cache = self.open_now.pop()
            if not cache._is_closed:
                check(cache)
                cache.close()


def check(cache: PrefixCache) -> None:
    """The books agree, and no reference, pin or hold is left."""
    cache.flush()
    cache.pager.drain()
    cache.pager.check_integrity()
    core = cache.pager._core
    assert len(core.sequences) == len(cache._pins)
    for group in core.groups:
        assert not group.pages.pins.any() and not group.host.holds.any() and not group.awaited
        assert cache._pins or not group.directory.refs.any()


@torch.inference_mode()
def run(model: Any, past: Any, token_ids: list[int]) -> torch.Tensor:
    """Logits [vocab] behind the last of these tokens."""
    return model(torch.tensor([token_ids]), past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1]


def stock_past(model: Any) -> T.DynamicCache:
    return T.DynamicCache(config=model.config)


def greedy(model: Any, past: Any, token_ids: list[int], num_new: int = 8) -> list[int]:
    out: list[int] = []
    while len(out) < num_new:
        out.append(int(run(model, past, out[-1:] or token_ids).argmax()))
    return out
