"""The Triton attention kernels in the interpreter: float32 arithmetic on float32, bfloat16 and float16 caches."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import plan_step, reference, triton_attention, triton_common, triton_decode

SPANS = [(1, 150), (5, 5), (20, 90), (1, 1), (0, 0)]
HALF_STEP = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # outputs are rounded once
SHAPES = [(2, 1, (16, 16)), (1, 7, (24, 16)), (2, 4, (80, 64)), (1, 40, (16, 32)), (1, 2, (48, 16))]
RULES = [{}, dict(window=7, sinks=3), dict(window=64, sinks=20)]


def run(case, kernel=triton_attention.paged_attention):
    plan = plan_step(case.k, case.table, case.kv_lens, case.cu_q)
    rules = dict(window=None, sinks=0, softcap=None) | case.rules
    return kernel(case.q, case.k, case.v, plan, scale=case.scale, out_dtype=case.q.dtype, **rules)


def test_this_process_interprets():
    assert triton_common.IS_INTERPRETED


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_the_reference(make_case, assert_close, shape):
    heads, group, dims = shape
    rules = RULES[SHAPES.index(shape) % len(RULES)]
    block = 64 if rules.get("window") == 7 else 16  # a tile in one page, and over four
    case = make_case(SPANS, heads=heads, group=group, dims=dims, block=block, **rules)
    assert_close(run(case), case.expected(), 3e-6, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_caches_lose_only_the_last_rounding(make_case, assert_close, dtype):
    case = make_case(SPANS, dtype=dtype, block=32)
    out, lse = run(case)
    assert out.dtype == dtype
    assert_close((out, lse), case.expected(), HALF_STEP[dtype], 5e-6)


def test_softcap_matches_the_reference(make_case, assert_close):
    case = make_case(SPANS[:3], softcap=2.0, window=30, sinks=2)
    assert_close(run(case), case.expected(), 3e-6, 5e-6)


def test_prefill_kernel_serves_single_rows_too(make_case, assert_close):
    case = make_case([(1, 70), (3, 80)])
    assert_close(run(case, triton_attention.paged_prefill), case.expected(), 3e-6, 5e-6)


@pytest.mark.parametrize(("splits", "rules"), [(1, RULES[0]), (2, RULES[1]), (3, RULES[2]), (8, RULES[0])], ids=str)
def test_any_number_of_splits_gives_the_same_numbers(make_case, assert_close, splits, rules):
    case = make_case([(1, 300), (1, 64), (1, 1)], block=64, **rules)
    out, lse = torch.empty(3, 4, 16), torch.empty(3, 4)
    table, lengths = torch.from_numpy(case.table), torch.tensor(case.kv_lens, dtype=torch.int32)
    triton_decode.paged_decode(
        case.q, case.k, case.v, table, lengths, out, lse, scale=case.scale, longest=300, splits=splits, **rules
    )
    assert_close((out, lse), case.expected(), 3e-6, 5e-6)


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (6, 64), (40, 16)])
def test_staged_blocks_are_seen_by_every_row(make_case, assert_close, rows, block):
    case = make_case([(rows, 3 * block)], block=block, order="runs")
    k, v = case.k[:3], case.v[:3]
    for softcap in (None, 2.0):
        result = triton_attention.block_attention(
            case.q, k, v, np.arange(3), scale=case.scale, softcap=softcap, out_dtype=torch.float32
        )
        assert_close(result, reference.block_attention(case.q, k, v, scale=case.scale, softcap=softcap), 3e-6, 5e-6)
    out, lse = triton_attention.block_attention(
        case.q, k, v, np.arange(0), scale=1.0, softcap=None, out_dtype=torch.float32
    )
    assert not out.any() and torch.isneginf(lse).all()


def test_tokens_behind_the_window_are_never_read(make_case, assert_close):
    for queries, block in product((1, 20), (16, 64)):
        case = make_case([(queries, 200)], block=block, window=50, sinks=4)
        expected = case.expected()
        for position in range(4, 200 - queries - 50 + 1):
            page = case.table[0, position // block]
            case.k[page, :, position % block] = float("nan")
            case.v[page, :, position % block] = float("nan")
        assert_close(run(case), expected, 3e-6, 5e-6)


def test_pages_beyond_two_gib_are_reached():
    """Page numbers times strides pass 2**31 elements: offsets are 64-bit. The pool is a view that repeats its bytes."""
    block, dim, pages = 16, 16, 1 << 16
    memory = torch.randn(2, 1, block, dim)
    far = torch.empty((pages - 1) * 40_000 + block * dim, dtype=torch.float16)  # 5 GiB of address space, untouched
    k = far.as_strided((pages, 1, block, dim), (40_000, block * dim, dim, 1))
    k[pages - 1] = memory[0].half()
    q = torch.randn(1, 1, dim).half()
    out, lse = torch.empty(1, 1, dim), torch.empty(1, 1)
    table = torch.tensor([[pages - 1]], dtype=torch.int32)
    triton_decode.paged_decode(
        q, k, k, table, torch.tensor([block], dtype=torch.int32), out, lse, scale=0.25, longest=block
    )
    expected = reference.paged_attention(q, k, k, table, [block], [0, 1], scale=0.25)[0]
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_widths_are_cut_or_padded():
    cut = {d: (w.A, w.B) for d in (8, 16, 24, 64, 80, 96, 120, 192, 576) for w in [triton_common.cut_widths(d, d)]}
    assert cut == {
        8: (16, 0), 16: (16, 0), 24: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 120: (128, 0), 192: (128, 64),
        576: (512, 64),
    }  # fmt: skip


@settings(max_examples=5, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 70)), min_size=1, max_size=2),
    heads=st.integers(1, 2),
    group=st.sampled_from([1, 4, 5]),
    dims=st.sampled_from([(16, 16), (24, 16), (32, 48)]),
    block=st.sampled_from([16, 32]),
    order=st.sampled_from(["scattered", "woven"]),
    poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    window=st.none() | st.integers(1, 60),
    sinks=st.integers(0, 20),
    seed=st.integers(0, 1 << 16),
)
def test_any_step_matches_the_reference(make_case, assert_close, spans, **drawn):
    case = make_case([(rows, rows + before) for rows, before in spans], **drawn)
    if case.q.shape[0]:
        assert_close(run(case), case.expected(), 5e-6, 1e-5)
