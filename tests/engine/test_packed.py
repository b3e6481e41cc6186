"""Packed pages in the device tier: a step sees what its pages hold, whatever happened to the sequence before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvtier import Engine, KVLayout, Pager, PagerConfig, SamplingParams
from kvtier.engine.attention import typed
from kvtier.engine.hf import StreamingWindow, discover
from kvtier.kernels.conversion import dequantize_blocks
from kvtier.kernels.views import layer_views
from kvtier.tiers.errors import ConfigError, StoreMismatchError, UnpackableError
from kvtier.tiers.formats import page_format

from .test_families import tiny
from .test_scheduler import prompt_of

BLOCK, CHUNK = 32, 80
ONE = SamplingParams(max_tokens=1, top2_margin=True)
_SETTINGS = ("host", "nvme", "staging_bytes", "selection_bytes", "residual", "nvme_bytes")
_DEFAULT = {"residual": 0}


@pytest.fixture(params=[0, 70], ids=["the block being filled", "and 70 tokens before it"], autouse=True)
def residual(request):
    """What is kept in full precision."""
    _DEFAULT["residual"] = request.param
    yield request.param
    _DEFAULT["residual"] = 0


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def open_packed(model, device="int8", blocks=40, path=None, **options) -> Engine:
    size = sum(layout.block_bytes for layout in discover(model).layouts(BLOCK))
    sizes = dict(device_bytes=blocks * size, host_bytes=40 * size, nvme_path=path, staging_bytes=0)
    sizes |= _DEFAULT if device != "full" else {}
    options = {"block_size": BLOCK, "max_batch_tokens": CHUNK} | options
    below = {key: options.pop(key) for key in _SETTINGS if key in options}
    sizes["nvme_bytes"] = None if path is None else 400 * size
    config = PagerConfig(**(sizes | below), backend="cpu", device=device)
    return Engine.from_model(model, config, **options)


def pages_of(engine, seq: int, group: int) -> np.ndarray:
    """Of all its blocks there, which must be resident."""
    held = engine.pager._core.groups[group]
    ids = engine.pager._core.sequences[seq].tables[group].ids
    return np.where(ids >= 0, held.directory.page[ids], -1)


def seen(engine, seq: int) -> DynamicCache:
    """K and V of a sequence of one full-attention group as its next step sees them: unpacked blocks, then the tail."""
    pager, cache = engine.pager, DynamicCache()
    packed, end, last = pager.layouts[0], pager.num_computed(seq), pages_of(engine, seq, 1)
    fmt, whole = page_format(packed), 1 + int(np.flatnonzero(last < 0).max(initial=-1))
    if not pager.layouts[1].num_kept:
        assert whole == end // BLOCK
    ids = pages_of(engine, seq, 0)[:whole]
    assert (last[:whole] == -1).all() and len(last) == -(-end // BLOCK) and whole <= end // BLOCK
    for layer in range(packed.num_layers):
        rows = typed(pager.device_rows(0), torch.uint8)[:, layer * fmt.layer_bytes : (layer + 1) * fmt.layer_bytes]
        kv = [torch.empty(len(ids), 2, BLOCK, packed.head_dim) for _ in "kv"]
        dequantize_blocks(rows, ids, *kv, np.arange(len(ids)), fmt)
        new = layer_views(typed(pager.device_rows(1), torch.float32), layer, 2, BLOCK, packed.head_dim)
        both = [
            torch.cat([x.transpose(0, 1).flatten(1, 2), *(y[p] for p in last[whole:].tolist())], 1)[:, :end]
            for x, y in zip(kv, new, strict=True)
        ]
        cache.update(both[0][None], both[1][None], layer)
    return cache


@torch.inference_mode()
def check_next(engine, session, token: int) -> None:
    """The next step's answer is that of transformers on what the pages hold."""
    cache, before = seen(engine, session.seq), engine.model.config._attn_implementation
    tokens = [*session.token_ids[session.num_computed :], token]  # the last answer is not computed yet
    engine.model.set_attn_implementation("eager")
    try:
        logits = engine.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1]
    finally:
        engine.model.set_attn_implementation(before)
    best = logits.topk(2)
    out = session.send([token], ONE)
    assert out.token_ids == [int(best.indices[0])]
    assert out.margins[0] == pytest.approx(float(best.values[0] - best.values[1]), abs=2e-3)


@pytest.mark.parametrize(
    "device", ["int8", "int4/32", *(pytest.param(name, marks=pytest.mark.soak) for name in ("fp8", "int2", "hack8"))]
)
def test_a_step_sees_its_packed_blocks_and_its_tail(llama, device):
    with open_packed(llama, device) as engine:

        @settings(max_examples=3, deadline=None, derandomize=True, database=None)
        @given(n=st.one_of(st.integers(1, 200), st.sampled_from([BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1])))
        def run(n):
            session = engine.session(f"s{n}")
            if not session.token_ids:
                session.send(prompt_of(n, n), SamplingParams(max_tokens=0))
            for token in (5, 9):
                if device == "hack8":  # rounds q and p too: near, not the same
                    session.send([token], ONE)
                else:
                    check_next(engine, session, token)
            engine.pager.check_integrity()
            session.close()

        run()
        assert engine.pager.status()["tiers"]["device"]["formats"][1] == "full"


def test_what_is_packed_is_what_full_precision_held(llama, residual):
    """Layer 0's K/V do not depend on attention, so both engines make the same."""
    prompt = prompt_of(5 * BLOCK + 3, 1)
    with open_packed(llama) as engine:
        session = engine.session("a")
        session.send(prompt, SamplingParams(max_tokens=0))
        layer = seen(engine, session.seq).layers[0]
        found = [layer.keys[0], layer.values[0]]
        pages = engine.pager._core.groups[1].pages
        kept = -(-residual // BLOCK)
        assert len(pages) - pages.num_free == 1 + kept  # nothing but the tail, not even as cache
    with open_packed(llama, "full") as engine:
        session = engine.session("a")
        session.send(prompt, SamplingParams(max_tokens=0))
        ids = pages_of(engine, session.seq, 0)
        views = layer_views(typed(engine.pager.device_rows(0), torch.float32), 0, 2, BLOCK, 16)
        for mine, pool in zip(found, views, strict=True):
            exact = pool[ids].transpose(0, 1).flatten(1, 2)[:, : len(prompt)]
            first = (5 - kept) * BLOCK
            assert torch.equal(mine[:, first:], exact[:, first:])
            error = (mine - exact).abs()[:, :first].max()
            assert 0 < error < exact.abs().max() / 127


def test_bytes_stay_as_they_are_over_ten_rounds_of_park_and_resume(llama, tmp_path, residual):
    with open_packed(llama, "int4", path=tmp_path / "s") as engine:
        session = engine.session("a")
        session.send(prompt_of(4 * BLOCK + 11, 2), SamplingParams(max_tokens=0))
        length, rows = len(session.token_ids), typed(engine.pager.device_rows(0), torch.uint8)
        found = []
        for _ in range(10):
            margin = session.send([7], ONE).margins[0]
            session.rollback(length)
            found.append((margin, rows[pages_of(engine, session.seq, 0)].numpy().tobytes()))
            session.park()
            for group in engine.pager._core.groups:  # nothing stays above disk
                with engine.pager._core.lock:
                    group.drop_host_copies(group.host.block[group.host.state == 2], "test")
            session.resume()
            assert session.num_computed == length
        assert len(set(found)) == 1
        ways = [row["labels"].get("direction") for row in engine.pager.counters.to_list()]
        assert "nvme_to_host" in ways
        engine.pager.check_integrity()
    with open_packed(llama, "int4", path=tmp_path / "s") as engine:  # the last park's
        session = engine.session("a")
        assert session.num_computed == length
        held = engine.pager._core.sequences[session.seq].tables[1].ids >= 0
        assert held.sum() == 1 + -(-residual // BLOCK), "what was in full precision is again"
        session.send([3], SamplingParams(max_tokens=0))  # brings its blocks up
        check_next(engine, session, 7)
    for change in (dict(device="full"), dict(device="int4", residual=2 * residual + 1)):
        with pytest.raises(StoreMismatchError):
            open_packed(llama, path=tmp_path / "s", **change)


def test_forks_write_to_tails_of_their_own(llama):
    with open_packed(llama) as engine:
        session = engine.session("a")
        session.send(prompt_of(2 * BLOCK + 27, 3), SamplingParams(max_tokens=0))
        other = session.fork()[0]
        for number in range(4):  # past the end of the block
            check_next(engine, session, 3 + number)
            check_next(engine, other, 30 + number)
        assert session.num_computed == other.num_computed > 3 * BLOCK
        engine.pager.check_integrity()


@pytest.mark.parametrize(
    ("back", "kept"), [(3 * BLOCK - 5, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK), (3 * BLOCK + 2, 3 * BLOCK + 2)]
)
def test_what_is_rolled_back_into_a_packed_block_is_computed_from_its_start(llama, residual, back, kept):
    """Where its tail still holds the block, nothing is."""
    with open_packed(llama) as engine:
        session = engine.session("a")
        session.send(prompt_of(3 * BLOCK + 6, 4), SamplingParams(max_tokens=0))
        session.rollback(back)
        assert session.num_computed == (back if residual else kept) and len(session.token_ids) == back
        session.send([3], SamplingParams(max_tokens=0))
        check_next(engine, session, 8)
        engine.pager.check_integrity()


def test_a_context_larger_than_the_device_tier_streams_packed(llama, residual):
    prompt, answers = prompt_of(40 * BLOCK + 9, 5), []
    small = dict(blocks=20 if residual else 16, staging_bytes=1 << 16)
    for options, way in ((dict(blocks=60), None), (small, "attended"), (small, "moved")):
        with open_packed(llama, **options) as engine:
            engine.pager.backend.reads_host = way == "attended"
            session = engine.session("a")
            session.send(prompt, SamplingParams(max_tokens=0))
            out = session.send([4], SamplingParams(max_tokens=4, top2_margin=True))
            answers.append((out.token_ids, out.margins))
            for done in ("attended", "moved"):
                streamed = engine.pager.counters.get(f"{done}_slices", reason="stream")
                assert bool(streamed) == (done == way)
            engine.pager.check_integrity()
    for tokens, margins in answers[1:]:
        assert tokens == answers[0][0] and margins == pytest.approx(answers[0][1], abs=0.05)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", pytest.param("gemma2", marks=pytest.mark.soak)])
def test_families_answer_near_full_precision(family):
    """Windows, softcaps, sink logits, and K and V of different widths."""
    model, prompts, found = tiny(family), [prompt_of(n, n) for n in (20, 70, 150)], []
    for device in ("full", "int8"):
        with open_packed(model, device, blocks=60) as engine:
            outputs = engine.generate(prompts, SamplingParams(max_tokens=3, top2_margin=True))
            found.append([out.margins[0] for out in outputs])
            engine.pager.check_integrity()
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_a_window_begins_where_it_does_whatever_is_kept():
    model, found = tiny("mistral", sliding_window=100), []
    for options in (dict(device="full"), dict(device="int8", residual=0), dict(device="int8", residual=BLOCK)):
        with open_packed(model, blocks=60, **options) as engine:
            margins = []
            for n in (90, 4 * BLOCK - 3, 250):
                session = engine.session(f"s{n}")
                session.send(prompt_of(n, n), SamplingParams(max_tokens=0))
                margins += [session.send([token], ONE).margins[0] for token in range(5, 11)]
            found.append(margins)
            engine.pager.check_integrity()
    for margins in found[1:]:
        assert margins == pytest.approx(found[0], abs=0.05)


def test_a_window_with_sinks_lies_packed_too(llama):
    prompts, found = [prompt_of(n, n) for n in (10, 40, 150)], []
    for device in ("full", "int8"):
        for options in (dict(streaming=StreamingWindow(40, 4)), dict(attention="window:40,sinks=4")):
            with open_packed(llama, device, **options) as engine:
                outputs = engine.generate(prompts, SamplingParams(max_tokens=3, top2_margin=True))
                found.append([out.margins[0] for out in outputs])
                engine.pager.check_integrity()
    for other in found[1:]:
        assert found[0] == pytest.approx(other, abs=0.05)


def test_drafts_end_before_their_block_does(llama):
    prompt = [5, 6, 7, 8] * 10
    with open_packed(llama) as engine:
        plain = engine.generate([prompt], SamplingParams(max_tokens=36))[0]
        computed = engine.pager.counters.get("computed_tokens")
        drafted = engine.generate([prompt], SamplingParams(max_tokens=36, speculation="ngram"))[0]
        assert drafted.token_ids == plain.token_ids and drafted.usage.drafted_tokens > 0
        wrong = drafted.usage.drafted_tokens - drafted.usage.accepted_tokens
        again = engine.pager.counters.get("computed_tokens") - computed  # a rejected draft costs itself and no block
        assert again <= computed + wrong


def test_values_that_no_format_holds_end_their_own_request(llama):
    weight = llama.model.embed_tokens.weight
    kept = weight[0].clone()  # no prompt has it
    with open_packed(llama) as engine, torch.no_grad():
        try:
            weight[0] = float("nan")
            good, bad = (engine.request([*prompt_of(BLOCK, 6), t], SamplingParams(max_tokens=BLOCK)) for t in (5, 0))
            with pytest.raises(UnpackableError, match="device='int8'"):
                engine.run([good, bad])
            assert good.output.finish_reason == "length" and len(good.output.token_ids) == BLOCK
        finally:
            weight[0] = kept
        engine.drop(good)
        engine.drop(bad)
        engine.pager.check_integrity()


def test_who_drafts_goes_on_beside_values_that_no_format_holds(llama):
    weight, prompt = llama.model.embed_tokens.weight, [5, 6, 7, 8] * 8 + [5]
    kept = weight[0].clone()
    with open_packed(llama) as engine:
        plain = engine.generate([prompt], SamplingParams(max_tokens=BLOCK))[0]
    with open_packed(llama) as engine, torch.no_grad():
        try:
            weight[0] = float("nan")
            drafts = engine.request(prompt, SamplingParams(max_tokens=BLOCK, speculation="ngram"))
            bad = engine.request([*prompt_of(BLOCK, 6), 0], SamplingParams(max_tokens=2 * BLOCK))
            with pytest.raises(UnpackableError):
                engine.run([drafts, bad])
        finally:
            weight[0] = kept
        assert drafts.output.usage.drafted_tokens > 0
        assert drafts.output.token_ids == plain.token_ids
        engine.drop(drafts)
        engine.drop(bad)
        engine.pager.check_integrity()


def test_a_page_whose_block_is_not_whole_holds_nothing_of_another(llama, residual):
    with open_packed(llama, blocks=16 if residual else 12) as engine:
        for number in range(4):  # every page has been used
            session = engine.session(f"s{number}")
            session.send(prompt_of(5 * BLOCK + 5, 10 + number), SamplingParams(max_tokens=0))
            page = pages_of(engine, session.seq, 0)[-1]
            assert not typed(engine.pager.device_rows(0), torch.uint8)[page].any()
            session.close(released=True)


def test_a_long_prompt_leaves_room_for_others(llama):
    """Its tail is as long as a step, not as the prompt: it need not run alone."""
    with open_packed(llama, blocks=60) as engine:
        long, short = (engine.request(prompt_of(n, n), SamplingParams(max_tokens=2)) for n in (20 * BLOCK, 5))
        engine.run([long, short])
        assert not long.is_large
        engine.drop(long)
        engine.drop(short)


def test_a_lost_block_costs_one_block(llama):
    prompt = prompt_of(5 * BLOCK + 7, 8)
    with open_packed(llama) as engine:
        engine.generate([prompt], ONE)
        group, computed = engine.pager._core.groups[0], engine.pager.counters.get("computed_tokens")
        (lost,) = [b for b in group.directory.by_key.values() if group.directory.depth[b] == 1]
        with engine.pager._core.lock:
            group._drop_dirty(np.array([lost]), "test")
        engine.generate([prompt], ONE)
        assert engine.pager.counters.get("computed_tokens") == computed + BLOCK + 7
        engine.pager.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(device="int8; layer 9: full"), "no layer 9"),
        (dict(device="int8; heads 2: full"), "no KV head 2"),
        (dict(host="int4"), "host='int4/64' below device='int8/64'"),
        (dict(device={"other": "int8"}), "no layer group 'other'"),
        (dict(attention="select:4"), "selection_bytes"),
        (dict(streaming=StreamingWindow(64, 40)), "do not lie within one block"),
        (dict(attention="window:64,sinks=40"), "must lie within one block"),
        (dict(block_size=8), "block=8"),
        (dict(residual=-1), "residual=-1"),
        (dict(device="full", residual=64), "no pages are packed"),
    ],
)
def test_what_cannot_be_is_refused(llama, change, message):
    with pytest.raises(ConfigError, match=message), open_packed(llama, **change):
        pass


def test_the_tiers_below_may_name_the_same_format(llama):
    with open_packed(llama, host="int8") as engine:
        assert engine.pager.status()["tiers"]["host"]["formats"] == ["int8/64", "full"]


def test_a_pager_alone_packs_no_pages():
    layout = KVLayout(2, 2, 32, 32, "float32")
    sizes = dict(device_bytes="4MiB", host_bytes="1MiB", device="int8")
    with pytest.raises(ConfigError, match="only an Engine and a PrefixCache pack pages"):
        Pager.open(layout, PagerConfig(backend="cpu", **sizes))
