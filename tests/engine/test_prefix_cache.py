"""What a prefix cache promises: the same answers with it as without it, on every day and in every process."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

from kvtier import KVLayout, PrefixCache
from kvtier.engine.past import KeepingSlidingLayer
from kvtier.tiers.errors import ConfigError, StoreLockedError, StoreMismatchError, TierFullError

from .test_families import FAMILIES, prompts, tiny

SIZES: dict[str, Any] = dict(device_bytes="8MiB", host_bytes="8MiB", nvme_bytes="64MiB", block_size=16)
WINDOWED = ["mistral", "gemma2", "gemma3", "qwen2", "gpt_oss"]
DOCUMENT = prompts()[3]
QUESTIONS = [[7, 8, 9], [300, 4, 5, 6, 11], [1]]


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


@pytest.fixture
def caches(tmp_path) -> Iterator[Caches]:
    made = Caches(tmp_path / "store")
    yield made
    made.close()


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


# ---------------------------------------------------------------------- the same answers
@pytest.mark.parametrize("family", list(FAMILIES))
def test_going_on_from_the_store_equals_running_without_a_cache(family: str, caches):
    model = tiny(family)
    wanted = [greedy(model, stock_past(model), DOCUMENT + question) for question in QUESTIONS]
    logits = [run(model, stock_past(model), DOCUMENT + question) for question in QUESTIONS]
    with caches(model) as cache:
        assert cache.warm([DOCUMENT], chunk_tokens=40).computed_tokens == len(DOCUMENT)
        check(cache)
    with caches(model) as cache:
        for question, tokens, close in zip(QUESTIONS, wanted, logits, strict=True):
            n, past = cache.load(DOCUMENT + question)
            assert n == len(DOCUMENT)
            torch.testing.assert_close(run(model, past, question), close, rtol=1e-4, atol=2e-5)
            n, past = cache.load(DOCUMENT + question)
            assert greedy(model, past, question) == tokens
        check(cache)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "deepseek_v3"])
def test_loaded_bytes_are_the_stored_ones_and_so_are_the_logits(family: str, caches):
    model, past = tiny(family), stock_past(tiny(family))
    cache = caches(model)
    _, empty = cache.load(DOCUMENT)
    for use in (past, empty):
        run(model, use, DOCUMENT)
    cache.store(DOCUMENT, empty, durable=True)
    n, loaded = cache.load([*DOCUMENT, 5])
    assert n == len(DOCUMENT) and loaded.get_seq_length() == n
    for ours, theirs in zip(loaded.layers, past.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert torch.equal(run(model, loaded, [5]), run(model, past, [5]))
    assert loaded.get_mask_sizes(1, 0) == past.get_mask_sizes(1, 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_loaded_past_goes_into_generate(family: str, caches):
    model, cache = tiny(family), caches(tiny(family))
    prompt = torch.tensor([[*DOCUMENT, 9, 8]])
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
    wanted = model.generate(prompt, past_key_values=stock_past(model), **options)
    for expected in (0, 160):
        n, past = cache.load(prompt)
        assert n == expected
        out = model.generate(prompt, past_key_values=past, **options)
        assert torch.equal(out, wanted)
        cache.store(out[0, :-1], past)
    assert cache.match(wanted[0, :-1]) == wanted.shape[1] - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_comes_back_bit_for_bit(dtype: str, caches):
    layout = KVLayout(2, 2, 16, dtype=dtype)
    cache = caches(layout=layout, model_fingerprint="mine")
    past = torch.randn(2, 2, 2, 77, 16).to(getattr(torch, dtype))
    assert cache.store(range(77), past, durable=True) == 77
    n, back = cache.load(range(78))
    assert n == 77 and torch.equal(back, past) and back.dtype == past.dtype


# ---------------------------------------------------------------------- how much is loaded
def test_at_most_all_but_one_token_is_loaded_unless_asked_otherwise(caches):
    model, cache = tiny("llama"), caches()
    for length in (1, 15, 16, 17, 64, 100):
        ids = [length, *DOCUMENT[1:length]]
        n, past = cache.load(ids)
        assert n == 0 and past.get_seq_length() == 0
        run(model, past, ids)
        assert cache.store(ids, past) == length
        assert cache.load(ids)[0] == length - 1
        assert cache.load(ids, leave_last=False)[0] == length == cache.match(ids)
        assert cache.load([*ids, 3, 4])[0] == length
        assert cache.store(ids, past) == 0


def test_prompts_that_part_share_their_whole_blocks(caches):
    model, cache = tiny("llama"), caches()
    _, past = cache.load(DOCUMENT)
    run(model, past, DOCUMENT)
    cache.store(DOCUMENT, past)
    assert cache.load([*DOCUMENT[:100], 1, 2])[0] == 96
    _, past = cache.load([*DOCUMENT, *QUESTIONS[0]])
    run(model, past, QUESTIONS[0])
    assert cache.store([*DOCUMENT, *QUESTIONS[0]], past) == 3
    assert cache.load([*DOCUMENT, *QUESTIONS[1]])[0] == len(DOCUMENT)  # the document's own tail, not the question's


@pytest.mark.parametrize("family", WINDOWED)
def test_a_windowed_prefix_can_be_left_anywhere_in_its_last_block(family: str, caches):
    model, ids = tiny(family), DOCUMENT[:104]
    with caches(model) as cache:
        _, past = cache.load(ids)
        run(model, past, ids)
        cache.store(ids, past)
    with caches(model) as cache:
        for end in (104, 103, 100, 97, 96):
            wanted = run(model, stock_past(model), [*ids[:end], 3])
            n, past = cache.load([*ids[:end], 3])
            assert n == (104 if end == 104 else 96)
            torch.testing.assert_close(run(model, past, [*ids[n:end], 3]), wanted, rtol=1e-4, atol=2e-5)
            n, past = cache.load(ids[: end + 1])
            assert n == (103 if end >= 103 else 96)


def test_a_past_with_bare_windows_is_stored_where_it_suffices_and_refused_elsewhere(caches):
    model, cache = tiny("mistral"), caches(tiny("mistral"))
    past = stock_past(model)
    run(model, past, DOCUMENT[:20])
    assert cache.store(DOCUMENT[:20], past) == 20
    run(model, past, DOCUMENT[20:40])
    assert cache.store(DOCUMENT[:40], past) == 20  # the window still reaches back to what is stored
    run(model, past, DOCUMENT[40:90])
    with pytest.raises(ConfigError, match=r"dropped tokens 40 to 66.*past that load gives"):
        cache.store(DOCUMENT[:90], past)
    assert cache.match(DOCUMENT[:90]) == 40
    every = T.DynamicCache()  # without a config all layers keep all tokens
    run(model, every, DOCUMENT)
    assert cache.store(DOCUMENT, every) == len(DOCUMENT) - 40


def test_a_past_that_was_cropped_keeps_no_more_than_it_says(caches):
    model, cache = tiny("mistral"), caches(tiny("mistral"))
    _, past = cache.load(DOCUMENT)
    past.activate_past_recording()
    run(model, past, DOCUMENT[:60])
    past.crop(-10)
    assert isinstance(past.layers[0], KeepingSlidingLayer) and past.get_seq_length() == 50
    with pytest.raises(ConfigError, match="dropped tokens 0 to 26"):
        cache.store(DOCUMENT[:50], past)


# ---------------------------------------------------------------------- tensors, and other people's models
def test_tensors_of_a_model_are_its_caches(caches):
    model, cache = tiny("llama"), caches()
    n, past = cache.load(DOCUMENT, as_tensors=True)
    assert n == 0 and past.shape == (4, 2, 2, 0, 16)
    _, past = cache.load(DOCUMENT)
    run(model, past, DOCUMENT)
    cache.store(DOCUMENT, past)
    n, tensor = cache.load(DOCUMENT, as_tensors=True, leave_last=False)
    wanted = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in past.layers])
    assert n == len(DOCUMENT) and torch.equal(tensor, wanted)
    assert cache.store([1, *DOCUMENT[1:]], tensor) == n  # for other tokens: ours to give, not ours to judge


def test_layer_groups_and_widths_of_ones_own_model(caches):
    layouts = [
        KVLayout(2, 2, 16, dtype="float32", value_dim=8),
        KVLayout(3, 1, 8, dtype="float32", window=24, name="w"),
    ]
    ids = list(range(100))
    wide = (torch.randn(2, 2, 100, 16), torch.randn(2, 2, 100, 8))
    narrow = torch.randn(3, 2, 1, 100, 8)
    with caches(layout=layouts, model_fingerprint="mine, second training") as cache:
        assert cache.store(ids, [wide, narrow]) == 100
    cache = caches(layout=layouts, model_fingerprint="mine, second training")
    n, (pair, window) = cache.load([*ids, 7])
    assert n == 100 and torch.equal(pair[0], wide[0]) and torch.equal(pair[1], wide[1])
    assert torch.equal(window, narrow[..., 100 - 23 :, :])
    longer = [torch.cat([x, torch.randn_like(x[:, :, :10])], 2) for x in wide]
    assert cache.store([*ids, *range(200, 210)], [longer, torch.randn(3, 2, 1, 33, 8)]) == 10
    with pytest.raises(ConfigError, match="dropped tokens"):
        cache.store([*range(300, 400)], [wide, narrow[..., -23:, :]])


def test_models_and_layouts_do_not_mix(caches, tmp_path):
    layout = KVLayout(2, 2, 16, dtype="float32")
    caches(layout=layout, model_fingerprint="one").close()
    with pytest.raises(StoreMismatchError):
        caches(layout=layout, model_fingerprint="two")
    for arguments, message in (
        (dict(), "give either model="),
        (dict(model=tiny("llama"), layout=layout), "give either model="),
        (dict(layout=layout), "model_fingerprint"),
        (dict(layout=KVLayout(1, 1, 8, sinks=4, window=8), model_fingerprint="x"), "sinks=4"),
        (dict(model=tiny("llama"), namespace="a b"), "namespace"),
        (dict(model=tiny("llama"), hosts=3), "unknown setting 'hosts'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PrefixCache.open(tmp_path / "other", **arguments)


def test_namespaces_share_nothing(caches):
    model = tiny("llama")
    with caches(model, namespace="one") as cache:
        cache.warm([DOCUMENT])
    with caches(model, namespace="two") as cache:
        assert cache.match(DOCUMENT) == 0
    with caches(model, namespace="one") as cache:
        assert cache.match(DOCUMENT) == len(DOCUMENT)


# ---------------------------------------------------------------------- what is refused
def test_what_cannot_be_stored_says_which_field_and_what_would_do(caches):
    model, cache = tiny("llama"), caches()
    ids = DOCUMENT[:20]

    def filled(**kind: Any) -> T.DynamicCache:
        shape = dict(layers=4, batch=1, heads=2, tokens=20, width=16, dtype=torch.float32) | kind
        past = T.DynamicCache()
        for layer in range(shape["layers"]):
            states = torch.zeros(shape["batch"], shape["heads"], shape["tokens"], shape["width"], dtype=shape["dtype"])
            past.update(states, states, layer)
        return past

    uneven = filled()
    uneven.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 2)
    static = T.StaticCache(config=model.config, max_cache_len=32)
    run(model, static, ids)
    for past, message in (
        (filled(layers=3), r"past.layers: 3 layers, the model has 4"),
        (filled(batch=2), r"past.layers\[0\].keys: batch size 2.*batch_select_indices"),
        (filled(heads=4), r"4 heads of width 16, the model has 2 KV heads"),
        (filled(width=8), r"2 heads of width 8"),
        (filled(dtype=torch.float16), r"dtype torch.float16, the store holds torch.float32"),
        (filled(tokens=19), r"holds 19 tokens, token_ids names 20; store token_ids\[:19\]"),
        (T.DynamicCache(config=model.config), r"holds 0 tokens"),
        (uneven, r"20 to 21 tokens"),
        (static, r"StaticLayer; only a DynamicCache"),
        ("past", r"past=str"),
        (torch.zeros(4, 2, 2, 20, 8), r"K has shape \[4, 2, 20, 8\]; give \[4, 2, tokens, 16\]"),
        (torch.zeros(4, 3, 2, 20, 16), r"shape \[4, 3, 2, 20, 16\]; give \[4, 2, 2, tokens, 16\]"),
        (torch.zeros(4, 2, 2, 20, 16).half(), r"K has dtype torch.float16"),
        ((torch.zeros(4, 2, 20, 16), torch.zeros(4, 2, 19, 16)), r"V has shape \[4, 2, 19, 16\]"),
        ([1, 2], r"give a tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache.store(ids, past)
    assert cache.match(ids) == 0
    assert cache.store(ids, filled(tokens=30)) == 20  # more than is named is fine


def test_prompts_that_are_none_are_refused(caches):
    cache = caches()
    for ids, message in (
        ([], "at least one token"),
        ([3, -1], "from -1 to 3"),
        ([1 << 32], "token ids are 0 to"),
        (torch.zeros(2, 3, dtype=torch.long), r"shape \[2, 3\]"),
        (torch.zeros(3), "float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache.load(ids)
    assert cache.load(torch.tensor([[1, 2, 3]]))[0] == cache.load(np.array([1, 2, 3]))[0] == 0


def test_a_past_is_stored_only_for_the_prompt_that_it_was_loaded_for(caches):
    model, cache = tiny("llama"), caches()
    cache.warm([DOCUMENT])
    n, past = cache.load([*DOCUMENT, 5])
    run(model, past, [5])
    with pytest.raises(ConfigError, match=f"first {n} are not those"):
        cache.store([9, *DOCUMENT[1:], 5], past)
    assert cache.store([*DOCUMENT, 5], past) == 1


def test_a_closed_cache_says_so(caches):
    cache = caches()
    cache.close()
    cache.close()
    for call in (lambda: cache.load([1]), lambda: cache.match([1]), lambda: cache.pin([1], ttl=1.0)):
        with pytest.raises(ConfigError, match="closed"):
            call()


# ---------------------------------------------------------------------- warming, pinning, stats
def test_warming_computes_only_what_is_missing(caches):
    model = tiny("llama")
    documents = [DOCUMENT, DOCUMENT[:90], [*DOCUMENT, 4, 5], [9, *DOCUMENT]]
    seen: list[Any] = []
    with caches(model) as cache:
        done = cache.warm(documents, progress=seen.append, chunk_tokens=64)
        # the second shares whole blocks with the first (80 of 90), the third all of it, the fourth nothing
        assert done.computed_tokens == 161 + 10 + 2 + 162
        assert (done.documents, done.num_documents, done.tokens) == (4, 4, 161 + 90 + 163 + 162)
        assert [now.computed_tokens for now in seen[:4]] == [64, 128, 161, 161]
        assert cache.stats()["warmed_tokens"] == done.computed_tokens
    with caches(model) as cache:
        assert cache.warm(documents, progress=True).computed_tokens == 0
    with pytest.raises(ConfigError, match="opened by layout"):
        Caches(None)(layout=KVLayout(1, 1, 8), model_fingerprint="x", nvme_bytes=None).warm([[1]])


def test_a_pin_lasts_as_long_as_it_says(tmp_path):
    now_s = [100.0]
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    sizes = dict(device_bytes=8 * layout.block_bytes, host_bytes=8 * layout.block_bytes, nvme_bytes="1MiB")
    cache = PrefixCache.open(tmp_path / "s", layout=layout, model_fingerprint="x", clock=lambda: now_s[0], **sizes)

    def fill(start: int) -> None:
        ids = list(range(start, start + 64))
        cache.store(ids, torch.full((2, 2, 2, 64, 16), float(start)), durable=True)

    def flood() -> None:
        for start in range(10_000, 10_000 + 100 * 64, 64):
            fill(start)

    fill(0)
    fill(1000)
    assert cache.pin([*range(64), 5], ttl=30.0) == 64
    assert cache.stats()["pinned_prefixes"] == 1
    flood()
    assert cache.match(range(64)) == 64 and cache.match(range(1000, 1064)) < 64
    assert float(cache.load(range(65))[1].max()) == 0.0
    now_s[0] += 31.0
    flood()
    assert cache.match(range(64)) < 64 and cache.stats()["pinned_prefixes"] == 0
    with pytest.raises(ConfigError, match="ttl=0"):
        cache.pin([1], ttl=0)
    check(cache)
    cache.close()


def test_stats_say_what_was_asked_loaded_and_stored(caches):
    model = tiny("llama")
    with caches(model) as cache:
        cache.warm([DOCUMENT])
    cache = caches(model)
    _, past = cache.load([*DOCUMENT, 5])
    run(model, past, [5])
    cache.store([*DOCUMENT, 5], past)
    cache.flush()
    stats = cache.stats()
    assert stats["loads"] == 1 and stats["asked_tokens"] == 162 and stats["loaded_tokens"] == 161
    assert stats["loaded_bytes"] == 161 * sum(layout.token_bytes for layout in cache.layouts)
    assert stats["stores"] == 1 and stats["named_tokens"] == 162 and stats["stored_tokens"] == 1
    assert stats["tiers"]["nvme"]["hit_tokens"] == 161 and stats["load_seconds"] > 0
    assert stats["waiting_stores"] == stats["failed_stores"] == stats["lost_tokens"] == stats["pinned_prefixes"] == 0
    assert json.loads(json.dumps(stats)) == stats


# ---------------------------------------------------------------------- what survives
def test_a_store_that_was_durable_survives_a_kill(tmp_path):
    script = f"""
import os, torch
from kvtier import KVLayout, PrefixCache
cache = PrefixCache.open({str(tmp_path / "s")!r}, layout=KVLayout(2, 2, 16, dtype="float32"), model_fingerprint="x",
                         device_bytes="1MiB", host_bytes="1MiB", nvme_bytes="8MiB")
cache.store(range(50), torch.full((2, 2, 2, 50, 16), 3.0), durable=True)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    cache = Caches(tmp_path / "s")(layout=KVLayout(2, 2, 16, dtype="float32"), model_fingerprint="x")
    n, past = cache.load(range(51))
    assert n == 50 and (past == 3.0).all()
    check(cache)
    cache.close()


def test_what_was_stored_without_waiting_survives_close(caches):
    layout = KVLayout(2, 2, 16, dtype="float32")
    pasts = {start: torch.randn(2, 2, 2, 70, 16) for start in range(0, 20_000, 1000)}
    with caches(layout=layout, model_fingerprint="x") as cache:
        for start, past in pasts.items():
            cache.store(range(start, start + 70), past)
    cache = caches(layout=layout, model_fingerprint="x")
    for start, past in pasts.items():
        n, back = cache.load([*range(start, start + 70), 1])
        assert n == 70 and torch.equal(back, past)


def test_a_flipped_byte_shortens_the_prefix_and_never_changes_it(caches):
    from .test_engine import flip_a_byte_of_block

    model, wanted = tiny("llama"), stock_past(tiny("llama"))
    run(model, wanted, DOCUMENT)
    for slot in (9, 3, 0):
        with caches(model) as cache:
            cache.warm([DOCUMENT])
            layout = cache.layouts[0]
        flip_a_byte_of_block(caches.path, slot, layout)
        with caches(model) as cache:
            n, past = cache.load([*DOCUMENT, 5])
            assert n == slot * 16
            for ours, theirs in zip(past.layers, wanted.layers, strict=True):
                if n:
                    torch.testing.assert_close(ours.keys, theirs.keys[:, :, :n], rtol=1e-4, atol=1e-4)
            assert cache.stats()["lost_tokens"] > 0
            run(model, past, [*DOCUMENT[n:], 5])
            assert cache.store([*DOCUMENT, 5], past) > 0
            assert cache.load([*DOCUMENT, 6])[0] == len(DOCUMENT)
            check(cache)


def test_a_second_process_is_told_who_has_the_store(caches):
    layout = KVLayout(2, 2, 16, dtype="float32")
    caches(layout=layout, model_fingerprint="x")
    script = f"""
from kvtier import KVLayout, PrefixCache
from kvtier.tiers.errors import StoreLockedError
try:
    PrefixCache.open({str(caches.path)!r}, layout=KVLayout(2, 2, 16, dtype="float32"), model_fingerprint="x")
except StoreLockedError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert str(caches.path) in said
    with pytest.raises(StoreLockedError):
        PrefixCache.open(caches.path, layout=layout, model_fingerprint="x")


def test_a_full_store_says_so_to_whoever_waits_and_goes_on(tmp_path):
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    sizes = dict(device_bytes=8 * layout.block_bytes, host_bytes=8 * layout.block_bytes, nvme_bytes="64KiB")
    with PrefixCache.open(tmp_path / "s", layout=layout, model_fingerprint="x", **sizes) as cache:
        with pytest.raises(TierFullError):
            cache.store(range(1000), torch.zeros(2, 2, 2, 1000, 16), durable=True, timeout_s=2.0)
        assert cache.store(range(2000, 2030), torch.ones(2, 2, 2, 30, 16), durable=True) == 30
        assert cache.load(range(2000, 2040))[0] == 30
        cache.pager.check_integrity()


def test_memory_alone_is_a_cache_too():
    layout = KVLayout(2, 2, 16, dtype="float32")
    with PrefixCache.open(None, layout=layout, model_fingerprint="x", device_bytes="1MiB", host_bytes="1MiB") as cache:
        past = torch.randn(2, 2, 2, 45, 16)
        assert cache.store(range(45), past, durable=True) == 45
        assert torch.equal(cache.load(range(46))[1], past)
        check(cache)


# ---------------------------------------------------------------------- many at once
def test_threads_hammer_one_cache(caches, seed):
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    sizes = dict(device_bytes=24 * layout.block_bytes, host_bytes=16 * layout.block_bytes, nvme_bytes="4MiB")
    cache = caches(layout=layout, model_fingerprint="x", **sizes)
    wrong: list[Any] = []

    def value(ids: list[int]) -> torch.Tensor:
        running = torch.tensor(ids).cumsum(0).float()  # depends on the whole prefix
        return running[None, None, None, :, None].expand(2, 2, 2, -1, 16)

    def hammer(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        try:
            for _ in range(25):
                ids = [chance.randrange(4) * 100, *range(chance.randrange(1, 150))]
                n, past = cache.load([*ids, 1])
                if not torch.equal(past, value(ids)[:, :, :, :n]):
                    wrong.append((ids[0], len(ids), n))
                if chance.random() < 0.7:
                    cache.store(ids, value(ids).contiguous(), durable=chance.random() < 0.2)
                if chance.random() < 0.1:
                    cache.pin(ids, ttl=0.05)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    time.sleep(0.06)
    cache.match([1])  # ends the pins
    assert cache.stats()["failed_stores"] == 0


def test_close_waits_for_calls_that_run(caches):
    cache = caches()
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(_or_closed(lambda: [cache.load([1, 2, 3]) for _ in range(50)]))
    )
    thread.start()
    cache.close()
    thread.join()
    assert results


def _or_closed(call: Any) -> Any:
    try:
        return call()
    except ConfigError as error:
        assert "closed" in str(error)
        return error


def test_the_asyncio_twins_do_the_same(caches):
    model = tiny("llama")

    async def go() -> None:
        async with caches(model) as cache:
            done = await cache.awarm([DOCUMENT])
            assert done.computed_tokens == len(DOCUMENT)
            loads = await asyncio.gather(*(cache.aload([*DOCUMENT, *question]) for question in QUESTIONS))
            assert [n for n, _ in loads] == [len(DOCUMENT)] * 3
            run(model, loads[0][1], QUESTIONS[0])
            assert await cache.astore([*DOCUMENT, *QUESTIONS[0]], loads[0][1], durable=True) == 3
            assert await cache.amatch([*DOCUMENT, *QUESTIONS[0]]) == len(DOCUMENT) + 3
            assert await cache.apin(DOCUMENT, ttl=60.0) == len(DOCUMENT)
            await cache.aflush()
        assert cache._is_closed

    asyncio.run(go())


def test_a_cache_opened_and_used_in_inference_mode_works_outside_of_it(caches):
    model = tiny("mistral")
    with torch.inference_mode():
        cache = caches(model)
        cache.warm([DOCUMENT])
        n, past = cache.load([*DOCUMENT, 5])
    with torch.no_grad():
        model(torch.tensor([[5]]), past_key_values=past, use_cache=True)
    assert cache.store([*DOCUMENT, 5], past) == 1
    n, past = cache.load([*DOCUMENT, 5, 6])
    out = model(torch.tensor([[6]]), past_key_values=past, use_cache=True)  # with gradients
    assert n == len(DOCUMENT) + 1 and out.logits.requires_grad
    assert cache.store([*DOCUMENT, 5, 6], past) == 1
