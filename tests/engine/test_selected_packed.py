"""Selected attention on packed pages: picks are read packed, and the bound is that of the keys as the pages hold them."""

from __future__ import annotations

import pytest
import torch

from kvtier import KVLayout, PagerConfig, SamplingParams
from kvtier.engine.attention import typed
from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt
from kvtier.engine.needle_check import build_needle_cache
from kvtier.kernels.conversion import read_keys
from kvtier.pager.tier_formats import device_layouts
from kvtier.tiers.errors import ConfigError
from kvtier.tiers.formats import page_format

from .test_families import tiny
from .test_scheduler import check_end, prompt_of
from .test_selected import ALL, BLOCK, logprobs, open_selecting

ROOM = 12  # blocks in full precision, for the tail


@pytest.mark.parametrize("residual", [0, BLOCK])
def test_what_is_picked_whole_is_full_attention_on_the_same_pages(residual):
    """Resident and streamed, from slices and from pages, in picks and in the second look; what is kept in full precision is
    not read on its page as well."""
    model, prompt, params = tiny("llama"), prompt_of(20 * BLOCK + 5, 1), dict(max_tokens=14, logprobs=5)
    for pages in (14 + residual // BLOCK, 60):
        with open_selecting(model, pages=pages, blocks=200, slices=200, device="int8", residual=residual) as engine:
            engine.generate([prompt], SamplingParams(max_tokens=1))  # a chunk sees itself exactly, cached blocks do not
            full = engine.generate([prompt], SamplingParams(**params))[0]
            some = engine.generate([prompt], SamplingParams(**params, attention=ALL))[0]
            assert some.token_ids == full.token_ids  # over the end of a block, which is packed and summarised
            assert (logprobs(some) - logprobs(full)).abs().max() < 1e-4
            assert some.selection.steps == 13 and some.selection.left_out_bound <= 1e-8
            assert (some.selection.bytes_fetched > 0) == (pages < 60)
            check_end(engine)


@pytest.mark.parametrize("device", ["int8", pytest.param("int4", marks=pytest.mark.soak)])
def test_a_needle_is_found_on_its_packed_page_alone(device, tmp_path):
    spec, model = NeedleSpec(), build_needle_model()
    ids, needles = needle_prompt(spec, 2048, 3)
    settings = dict(pages=16 + ROOM, host_blocks=40, slices=64, blocks=200, device=device)
    store = dict(nvme_path=tmp_path / "s", nvme_bytes="64MiB")
    for number in range(2):  # as it was written, and resumed from disk
        with open_selecting(model, **settings, **store) as engine:
            session = engine.session("a")
            if not number:
                session.inject(ids, build_needle_cache(model, ids))
            for needle in needles:
                asked = SamplingParams(max_tokens=4, attention="select:6", top2_margin=True)
                out = session.send([needle.key], asked)
                assert tuple(out.token_ids) == needle.values and min(out.margins) > 18
                assert out.selection.full_steps == (needle is needles[0])
                assert out.selection.pages_read == out.selection.steps * 2 * 6
                assert out.selection.bytes_fetched < out.selection.bytes_of_full / 5
                session.rollback(len(ids))
            moved = {"host_to_device", *(["nvme_to_host"] if number else [])}
            assert all(engine.pager.counters.get("moved_bytes", direction=way, reason="select") for way in moved)
            session.park()


def test_no_key_of_a_packed_page_lies_outside_its_summary():
    model, prompt = tiny("llama"), prompt_of(10 * BLOCK + 5, 2)
    with open_selecting(model, pages=60, device="int4/32") as engine:
        session = engine.session("a")
        session.send(prompt, SamplingParams(max_tokens=BLOCK, attention="select:4"))
        pager, book, end = engine.pager, engine._modes._book, engine.pager.num_computed(session.seq)
        rows = book.rows_of(session.seq, end // BLOCK)
        ids = pager._core.sequences[session.seq].tables[0].ids[: len(rows)]
        at, layout = pager._core.groups[0].directory.page[ids], pager.layouts[0]
        assert len(rows) == 11 and (rows >= 0).all() and (at >= 0).all()
        for layer in range(layout.num_layers):
            pool = typed(pager.device_rows(0), torch.uint8)[:, layer * layout.layer_bytes :][:, : layout.layer_bytes]
            keys, made = read_keys(pool, at, page_format(layout)), book.of_layer(0, layer)[torch.from_numpy(rows)]
            assert (made[:, :, 0] <= keys.amin(2)).all() and (keys.amax(2) <= made[:, :, 1]).all()
            assert (made[:, :, 1] - keys.amax(2)).max() < 1e-5 * keys.abs().max()
        assert all(part is None for part in book._tensors[1:]), "a tail is not summarised"


def test_the_bound_that_is_told_keeps_to_the_recall_target():
    model, prompt = tiny("llama"), prompt_of(20 * BLOCK + 5, 2)
    with open_selecting(model, pages=8 + ROOM, device="int8") as engine:
        attention = "select:4,recall=0.9"
        out = engine.generate([prompt], SamplingParams(max_tokens=4, attention=attention))[0]
        assert out.selection.steps >= 3 and out.selection.left_out_bound <= 0.1
        requests = [
            engine.request(prompt_of(8 * BLOCK + n, n), SamplingParams(max_tokens=4, attention="select:4"))
            for n in (3, 9)
        ]
        engine.run(requests)  # two spans in one selected step
        assert all(request.output.selection.steps == 3 for request in requests)
        for request in requests:
            engine.drop(request)
        check_end(engine)


def test_pages_whose_attention_rounds_q_are_not_selected():
    config = PagerConfig("1MiB", selection_bytes="128KiB", device="hack8")
    with pytest.raises(ConfigError, match=r"device='hack8' with selection_bytes='128KiB'.*rounds q too"):
        device_layouts(config, [KVLayout(2, 2, 64, 32)])
