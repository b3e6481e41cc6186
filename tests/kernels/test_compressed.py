"""Attention on compressed pages on a CPU, against the float64 reference; tails in full precision; what is refused."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import (
    PageFormat,
    compressed_attention,
    cpu_compressed,
    mixed_attention,
    paged_attention,
    plan_pages,
    quantize_blocks,
    reference,
    reference_compressed,
)

SPANS = [(1, 3, 2), (5, 2, 0), (1, 0, 4), (20, 1, 30), (100, 2, 1)]
FOLDED = ["fp8", "int8", "int4", "int2"]
RULES = [{}, dict(window=40, sinks=5), dict(window=300, sinks=20), dict(softcap=2.0)]


def run(case, **more):
    return compressed_attention(
        case.q,
        case.pages,
        case.fmt,
        case.table,
        case.kv_lens,
        case.cu_q,
        case.ahead,
        scale=case.scale,
        **case.rules,
        **more,
    )


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_ragged_batch_matches_the_reference(make_pages, assert_close, name, rules):
    for (block, dims, size), group in product([(64, (64, 64), 32), (16, (32, 64), 64), (128, (128, 96), 128)], (1, 7)):
        fmt = PageFormat(name, 2, block, *dims, group=size)
        case = make_pages(fmt, SPANS, group=group, **rules)
        assert_close(run(case), case.expected(), 4e-6, 5e-6)


@pytest.mark.parametrize("name", FOLDED)
def test_outlier_channels_cost_no_accuracy_beyond_the_codes(make_pages, assert_close, name):
    case = make_pages(PageFormat(name, 2, 64, 64), SPANS, outliers=30.0)
    assert_close(run(case), case.expected(), 2e-5, 1e-4)  # scores are in the hundreds: a float32 ulp of 3e-5


@pytest.mark.parametrize("name", FOLDED)
def test_sixteen_bit_queries_and_outputs(make_pages, assert_close, name):
    for dtype, out_tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        case = make_pages(PageFormat(name, 2, 64, 64), SPANS, dtype=dtype)
        out, lse = run(case)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_close((out, lse), case.expected(), out_tolerance, 3e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("staged, few", [(1, 1), (1 << 15, 64), (1 << 20, 1024)])
def test_pieces_and_ways_give_the_same_numbers(make_pages, assert_close, monkeypatch, staged, few):
    monkeypatch.setattr(cpu_compressed, "STAGED_BYTES", staged)
    monkeypatch.setattr(cpu_compressed, "FEW_ROWS", few)
    monkeypatch.setattr(cpu_compressed, "MAX_QUERY_TILE", 32)
    for name, rules in product(("int4", "fp8"), RULES):
        case = make_pages(PageFormat(name, 2, 32, 64), [(70, 4, 3), (1, 5, 0)], **rules)
        assert_close(run(case), case.expected(), 4e-6, 5e-6)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "hack8"])
@pytest.mark.parametrize("rules", [{}, dict(window=70, sinks=9), dict(softcap=3.0)], ids=str)
def test_compressed_blocks_and_a_tail_equal_one_attention(make_pages, assert_close, name, rules):
    """Sequences: a decode, a chunk, one without compressed blocks, one whose tail is new tokens only."""
    spans = [(1, 3, 20), (7, 2, 40), (1, 0, 33), (10, 1, 10)]  # queries, compressed blocks, tokens of the tail
    fmt = PageFormat(name, 2, 32, 64, group=64)
    case = make_pages(fmt, [(rows, blocks, tail - rows) for rows, blocks, tail in spans], **rules)
    tails = [tail for _, _, tail in spans]
    counts = [-(-tail // 32) for tail in tails]
    k, v = (torch.full((sum(counts) + 2, 2, 32, 64), float("nan")) for _ in range(2))
    table, at = np.full((4, 2), -1), 0
    for s, count in enumerate(counts):
        table[s, :count] = range(at, at + count)
        at += count
        for token in range(tails[s]):
            page = table[s, token // 32]
            k[page, :, token % 32], v[page, :, token % 32] = torch.randn(2, 2, 64)
    result = mixed_attention(
        case.q, case.pages, fmt, case.table, case.kv_lens, k, v, table, tails, case.cu_q, scale=case.scale, **rules
    )
    pages_k, pages_v = reference_compressed.dequantize_pages(case.pages, fmt)
    for s, (rows, _, tail) in enumerate(spans):
        keys, values = (
            torch.cat([reference.gather_tokens(a, torch.as_tensor(case.table[s]), case.kv_lens[s]),
                       reference.gather_tokens(b.double(), torch.as_tensor(table[s]), tail)])
            for a, b in ((pages_k, k), (pages_v, v))
        )  # fmt: skip
        visible = reference.visible_keys(rows, len(keys), rules.get("window"), rules.get("sinks", 0))
        span = slice(case.cu_q[s], case.cu_q[s + 1])
        expected = reference.dense_attention(
            case.q[span], keys, values, visible, scale=case.scale, softcap=rules.get("softcap")
        )
        tolerances = (4e-6, 5e-6) if not fmt.is_hack else (3e-2, 3e-2)
        assert_close((result[0][span], result[1][span]), expected, *tolerances)


def test_poison_is_felt_as_soon_as_a_table_is_wrong(make_pages):
    """The other tests rely on 0xFF in pages that nobody owns; one such page must show."""
    for name in FOLDED:
        case = make_pages(PageFormat(name, 2, 32, 64), [(1, 3, 0)])
        unused = next(i for i in range(len(case.pages)) if i not in case.table)
        case.table[0, 1] = unused
        assert torch.isnan(run(case)[0]).any()


def test_pages_behind_the_window_are_never_read(make_pages, assert_close):
    case = make_pages(PageFormat("int4", 2, 32, 64), [(4, 6, 3)], window=50, sinks=4)
    expected = case.expected()
    case.pages[torch.from_numpy(case.table[0, 1:4]).long()] = 0xFF  # neither sinks nor window
    assert_close(run(case), expected, 4e-6, 5e-6)


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("entry", [-1, 10_000])
def test_block_table_outside_the_pool_is_refused(make_pages, monkeypatch, entry, debug):
    monkeypatch.setenv("KVTIER_DEBUG", debug)
    case = make_pages(PageFormat("int4", 2, 32, 64), [(1, 2, 0), (3, 2, 0)])
    case.table[1, 1] = entry
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        run(case)


def test_entries_past_the_length_are_not_looked_at(make_pages, assert_close):
    case = make_pages(PageFormat("int2", 2, 32, 64), [(1, 3, 0), (3, 2, 0)])
    case.table[1, 2:] = 10_000
    assert_close(run(case), case.expected(), 4e-6, 5e-6)


def test_what_does_not_fit_is_refused(make_pages):
    case = make_pages(PageFormat("int4", 2, 32, 64), [(1, 2, 0), (3, 2, 0)])
    for change, match in (
        (dict(kv_lens=[64, 33]), r"kv_lens\[1\] = 33 is not a multiple of the block of 32"),
        (dict(ahead=[0, -1]), "ahead"),
        (dict(ahead=[0]), "ahead"),
        (dict(cu_q=[0, 1, 3]), "covers 3 rows"),
        (dict(cu_q=[0, 4]), "cu_q"),
        (dict(q=case.q[:, :3]), "heads"),
        (dict(q=case.q[..., :32]), "64"),
        (dict(pages=case.pages[:, :-128]), "uint8"),
        (dict(rules=dict(window=0)), "window"),
        (dict(kv_lens=[64, 96]), "blocks"),
    ):
        bad = type(case)(**{**vars(case), **change})
        with pytest.raises(ValueError, match=match):
            run(bad)
    plan = plan_pages(case.pages, case.fmt, case.table, case.kv_lens, case.cu_q)
    with pytest.raises(ValueError, match="covers 4 rows"):
        compressed_attention(case.q[:2], case.pages, case.fmt, [], [], [], scale=1.0, plan=plan)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(FOLDED),
    block=st.sampled_from([16, 32, 64, 128]),
    dims=st.sampled_from([(32, 32), (64, 64), (64, 32), (128, 128)]),
    size=st.sampled_from([32, 64, 128]),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 7, 8]),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.integers(0, 50)), max_size=4),
    window=st.none() | st.integers(1, 200),
    sinks=st.integers(0, 40),
    softcap=st.none() | st.just(3.0),
    seed=st.integers(0, 1 << 16),
)
def test_any_step_matches_the_reference(
    make_pages, assert_close, name, block, dims, size, heads, group, spans, window, sinks, softcap, seed
):
    fmt = PageFormat(name, heads, block, *dims, group=size)
    case = make_pages(fmt, spans, group=group, seed=seed, window=window, sinks=sinks, softcap=softcap)
    assert_close(run(case), case.expected(), 5e-6, 1e-5)


def test_quantised_pages_answer_nearly_as_full_precision_does():
    """Not a measure of quality, only of order: more bits, less error; all of it the codes' and none the kernel's."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 8, 2, 64, 64)
    q = torch.randn(1, 8, 64)
    exact = paged_attention(q, k, v, np.arange(8)[None], [512], [0, 1], scale=0.125)[0]
    errors = {}
    for name in ("int8", "fp8", "int4", "int2"):
        fmt = PageFormat(name, 2, 64, 64)
        pages = torch.zeros(8, fmt.layer_bytes, dtype=torch.uint8)
        quantize_blocks(k, v, range(8), pages, range(8), fmt)
        out = compressed_attention(q, pages, fmt, np.arange(8)[None], [512], [0, 1], scale=0.125)[0]
        errors[name] = float((out - exact).norm() / exact.norm())
    assert errors["int8"] < errors["fp8"] < errors["int4"] < errors["int2"] < 1.0
    assert errors["int8"] < 0.02
