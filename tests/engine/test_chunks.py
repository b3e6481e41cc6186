"""Documents in any order: keys at other positions are what the model would have made there, and the rest is measured."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
import transformers as T

from kvtier import KVLayout, PrefixCache
from kvtier.engine.chunks import KeyTurner, join_chunks, run
from kvtier.engine.needle import BOS, NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.past import discover_cache
from kvtier.tiers.errors import ConfigError, UnsupportedModelError

from .test_families import _BASE, tiny
from .test_scheduler import prompt_of

YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
MOVABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "yarn": ("Llama", dict(rope_parameters=YARN)),
    "partial": ("Phi", dict(partial_rotary_factor=0.5)),
    "nope": ("SmolLM3", dict(no_rope_layers=[1, 0, 1, 0])),
}


def make(name: str, **extra: Any) -> Any:
    family, options = MOVABLE[name]
    torch.manual_seed(0)
    config = getattr(T, f"{family}Config")(**(_BASE | options | extra))
    return getattr(T, f"{family}ForCausalLM")(config).eval()


def open_cache(model: Any, **settings: Any) -> PrefixCache:
    sizes: dict[str, Any] = dict(device_bytes="8MiB", host_bytes="16MiB", block_size=16)
    return PrefixCache.open(None, model, **(sizes | settings))


@pytest.mark.parametrize("name", [*MOVABLE, "deepseek_v3"])  # of MLA the cache holds the rotary channels apart
@torch.no_grad()
def test_turned_keys_are_those_of_the_other_position(name):
    """Chunks that see nothing before them either way: one token each, whose keys depend on the position alone."""
    model = make(name) if name in MOVABLE else tiny(name)
    turner = KeyTurner(model, discover_cache(model))
    for position in (1, 77, 2000):
        at = torch.tensor([[position]])
        late, early = T.DynamicCache(config=model.config), T.DynamicCache(config=model.config)
        model(torch.tensor([[5]]), position_ids=at, past_key_values=late, use_cache=True)
        run(model, early, [5])
        for index, (a, b) in enumerate(zip(early.layers, late.layers)):
            turned = turner.turn(index, a.keys, position)
            assert (turned - b.keys).abs().max() < 1e-3 * b.keys.abs().max()
    assert turner.turn(0, a.keys, 0) is a.keys


def test_the_first_document_is_exact_and_recomputing_all_of_the_others_too():
    model, documents = make("llama"), [prompt_of(n, n) for n in (40, 33, 21)]
    with open_cache(model) as cache:
        alone = cache.chunk_error(documents[:1], [1, 2, 3])
        assert alone.key_error < 1e-5 and alone.same_token == 1.0 and alone.max_kl_nats < 1e-6
        whole = cache.chunk_error(documents, [1, 2, 3], recompute_first=40)
        assert whole.key_error < 1e-5 and whole.max_kl_nats < 1e-6 and whole.recomputed_tokens == 33 + 21
        none, some = (cache.chunk_error(documents, [1, 2, 3], recompute_first=m) for m in (0, 16))
        assert 0 < some.key_error < none.key_error and none.reused_tokens == 94 and some.recomputed_tokens == 32
        assert "94 tokens reused, 0 recomputed" in str(none)


def test_documents_are_computed_once_whatever_their_order():
    model, documents = make("llama"), [prompt_of(n, n) for n in (40, 33, 21)]
    with open_cache(model) as cache:
        n, past = cache.load_chunks(documents)
        assert n == past.get_seq_length() == 94
        stored = cache.stats()["stored_tokens"]
        order = [documents[2], documents[0], documents[1]]
        m, moved = asyncio.run(cache.aload_chunks(order))
        assert m == 94 and cache.stats()["stored_tokens"] == stored
        assert torch.equal(moved.layers[0].values[:, :, :21], past.layers[0].values[:, :, 73:]), "values do not move"
        assert torch.equal(
            moved.layers[0].keys[:, :, :21], cache.load(documents[2], leave_last=False)[1].layers[0].keys
        )
        with pytest.raises(ConfigError, match="put together by load_chunks"):
            cache.store([t for chunk in order for t in chunk], moved)


def test_the_needle_model_finds_every_pair_in_any_order_of_its_documents():
    spec, model = NeedleSpec(), build_needle_model()
    ids, needles = needle_prompt(spec, 8 * 96 + 1, 8, num_values=3)
    documents = [ids[1 + i * 96 : 1 + (i + 1) * 96] for i in range(8)]
    wanted = {needle.key: needle.values for needle in needles}
    with open_cache(model, device_bytes="16MiB") as cache:
        for order in (range(8), [5, 2, 7, 0, 3, 6, 1, 4]):
            n, past = cache.load_chunks([[BOS], *(documents[i] for i in order)])
            assert n == len(ids)
            for key, values in wanted.items():
                assert ask(model, past, key, 3) == list(values)
        unmoved = join(model, cache, [[BOS], *documents], move=False)
        answers = [ask(model, unmoved, key, 3) == list(values) for key, values in wanted.items()]
        assert not all(answers), "without turning the keys the previous token is not where the model looks for it"


def join(model, cache, chunks, *, move: bool):
    turner = KeyTurner(model, discover_cache(model))
    if not move:
        turner._frequencies = [None] * len(turner._frequencies)
    return join_chunks(model, turner, chunks, lambda ids: cache.load(ids, leave_last=False)[1], 0)[1]


@torch.no_grad()
def ask(model, past, key: int, count: int) -> list[int]:
    answer, token = [], key
    for _ in range(count):
        token = int(run(model, past, [token])[-1].argmax())
        answer.append(token)
    past.crop(-count)
    return answer


def test_models_with_windows_are_refused_by_name():
    with open_cache(tiny("mistral")) as cache, pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        cache.load_chunks([[1, 2, 3], [4, 5]])


def test_models_that_know_no_rotation_are_refused():
    torch.manual_seed(0)
    plain = T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()
    with pytest.raises(UnsupportedModelError):
        KeyTurner(plain, discover_cache(plain))
    pairs = T.CohereForCausalLM(T.CohereConfig(**_BASE)).eval()  # turns neighbouring channels, not halves
    with pytest.raises(UnsupportedModelError, match="another way"):
        KeyTurner(pairs, discover_cache(pairs))


def test_what_cannot_be_asked_for_is_said():
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
    with (
        PrefixCache.open(None, layout=layout, model_fingerprint="x") as cache,
        pytest.raises(ConfigError, match="by layout"),
    ):
        cache.load_chunks([[1]])
    with open_cache(make("llama")) as cache:
        for chunks, options, said in (
            ([], {}, "at least one"),
            ([[]], {}, "at least one"),
            ([[1]], dict(recompute_first=-1), "recompute_first=-1"),
        ):
            with pytest.raises(ConfigError, match=said):
                cache.load_chunks(chunks, **options)
