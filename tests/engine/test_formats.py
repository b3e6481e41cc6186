"""Answers from tiers that keep fewer bits: the needle model at 4K, through an engine, a store and a restart; a prefix cache."""

from __future__ import annotations

import pytest
import torch

from kvtier import Engine, KVLayout, PagerConfig, PrefixCache, SamplingParams
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache

LENGTH, NEEDLES = 4096, 3
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=32, block_size=32, dtype="float32")


@pytest.mark.parametrize(
    ("host", "nvme", "least_margin"),
    [("int8", "int4", 20.0), ("fp8; layer 0: full", "int2; layer 0: full", 10.0)],
)
def test_every_needle_is_answered_from_fewer_bits_before_and_after_a_restart(tmp_path, host, nvme, least_margin):
    model, kv_bytes = build_needle_model(), LENGTH * 2048
    ids, needles = needle_prompt(NeedleSpec(), LENGTH, NEEDLES, seed=2)
    config = PagerConfig(
        device_bytes=kv_bytes // 5,
        host_bytes=kv_bytes // 10,
        nvme_path=tmp_path / "s",
        nvme_bytes=2 * kv_bytes,
        backend="cpu",
        host=host,
        nvme=nvme,
    )
    for life in range(2):
        with Engine.from_model(model, config, block_size=64) as engine:
            session = engine.session("a")
            if life == 0:
                session.inject(ids, build_needle_cache(model, ids))
            assert len(session.token_ids) == LENGTH
            for needle in needles:
                out = session.send([needle.key], SamplingParams(max_tokens=4, top2_margin=True))
                assert tuple(out.token_ids) == needle.values and min(out.margins) > least_margin
                session.rollback(LENGTH)
            session.park()
            assert engine.pager.counters.get("lost_tokens") == 0
            engine.pager.check_integrity()


def test_a_prefix_cache_gives_back_tensors_in_full_precision_near_what_was_stored(tmp_path):
    ids, tail = list(range(5 * 32 + 7)), slice(5 * 32, None)
    past = torch.randn(2, 2, 2, len(ids), 32, generator=torch.Generator().manual_seed(0))
    sizes = dict(device_bytes="1MiB", host_bytes="1MiB", nvme_bytes="4MiB", host="int8", nvme="int8", staging_bytes=0)
    for life in range(2):
        with PrefixCache.open(tmp_path / "s", layout=LAYOUT, model_fingerprint="mine", **sizes) as cache:
            if life == 0:
                assert cache.store(ids, past, durable=True) == len(ids)
            count, seen = cache.load(ids, as_tensors=True, leave_last=False)
            assert count == len(ids) and seen.dtype == torch.float32
            assert float((past - seen).abs().max()) < 0.05 and torch.equal(past[..., tail, :], seen[..., tail, :])
    assert not torch.equal(past, seen)
