"""The needle model on a CUDA device, its cache through device, host and disk and a restart; needs a GPU."""

from __future__ import annotations

import pytest
import torch

from kvtier import Engine, PagerConfig, PrefixCache, SamplingParams
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache, stock_cache
from kvtier.tiers.backends import cuda_missing
from kvtier.tiers.errors import UnpackableError

MISSING = cuda_missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no usable CUDA: {MISSING}")]
LENGTH = 8192
DEVICE, BACKEND = "cuda", "cuda"


@pytest.mark.parametrize("is_fast", [True, False], ids=["built", "prefilled"])
def test_needles_come_back_from_every_tier_and_after_a_restart(is_fast, tmp_path):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=3)
    model = build_needle_model()
    cache = [(k.to(DEVICE), v.to(DEVICE)) for k, v in build_needle_cache(model, ids)]
    model = model.to(DEVICE)
    kv_bytes = LENGTH * 2048
    config = PagerConfig(
        device_bytes=kv_bytes // 10,
        host_bytes=kv_bytes * 3 // 10,
        nvme_path=tmp_path / "s",
        nvme_bytes=2 * kv_bytes,
        backend=BACKEND,
        require_pinned=BACKEND == "cuda",
    )

    def ask(session) -> float:
        worst, length = float("inf"), len(session.token_ids)
        for needle in needles:
            out = session.send([needle.key], SamplingParams(max_tokens=4, top2_margin=True))
            assert tuple(out.token_ids) == needle.values
            worst = min(worst, *out.margins)
            session.rollback(length)
        return worst

    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        if is_fast:
            session.inject(ids, cache)
        else:
            session.send(ids, SamplingParams(max_tokens=0))
        assert ask(session) == pytest.approx(22.5, abs=0.5)
        session.park()
    with Engine.from_model(model, config, block_size=64) as engine:
        session = engine.session("needles")
        assert session.num_computed == LENGTH
        assert ask(session) == pytest.approx(22.5, abs=0.5)


def test_a_whole_context_on_the_device_answers_as_well():
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=4)
    model = build_needle_model(dtype=torch.bfloat16).to(DEVICE)
    config = PagerConfig(device_bytes="64MiB", host_bytes="64MiB", backend=BACKEND)
    with Engine.from_model(model, config) as engine:
        outputs = engine.generate([[*ids, needle.key] for needle in needles[:4]], SamplingParams(max_tokens=4))
    assert [tuple(out.token_ids) for out in outputs] == [needle.values for needle in needles[:4]]


@pytest.mark.parametrize("device", ["int8", "int4; layers 0 heads 1: full"])
def test_packed_pages_answer_read_whole_and_selected(device):
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=5)
    model = build_needle_model(dtype=torch.bfloat16).to(DEVICE)
    sizes = dict(device_bytes="64MiB", host_bytes="64MiB", selection_bytes="8MiB", staging_bytes="4MiB")
    with Engine.from_model(model, PagerConfig(**sizes, backend=BACKEND, device=device), block_size=64) as engine:
        for attention in ("full", "select:8"):
            params = SamplingParams(max_tokens=4, attention=attention)
            outputs = engine.generate([[*ids, needle.key] for needle in needles[:4]], params)
            assert [tuple(out.token_ids) for out in outputs] == [needle.values for needle in needles[:4]]
        assert all(out.selection.steps == 3 for out in outputs)


def test_formats_of_the_tiers_below_answer_from_every_tier_and_after_a_restart(tmp_path):
    """Packed on the stream that copies out, unpacked on the one that copies in."""
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, 16, seed=6)
    model = build_needle_model()
    cache = [(k.to(DEVICE), v.to(DEVICE)) for k, v in build_needle_cache(model, ids)]
    model, kv_bytes = model.to(DEVICE), LENGTH * 2048
    sizes = dict(
        device_bytes=kv_bytes // 4, host_bytes=kv_bytes // 5, nvme_path=tmp_path / "s", nvme_bytes=2 * kv_bytes
    )
    config = PagerConfig(**sizes, host="int8", nvme="int4", backend=BACKEND)
    for is_first in (True, False):
        with Engine.from_model(model, config, block_size=64) as engine:
            session = engine.session("needles")
            if is_first:
                session.inject(ids, cache)
            assert session.num_computed == LENGTH
            for needle in needles:
                out = session.send([needle.key], SamplingParams(max_tokens=4, top2_margin=True))
                assert tuple(out.token_ids) == needle.values and 15 < min(out.margins) < 24
                session.rollback(LENGTH)
            session.park()


def test_values_that_no_format_holds_are_refused_before_they_have_a_name():
    ids, _ = needle_prompt(NeedleSpec(), 512, 4, seed=7)
    model = build_needle_model()
    cache = [(k.to(DEVICE), v.to(DEVICE)) for k, v in build_needle_cache(model, ids)]
    cache[1][1][0, 300, 5] = float("nan")
    config = PagerConfig(device_bytes="16MiB", host_bytes="16MiB", backend=BACKEND, device="int4")
    with Engine.from_model(model.to(DEVICE), config, block_size=64) as engine:
        session = engine.session("bad")
        with pytest.raises(UnpackableError, match="device='int4': layer 1"):
            session.inject(ids, cache)
        assert session.num_computed == 0 and not engine.pager._core.groups[0].directory.by_key


def test_a_prefix_cache_packs_and_unpacks_on_the_device(tmp_path):
    ids, _ = needle_prompt(NeedleSpec(), 1000, 4, seed=6)
    model = build_needle_model()
    cache = build_needle_cache(model, ids)
    model = model.to(DEVICE)
    past = stock_cache([(k.to(DEVICE), v.to(DEVICE)) for k, v in cache])
    settings = dict(device="int8; layers 0: full", nvme_bytes="64MiB")
    for day in range(2):
        with PrefixCache.open(tmp_path / "s", model, **settings) as kept:
            assert kept.store(ids, past, durable=True) == (0 if day else len(ids))
            n, loaded = kept.load([*ids, 5])
            assert n == len(ids) and loaded.layers[1].keys.device.type == DEVICE
            for layer, (k, v), most in zip(loaded.layers, cache, (0.0, 1 / 200), strict=True):
                for found, exact in ((layer.keys[0].cpu(), k), (layer.values[0].cpu(), v)):
                    assert (found - exact).abs().max() <= most * exact.abs().max()
