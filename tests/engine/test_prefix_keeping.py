"""What a prefix cache keeps, for how long, and through what: warming, pins, kills, damage, many threads at once."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from kvtier import KVLayout, PrefixCache
from kvtier.pager import prefetching
from kvtier.tiers.errors import Busy, ConfigError, StoreLockedError

from .. import warm
from .prefix_rig import DOCUMENT, Caches, check, run, stock_past
from .test_families import tiny

WINDOWED = ["mistral", "gemma2", "gemma3", "qwen2", "gpt_oss"]
QUESTIONS = [[7, 8, 9], [300, 4, 5, 6, 11], [1]]


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


def test_a_released_prompt_makes_room_before_older_ones_and_a_prefetch_moves_what_is_stored(tmp_path):
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    sizes = dict(device_bytes=16 * layout.block_bytes, host_bytes=0, nvme_bytes=None)
    cache = PrefixCache.open(layout=layout, model_fingerprint="x", **sizes)

    def fill(start: int) -> None:
        cache.store(range(start, start + 64), torch.full((2, 2, 2, 64, 16), float(start)))
        cache.flush()

    fill(0)
    fill(1000)
    assert cache.release(torch.arange(1000, 1064)) == 64
    assert cache.prefetch(range(64)) == 0  # it is in the device tier
    for start in (2000, 3000, 4000):
        fill(start)
    assert cache.match(range(64)) == 64 and cache.match(range(1000, 1064)) == 0
    assert asyncio.run(cache.arelease(range(64))) == 64 and asyncio.run(cache.aprefetch([5])) == 0
    for verb in (cache.release, cache.prefetch):
        with pytest.raises(ConfigError, match="at least one token"):
            verb([])
    check(cache)
    cache.close()


def test_a_prefetch_brings_all_that_is_stored_of_a_prompt_though_it_takes_more_than_one_step(tmp_path, monkeypatch):
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    monkeypatch.setattr(prefetching, "IN_FLIGHT_BYTES", 3 * layout.block_bytes)
    sizes = dict(device_bytes=32 * layout.block_bytes, host_bytes=64 * layout.block_bytes, nvme_bytes="16MiB")
    cache = PrefixCache.open(tmp_path / "s", layout=layout, model_fingerprint="x", **sizes)
    cache.store(range(128), torch.zeros((2, 2, 2, 128, 16)))
    cache.flush()
    pager, core = cache._pager, cache._pager._core
    (group,), d = core.groups, core.groups[0].directory
    with core.lock:
        blocks = np.flatnonzero(d.nvme_valid & (d.refs == 0))
        group.drop_host_copies(blocks[d.host_slot[blocks] >= 0], "test")
        group.evict(blocks[d.page[blocks] >= 0], "test")
    assert pager.match(range(128)).nvme_tokens == 128
    assert cache.prefetch(range(128)) == 3
    for _ in range(16):
        pager.poll()
        pager.drain()
    assert pager.match(range(128)).device_tokens == 128
    cache.close()


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
    assert warm.heavy.run("-c", script).returncode == -9
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
    said = warm.heavy.run("-c", script).stdout
    assert str(caches.path) in said
    with pytest.raises(StoreLockedError):
        PrefixCache.open(caches.path, layout=layout, model_fingerprint="x")


def test_a_full_store_says_so_to_whoever_waits_and_goes_on(tmp_path):
    layout = KVLayout(2, 2, 16, dtype="float32", block_size=16)
    sizes = dict(device_bytes=8 * layout.block_bytes, host_bytes=8 * layout.block_bytes, nvme_bytes="64KiB")
    with PrefixCache.open(tmp_path / "s", layout=layout, model_fingerprint="x", **sizes) as cache:
        with pytest.raises(Busy):  # TierFullError, unless a copy was still under way
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
