from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.needle import NULL, NeedleSpec, absent_keys, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache

LENGTH = 4096


@pytest.fixture(scope="module")
def model() -> Any:
    return build_needle_model()


@torch.inference_mode()
def ask_stock(model: Any, cache: DynamicCache, key: int, count: int) -> tuple[list[int], float]:
    token, got, worst = key, [], float("inf")
    for _ in range(count):
        best = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].topk(2)
        worst = min(worst, float(best.values[0] - best.values[1]))
        token = int(best.indices[0])
        got.append(token)
    cache.crop(-count)
    return got, worst


def test_stock_cache_recalls_every_needle_and_the_fast_builder_equals_it(model):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16)
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer, (k, v) in zip(cache.layers, build_needle_cache(model, ids), strict=True):
        assert torch.allclose(layer.keys[0], k, atol=1e-4) and torch.allclose(layer.values[0], v, atol=1e-5)
    answers = [ask_stock(model, cache, needle.key, 4) for needle in needles]
    assert [tuple(got) for got, _ in answers] == [needle.values for needle in needles]
    assert min(worst for _, worst in answers) == pytest.approx(22.5, abs=0.1)
    absent = absent_keys(NeedleSpec(), needles)
    assert [ask_stock(model, cache, key, 1)[0] for key in absent] == [[NULL]] * 4


@pytest.mark.parametrize("fast_fill", [True, False])
def test_needles_through_three_tiers_and_a_restart(model, tmp_path, fast_fill):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=1)
    kv_bytes = LENGTH * 2048
    config = PagerConfig(
        device_bytes=kv_bytes // 10,
        host_bytes=kv_bytes * 3 // 10,
        nvme_path=tmp_path / "s",
        nvme_bytes=2 * kv_bytes,
        backend="cpu",
    )

    def ask(session) -> float:
        worst, length = float("inf"), len(session.token_ids)
        for needle in needles[::4]:
            out = session.send([needle.key], SamplingParams(max_tokens=4, top2_margin=True))
            assert tuple(out.token_ids) == needle.values
            worst = min(worst, *out.margins)
            session.rollback(length)
        return worst

    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        if fast_fill:
            session.inject(ids, build_needle_cache(model, ids))
        else:
            session.send(ids, SamplingParams(max_tokens=0))
        assert ask(session) == pytest.approx(22.5, abs=0.1)
        session.park()
    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        assert session.num_computed == LENGTH
        assert ask(session) == pytest.approx(22.5, abs=0.1)
        assert engine.pager.counters.get("computed_tokens") == 4 * 4
        for tier in engine.pager.status()["tiers"].values():
            assert tier["peak_bytes"] <= tier["capacity_bytes"]


def test_a_flipped_byte_on_a_needles_path_is_computed_again_not_answered_wrongly(model, tmp_path):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=2)
    config = PagerConfig(
        device_bytes="1MiB", host_bytes="2MiB", nvme_path=tmp_path / "s", nvme_bytes="32MiB", backend="cpu"
    )
    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        session.inject(ids, build_needle_cache(model, ids))
        session.park()
    for segment in sorted((tmp_path / "s" / "blocks.zarr" / "g0").glob("c.*")):
        raw = bytearray(segment.read_bytes())
        raw[4096 + 70_000] ^= 16
        segment.write_bytes(raw)
    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        for needle in needles[::4]:
            out = session.send([needle.key], SamplingParams(max_tokens=4))
            assert tuple(out.token_ids) == needle.values
            session.rollback(LENGTH)
        corrupt = int(engine.pager.counters.get("corrupt_blocks"))
        assert corrupt >= 1
        assert engine.pager.counters.get("computed_tokens") <= corrupt * 64 + 4 * 5
