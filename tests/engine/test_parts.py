"""Layers, and heads of layers, in formats of their own: a part is a layer group, and an answer does not depend on the cut."""

from __future__ import annotations

import pytest

from kvtier import SamplingParams
from kvtier.tiers.errors import ConfigError

from .prefix_rig import DOCUMENT, run, stock_past
from .test_families import tiny
from .test_packed import BLOCK, ONE, open_packed
from .test_scheduler import check_end, prompt_of

HALF, REST = "int8; layers 0-1: full", "full; layers 2-3: int8"
# int8/32 is int8 in blocks of 32 tokens and rows of 16 channels, and another name: it cuts, and changes nothing.
CUT = ["int8; layers 1-2: int8/32", "int8; heads 1: int8/32", "int8; layers 1,3 heads 0: int8/32; layer 2: int8/32"]


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def margins(model, device, prompts, new=6, attention="full", **options):
    with open_packed(model, device, **options) as engine:
        asked = SamplingParams(max_tokens=new, top2_margin=True, attention=attention)
        outputs = engine.generate(prompts, asked)
        check_end(engine)
        return [out.token_ids for out in outputs], [margin for out in outputs for margin in out.margins]


@pytest.mark.parametrize("device", [CUT[1], *(pytest.param(text, marks=pytest.mark.soak) for text in CUT[::2])])
def test_how_a_model_is_cut_changes_no_answer(llama, device):
    """One step over prompts that end inside blocks, at their ends, and before them; and decodes over a block's end."""
    prompts = [prompt_of(n, n) for n in (5, BLOCK, 3 * BLOCK - 3, 120)]
    tokens, wanted = margins(llama, "int8", prompts)
    cut, found = margins(llama, device, prompts)
    assert cut == tokens and found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "halves", [(HALF, REST), ("int8; heads 0: full", "full; heads 1: int8")], ids=["layers", "heads"]
)
def test_layers_and_heads_keep_their_formats_whichever_is_named(llama, halves):
    prompts = [prompt_of(n, n) for n in (40, 120)]
    found = [margins(llama, device, prompts, new=3)[1] for device in (*halves, "int8", "full")]
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != pytest.approx(found[2], abs=1e-5) and found[0] == pytest.approx(found[3], abs=0.05)


def test_a_part_is_a_layer_group(llama):
    with open_packed(llama, HALF) as engine:
        formats = [(layout.name, layout.num_layers, layout.format_text) for layout in engine.pager.layouts]
        assert formats == [("full", 2, "int8/64"), ("full-exact", 2, "full"), ("full-tail", 2, "full")]
        assert engine.pager.status()["tiers"]["device"]["formats"] == ["int8/64", "full", "full"]


def test_more_exact_layers_take_more_room(llama):
    tokens = {}
    for device in ("full", "int8; layers 0-1: full", "int8; heads 0: full", "int8; layers 0: full", "int8"):
        with open_packed(llama, device, blocks=200) as engine:
            tokens[device] = min(len(g.pages) for g in engine.pager._core.groups if not g.layout.is_tail)
    sizes = list(tokens.values())
    assert sizes == sorted(sizes) and sizes[1] == pytest.approx(sizes[2], abs=2) and sizes[-1] > 2 * sizes[0]


@pytest.mark.parametrize("device", [HALF, pytest.param(CUT[1], marks=pytest.mark.soak)])
def test_parts_are_parked_streamed_and_found_again_together(llama, device, tmp_path):
    prompt, answers = prompt_of(30 * BLOCK + 9, 5), []
    for name, options in (("a", dict(blocks=60)), ("b", dict(blocks=18, staging_bytes=1 << 16))):
        with open_packed(llama, device, path=tmp_path / name, **options) as engine:
            session = engine.session("a")
            session.send(prompt, SamplingParams(max_tokens=0))
            session.park()
        with open_packed(llama, device, path=tmp_path / name, **options) as engine:
            session = engine.session("a")
            assert session.num_computed == len(prompt)
            out = session.send([4], SamplingParams(max_tokens=4, top2_margin=True))
            answers.append((out.token_ids, out.margins))
            streamed = sum(
                engine.pager.counters.get(f"{done}_slices", reason="stream") for done in ("attended", "moved")
            )
            assert bool(streamed) == ("staging_bytes" in options)
            assert engine.pager.counters.get("lost_tokens") == 0
            engine.pager.check_integrity()
    assert answers[0][0] == answers[1][0] and answers[0][1] == pytest.approx(answers[1][1], abs=0.05)


@pytest.mark.parametrize("device", [CUT[1], pytest.param(HALF, marks=pytest.mark.soak)])
def test_parts_select_each_for_themselves(llama, device):
    prompts = [prompt_of(20 * BLOCK + 5, 1)]
    options = dict(blocks=90, staging_bytes=1 << 16)
    everything = "select:3,recall=0.999999999"
    with open_packed(llama, device, selection_bytes=1 << 20, **options) as engine:
        engine.generate(prompts, ONE)
        full = engine.generate(prompts, SamplingParams(max_tokens=5, top2_margin=True))[0]
        some = engine.generate(prompts, SamplingParams(max_tokens=5, top2_margin=True, attention=everything))[0]
        assert some.token_ids == full.token_ids and some.margins == pytest.approx(full.margins, abs=1e-3)
        assert some.selection.steps == 4 and some.selection.left_out_bound < 1e-8
        check_end(engine)


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("gemma2", marks=pytest.mark.soak)])
def test_windows_sink_logits_and_softcaps_are_those_of_the_heads(family):
    model, prompts = tiny(family), [prompt_of(n, n) for n in (20, 70, 150)]
    tokens, wanted = margins(model, "int8", prompts, new=3, blocks=60)
    cut, found = margins(model, "int8; heads 1: int8/32; layers 0: int8/32", prompts, new=3, blocks=60)
    assert cut == tokens and found == pytest.approx(wanted, abs=1e-4)


def test_a_prefix_cache_cuts_by_layers_and_not_by_heads(caches):
    model, past = tiny("llama"), stock_past(tiny("llama"))
    run(model, past, DOCUMENT)
    with caches(model, device=HALF) as cache:
        assert [layout.name for layout in cache.layouts] == ["full", "full-exact"]
        cache.store(DOCUMENT, past)
        n, loaded = cache.load([*DOCUMENT, 5])
        assert n == len(DOCUMENT)
        same = [bool((a.keys == b.keys).all()) for a, b in zip(loaded.layers, past.layers, strict=True)]
        assert same == [True, True, False, False]
        assert (loaded.layers[3].keys - past.layers[3].keys).abs().max() < past.layers[3].keys.abs().max() / 200
    caches.path = caches.path.with_name("other")
    with pytest.raises(ConfigError, match="all heads of a layer in one format"):
        caches(model, device="int8; heads 0: full")
