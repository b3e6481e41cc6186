"""Selected attention in an engine: exact where everything is picked, right where the needle's page is, honest about the rest.

The needle model finds one block of hundreds, so a pick that is wrong, a slice that is stale or a summary that speaks of
other tokens gives a wrong answer at once. Random-weight models look everywhere, so they compare all slices with a whole
pass.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.hf import discover
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache

from .test_families import tiny
from .test_scheduler import check_end, prompt_of
from .test_streaming_llm import masked

BLOCK = 16
ALL = "select:3,recall=0.999999999"  # picks few blocks, then all whose weight could show


def open_selecting(
    model, *, pages: int = 12, host_blocks: int = 80, slices: int = 24, blocks: int = 64, **settings
) -> Engine:
    """A device tier of so many pages beside summaries of `blocks` blocks and at least so many slices."""
    (layout,) = discover(model).layouts(BLOCK)
    selection = 2 * max(slices * layout.layer_bytes, blocks * layout.block_bytes // BLOCK)
    staging = 6 * layout.layer_bytes
    device = pages * layout.block_bytes + selection + staging
    options = dict(max_batch_tokens=settings.pop("max_batch_tokens", 48))
    config = PagerConfig(
        device, host_blocks * layout.block_bytes + staging, selection_bytes=selection, staging_bytes=staging, backend="cpu",
        **settings,
    )  # fmt: skip
    return Engine.from_model(model, config, block_size=BLOCK, **options)


def logprobs(out) -> torch.Tensor:
    return torch.tensor([[lp for _, lp in token.top] for token in out.logprobs])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])  # softcap; windows in every second layer
def test_what_is_picked_whole_is_full_attention(family):
    model, prompt = tiny(family), prompt_of(20 * BLOCK + 5, 1)
    (layouts) = discover(model).layouts(BLOCK)
    size = sum(layout.block_bytes for layout in layouts)
    config = PagerConfig(
        22 * size, 60 * size, selection_bytes=8 * size, staging_bytes=size, backend="cpu"
    )  # the context does not fit
    params = dict(max_tokens=6, logprobs=5)
    with Engine.from_model(model, config, block_size=BLOCK, max_batch_tokens=48) as engine:
        full = engine.generate([prompt], SamplingParams(**params))[0]
        some = engine.generate([prompt], SamplingParams(**params, attention=ALL))[0]
        many = engine.generate([prompt], SamplingParams(**params, attention="select:99"))[0]
        assert some.token_ids == full.token_ids == many.token_ids
        assert (logprobs(some) - logprobs(full)).abs().max() < 1e-4
        assert (logprobs(many) - logprobs(full)).abs().max() < 1e-4  # streamed: what is resident differs between runs
        assert some.selection.steps == 5 and some.selection.bytes_fetched > 0 and full.selection is None
        assert some.selection.left_out_bound <= 1e-8 and many.selection.steps == 0
        check_end(engine)


def test_as_many_pages_as_there_are_is_the_same_computation():
    model, prompt = tiny("llama"), prompt_of(12 * BLOCK + 5, 1)
    with open_selecting(model, pages=40) as engine:
        params = dict(max_tokens=6, logprobs=5)
        full = engine.generate([prompt], SamplingParams(**params))[0]
        many = engine.generate([prompt], SamplingParams(**params, attention="select:14"))[0]
        assert torch.equal(logprobs(many), logprobs(full)) and many.selection.steps == 0


def test_a_needle_is_found_on_its_page_alone():
    spec, model = NeedleSpec(), build_needle_model()
    ids, needles = needle_prompt(spec, 4096, 4)
    with open_selecting(model, pages=20, host_blocks=300, slices=64, blocks=300) as engine:
        session = engine.session("a")
        session.inject(ids, build_needle_cache(model, ids))
        for number, needle in enumerate(needles):
            out = session.send([needle.key], SamplingParams(max_tokens=4, attention="select:8", top2_margin=True))
            read = out.selection
            assert tuple(out.token_ids) == needle.values and min(out.margins) > 20
            assert (
                read.full_steps == (number == 0) and read.steps == 4 - read.full_steps
            )  # injected: summarised by a pass
            assert read.pages_read == read.steps * 2 * 8 and read.share_read < 0.04
            assert read.bytes_fetched < read.bytes_of_full / 20
            session.rollback(len(ids))
        wrong = session.send([needles[0].key], SamplingParams(max_tokens=4, attention="window:256"))
        assert tuple(wrong.token_ids) != needles[0].values, "a window does not see it"
        session.close()
        check_end(engine)


@pytest.mark.parametrize("host_blocks", [20, 80], ids=["from disk", "half of it from host slots in place"])
def test_a_parked_session_is_summarised_again_by_its_first_step(tmp_path, host_blocks):
    spec, model = NeedleSpec(), build_needle_model()
    ids, needles = needle_prompt(spec, 2048, 4)
    settings = dict(
        pages=16, host_blocks=host_blocks, slices=64, blocks=200, nvme_path=tmp_path / "s", nvme_bytes="64MiB"
    )
    with open_selecting(model, **settings) as engine:
        session = engine.session("a")
        session.inject(ids, build_needle_cache(model, ids))
        session.park()
    with open_selecting(model, **settings) as engine:
        session = engine.session("a")
        engine.pager.drain(10.0)  # what comes up ahead has come
        for number, needle in enumerate(needles):
            out = session.send([needle.key], SamplingParams(max_tokens=4, attention="select:6"))
            assert tuple(out.token_ids) == needle.values
            assert out.selection.full_steps == (number == 0)
            # in the one step that reads all: through the ring, and in place what had come up to host slots by then
            assert engine.pager.counters.get("moved_slices", reason="stream") > 0
            assert host_blocks == 20 or engine.pager.counters.get("attended_slices", reason="stream") > 0
            session.rollback(len(ids))
        moved = {row: engine.pager.counters.get("moved_bytes", direction=row, reason="select") for row in
                 ("host_to_device", "nvme_to_host")}  # fmt: skip
        assert 0 < moved["nvme_to_host"] <= moved["host_to_device"]
        session.close()
        check_end(engine)


def test_the_bound_that_is_told_keeps_to_the_recall_target():
    model, prompt = tiny("llama"), prompt_of(20 * BLOCK + 5, 2)
    with open_selecting(model) as engine:
        for recall in (0.5, 0.9):
            out = engine.generate([prompt], SamplingParams(max_tokens=4, attention=f"select:4,recall={recall}"))[0]
            assert out.selection.steps >= 3 and out.selection.left_out_bound <= 1 - recall
        free = engine.generate([prompt], SamplingParams(max_tokens=4, attention="select:4"))[0]
        assert free.selection.left_out_bound > 0.5, (
            "random keys lie everywhere: four pages cannot be enough, and it says so"
        )
        assert free.selection.pages_read == free.selection.steps * 4 * 4


def test_what_saw_a_part_is_not_found_by_who_wants_all():
    model = tiny("llama")
    with open_selecting(model) as engine:
        for seed, how in enumerate(("select:3", "window:40")):
            prompt = prompt_of(12 * BLOCK + 3, seed)
            out = engine.generate([prompt], SamplingParams(max_tokens=40, attention=how))[0]
            again = [*prompt, *out.token_ids]
            exact = 12 * BLOCK if how == "select:3" else 0  # the first chunk is longer than the window already
            assert engine.pager.match(again).tokens == exact
            engine.pager._core.check_integrity()
            engine.generate([prompt], SamplingParams(max_tokens=1))  # and the exact ones are stored beside them
            assert engine.pager.match(again).tokens == 12 * BLOCK


def test_a_session_keeps_what_it_computed_with_a_part(tmp_path):
    model, prompt = tiny("llama"), prompt_of(12 * BLOCK + 3, 4)
    some = SamplingParams(max_tokens=30, attention="select:4")
    settings = dict(nvme_path=tmp_path / "s", nvme_bytes="64MiB")
    with open_selecting(model) as engine:
        session = engine.session("a")
        wanted = session.send(prompt, some).token_ids
    with open_selecting(model, **settings) as engine:
        session = engine.session("a")
        assert session.send(prompt, some).token_ids == wanted
        child = session.fork()[0]
        assert engine.pager.is_branched(child.seq)
        with pytest.raises(Exception, match="roll it back"):
            session.export(tmp_path / "file.zip")
        session.park()
        child.rollback(12 * BLOCK)
        assert not engine.pager.is_branched(child.seq)
        child.close()
    with open_selecting(model, **settings) as engine:
        session = engine.session("a")
        out = session.send([7], some)
        assert out.usage.recomputed_tokens == 0 and engine.pager.counters.get("lost_tokens") == 0
        assert engine.pager.is_branched(session.seq)
        session.rollback(12 * BLOCK + 3)
        exact = session.send([9], SamplingParams(max_tokens=4)).token_ids
        session.close()
        check_end(engine)
    with open_selecting(model) as engine:
        assert engine.generate([[*prompt, 9]], SamplingParams(max_tokens=4))[0].token_ids == exact


def test_requests_of_all_kinds_run_together():
    model = tiny("llama")
    prompts = [prompt_of(6 * BLOCK + n, n) for n in range(4)]
    kinds = ["full", ALL, "window:40,sinks=3", ALL]
    alone = []
    with open_selecting(model, pages=40) as engine:
        for prompt, kind in zip(prompts, kinds):
            alone.append(engine.generate([prompt], SamplingParams(max_tokens=8, attention=kind))[0].token_ids)
    with open_selecting(model, pages=40) as engine:
        asked = [engine.request(p, SamplingParams(max_tokens=8, attention=k)) for p, k in zip(prompts, kinds)]
        engine.run(asked)
        assert [request.output.token_ids for request in asked] == alone
        assert all(request.output.selection.steps >= 7 for request in asked[1::2])
        for request in asked:
            engine.drop(request)
        check_end(engine)
    assert alone[2] == masked(model, prompts[2], 8, 40, 3)


def test_the_engines_own_attention_is_what_requests_use_that_name_none():
    model, prompt = tiny("llama"), prompt_of(12 * BLOCK + 3, 3)
    (layout,) = discover(model).layouts(BLOCK)
    config = PagerConfig(80 * layout.block_bytes, 40 * layout.block_bytes, backend="cpu")
    with Engine.from_model(model, config, block_size=BLOCK, attention="select:4") as engine:
        own = engine.generate([prompt], SamplingParams(max_tokens=3))[0]
        assert own.selection.pages_read == own.selection.steps * 4 * 4 > 0
        assert engine.generate([prompt], SamplingParams(max_tokens=3, attention="full"))[0].selection is None
        assert engine.pager.status()["tiers"]["device"]["capacity_bytes"] <= config.device_size


def test_summaries_that_do_not_fit_mean_full_attention():
    model, prompt = tiny("llama"), prompt_of(20 * BLOCK + 5, 5)
    with open_selecting(model, slices=16, blocks=1) as engine:
        assert len(engine._modes._book) < 20 * 16
        engine._modes._book._free = engine._modes._book._free[:8]
        engine._modes._book._key = engine._modes._book._key[:]
        out = engine.generate([prompt], SamplingParams(max_tokens=3, attention="select:4"))[0]
        full = engine.generate([prompt], SamplingParams(max_tokens=3))[0]
        assert out.selection.steps == 0 and out.selection.full_steps > 0 and out.token_ids == full.token_ids


def test_a_summary_is_believed_only_after_its_step():
    model = tiny("llama")
    with open_selecting(model) as engine:
        pager, book = engine.pager, engine._modes._book
        seq = pager.begin()
        pager.append(seq, prompt_of(4 * BLOCK, 1))
        book.begin()
        rows = book.rows_of(seq, 4)
        assert (rows < 0).all() and len(book.claim(seq, rows, np.arange(4))) == 4
        book.begin()  # the step failed
        assert (book.rows_of(seq, 4) < 0).all()
        rows = book.rows_of(seq, 4)
        book.claim(seq, rows, np.arange(4))
        book.publish()
        assert np.array_equal(book.rows_of(seq, 4), rows)
        pager.truncate(seq, 3 * BLOCK)
        pager.append(seq, prompt_of(BLOCK, 9))
        assert (book.rows_of(seq, 4) >= 0).tolist() == [True, True, True, False], "other tokens, another name"
        pager.finish(seq)


def test_what_a_layer_picked_in_the_step_before_comes_early():
    model, prompt = tiny("llama"), prompt_of(30 * BLOCK + 5, 3)
    with open_selecting(model, slices=16, blocks=36) as engine:  # the cache holds less than the layers of a step pick
        read = engine.generate([prompt], SamplingParams(max_tokens=8, attention="select:14"))[0].selection
        assert 0 < read.slices_guess_used <= read.slices_guessed
        assert read.slices_kept + read.slices_guess_used <= read.slices_asked
        missed = read.slices_asked - read.slices_kept - read.slices_guess_used
        (layout,) = discover(model).layouts(BLOCK)
        assert read.bytes_fetched == (missed + read.slices_guessed) * layout.layer_bytes
        check_end(engine)


@pytest.mark.parametrize("formats", [{"host": "int8"}, {"host": "int8", "nvme": "int4"}])
def test_summaries_cover_what_tiers_of_fewer_bits_give_back(tmp_path, formats):
    model, prompt = build_needle_model(), prompt_of(20 * BLOCK + 5, 2)
    found = {}
    for name, settings in (("exact", {}), ("rounded", formats)):
        store = dict(nvme_path=tmp_path / name, nvme_bytes="64MiB") if "nvme" in formats else {}
        with open_selecting(model, pages=30, **settings, **store) as engine:
            engine.generate([prompt], SamplingParams(max_tokens=2, attention="select:4"))
            book = engine._modes._book
            rows = np.array(sorted(book._row_at.values()))
            found[name] = book.of_layer(0, 1)[torch.from_numpy(rows)].clone(), engine.pager.roundings(0)
    (narrow, none), (wide, passed) = found["exact"], found["rounded"]
    assert none == [] and [fmt.text for fmt in passed] == [f"{name}/64" for name in formats.values()]
    assert len(narrow) == len(wide) == 20
    assert (wide[:, :, 0] < narrow[:, :, 0]).all() and (wide[:, :, 1] > narrow[:, :, 1]).all()
    scale = (narrow[:, :, 1] - narrow[:, :, 0]).amax()
    assert (wide - narrow).abs().max() < 0.05 * scale, "and by little"
