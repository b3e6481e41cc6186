"""What a prefix cache promises: the same answers with it as without it, on every day and in every process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

from kvtier import KVLayout, PrefixCache
from kvtier.engine.past import KeepingSlidingLayer
from kvtier.tiers.errors import ConfigError, StoreMismatchError

from .prefix_rig import DOCUMENT, check, greedy, run, stock_past
from .test_families import FAMILIES, tiny

WINDOWED = ["mistral", "gemma2", "gemma3", "qwen2", "gpt_oss"]
QUESTIONS = [[7, 8, 9], [300, 4, 5, 6, 11], [1]]


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
