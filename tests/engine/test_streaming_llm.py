"""Texts without end: a window and sinks give what a masked model gives, in memory that does not grow."""

from __future__ import annotations

import pytest
import torch

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.hf import StreamingWindow, discover
from kvtier.tiers.errors import ConfigError

from .test_families import tiny
from .test_scheduler import BLOCK, check_end, prompt_of


@torch.inference_mode()
def masked(model, tokens: list[int], new_tokens: int, window: int, sinks: int) -> list[int]:
    """Greedy, everything computed again for each token, under the mask that the mode promises."""
    out = list(tokens)
    for _ in range(new_tokens):
        n = len(out)
        q, k = torch.arange(n)[:, None], torch.arange(n)[None]
        visible = (k <= q) & ((q - k < window) | (k < sinks))
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        logits = model(torch.tensor([out]), attention_mask=mask, use_cache=False).logits[0, -1]
        out.append(int(logits.argmax()))
    return out[len(tokens) :]


def open_streaming(model, blocks: int, streaming: StreamingWindow, **options) -> Engine:
    size = sum(layout.block_bytes for layout in discover(model).layouts(BLOCK))
    config = PagerConfig(device_bytes=blocks * size, host_bytes=40 * size, backend="cpu", staging_bytes=0)
    return Engine.from_model(model, config, block_size=BLOCK, streaming=streaming, **options)


@pytest.mark.parametrize(("window", "sinks"), [(48, 4), (33, 0), (20, 17)])
def test_a_window_with_sinks_is_what_the_mask_says(window, sinks):
    model = tiny("llama")
    prompts = [prompt_of(150, 1), prompt_of(20, 2), prompt_of(64, 3)]
    wanted = [masked(model, prompt, 20, window, sinks) for prompt in prompts]
    with open_streaming(model, 30, StreamingWindow(window, sinks), max_batch_tokens=48) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=20))
        assert [out.token_ids for out in outputs] == wanted
        check_end(engine)


def test_memory_does_not_grow_with_the_text():
    model = tiny("llama")
    with open_streaming(model, 24, StreamingWindow(64, 4), max_batch_tokens=128) as engine:
        session = engine.session("endless")
        held = []
        for turn in range(12):
            session.send(prompt_of(400, turn), SamplingParams(max_tokens=4))
            group = engine.pager._core.groups[0]
            held.append(int((group.directory.refs > 0).sum()))
        assert session.num_computed > 4800 and max(held) <= 64 // BLOCK + 3
        session.close()
        check_end(engine)


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="window=0"):
        StreamingWindow(0)
