"""The CPU path against the float64 references: shapes, dtypes, ragged batches, page orders, retention rules."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from kvtier.kernels import (
    block_attention,
    merge_states,
    paged_attention,
    paged_decode,
    paged_prefill,
    reference,
    write_kv,
)

from kvtier.kernels import cpu, cpu_inplace, cpu_layer, cpu_tile  # isort: skip

RAGGED = [(1, 300), (5, 5), (33, 200), (1, 1), (0, 0), (1, 128), (2, 65)]
SHAPES = [
    (2, 1, (16, 16)),
    (2, 4, (64, 64)),
    (1, 7, (24, 16)),
    (2, 2, (16, 32)),
]  # MHA, GQA, MQA; K and V of other width
RULES = [{}, dict(window=1), dict(window=7, sinks=3), dict(window=64, sinks=100), dict(window=100, sinks=300)]
TOLERANCE = {torch.float32: (2e-6, 3e-6), torch.bfloat16: (8e-3, 3e-4), torch.float16: (1e-3, 1e-4)}


@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_the_reference(make_case, assert_close, shape, block):
    heads, group, dims = shape
    for seed, (order, rules) in enumerate(product(("scattered", "runs", "woven"), RULES)):
        case = make_case(
            RAGGED, heads=heads, group=group, dims=dims, block=block, order=order, seed=seed, softcap=None, **rules
        )
        assert_close(case.run(paged_attention), case.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_sixteen_bit_caches_match_the_reference(make_case, assert_close, dtype, rules):
    for block, dims in ((16, (64, 64)), (64, (64, 64)), (64, (48, 32))):
        case = make_case(RAGGED, dtype=dtype, group=4, dims=dims, block=block, **rules)
        out, lse = case.run(paged_attention)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_close((out, lse), case.expected(), *TOLERANCE[dtype])


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_softcap_matches_the_reference(make_case, assert_close, rules):
    case = make_case(RAGGED, group=4, softcap=2.0, **rules)
    assert_close(case.run(paged_attention), case.expected())


def test_small_tiles_and_staging_give_the_same_numbers(make_case, assert_close, monkeypatch):
    monkeypatch.setattr(cpu, "MAX_QUERY_TILE", 16)
    monkeypatch.setattr(cpu, "WINDOW_QUERY_TILE", 16)
    monkeypatch.setattr(cpu_layer, "STAGING_BYTES", 8 << 10)  # two or four blocks
    monkeypatch.setattr(cpu_layer, "MANY_ROWS", 32)
    monkeypatch.setattr(cpu_inplace, "MAX_RUN_PAGES", 2)
    for block, order, rules in product((16, 64), ("scattered", "runs"), RULES):
        case = make_case([(70, 300), (1, 300), (40, 41)], block=block, order=order, **rules)
        assert_close(case.run(paged_attention), case.expected())


def test_every_way_to_read_a_page_gives_the_same_numbers(make_case, assert_close, monkeypatch):
    ways = {"call per page": (0.0, 1e9), "gather": (1e9, 0.0)}
    for (call_us, gather_us), order in product(ways.values(), ("scattered", "woven")):
        monkeypatch.setattr(cpu_inplace, "CALL_US", call_us)
        monkeypatch.setattr(cpu_inplace, "GATHER_US", gather_us)
        monkeypatch.setattr(cpu_inplace, "GATHERED_BYTES_PER_US", 1e9 if gather_us == 0.0 else 1.0)
        case = make_case([(1, 300), (1, 77), (1, 256), (3, 140)], block=64, order=order, window=200, sinks=70)
        assert_close(case.run(paged_attention), case.expected())


def test_without_the_flash_kernel_the_plain_way_takes_over(make_case, assert_close, monkeypatch):
    monkeypatch.setattr(cpu_tile, "flash_kernel", lambda: None)
    for block, rules in product((16, 128), RULES):
        case = make_case(RAGGED, block=block, **rules)
        assert_close(case.run(paged_attention), case.expected())


def test_flash_kernel_of_this_torch_is_trusted():
    assert cpu_tile.flash_kernel() is not None


def test_pages_shared_by_sequences_are_read_by_each(make_case, assert_close):
    case = make_case([(1, 256), (1, 256), (9, 256)], block=64)
    case.table[1:] = case.table[0]
    assert_close(case.run(paged_attention), case.expected())


@pytest.mark.parametrize("lens", [[700], [64, 700, 5]])
def test_an_answer_is_the_same_bits_where_nobody_asks_for_its_lse(make_case, lens):
    case = make_case([(1, n) for n in lens], group=2, block=64, order="runs")
    out, lse = case.run(paged_attention)
    alone, unasked = case.run(paged_attention, with_lse=False)
    assert torch.equal(out, alone) and (unasked.numel() == 0 or torch.equal(lse, unasked))


def test_merging_pages_of_very_different_weight_is_exact():
    out, lse = torch.randn(5, 2, 3, 8), torch.randn(5, 2, 3) * 200
    wanted = torch.logsumexp(lse.double(), 0), (torch.softmax(lse.double(), 0)[..., None] * out).sum(0)
    merged, total = cpu_inplace.merge_pages(out.clone(), lse)
    torch.testing.assert_close(total[0].double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged[0].double(), wanted[1], rtol=1e-5, atol=1e-6)


def test_no_kernel_records_a_graph(make_case):
    case = make_case([(1, 40)])
    case.q.requires_grad_()
    assert torch.is_grad_enabled() and not any(t.requires_grad for t in case.run(paged_attention))


def test_poison_is_felt_as_soon_as_a_length_is_wrong(make_case):
    """The other tests rely on NaN in unused slots; one slot too many must show."""
    for block, queries in product((16, 64), (1, 20)):
        case = make_case([(queries, 100)], block=block)
        case.kv_lens = [101]
        assert torch.isnan(case.run(paged_attention)[0]).any()


def test_tokens_behind_the_window_are_never_read(make_case, assert_close):
    for block, queries in product((16, 64), (1, 20)):
        case = make_case([(queries, 200)], block=block, window=50, sinks=4)
        expected = case.expected()
        for position in range(4, 200 - queries - 50 + 1):
            page = case.table[0, position // block]
            case.k[page, :, position % block] = float("nan")
            case.v[page, :, position % block] = float("nan")
        assert_close(case.run(paged_attention), expected)


def test_strided_queries_as_a_model_hands_them_over(make_case, assert_close):
    case = make_case([(20, 90), (1, 90)], group=4)
    expected = case.expected()
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(case.run(paged_attention), expected)


def test_empty_inputs(make_case):
    case = make_case([])
    out, lse = case.run(paged_attention)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)
    case = make_case([(0, 40), (0, 0)])
    assert case.run(paged_attention)[0].shape == (0, 4, 16)
    out, lse = block_attention(torch.randn(3, 4, 16), case.k[:0], case.v[:0], scale=1.0)
    assert not out.any() and torch.isneginf(lse).all()
    out, lse = block_attention(torch.randn(0, 4, 16), case.k, case.v, scale=1.0)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


def test_decode_of_a_sequence_without_keys_gives_zeros(make_case, assert_close):
    case = make_case([(1, 70), (1, 1), (1, 33)])
    case.kv_lens[1] = 0
    out, lse = paged_decode(case.q, case.k, case.v, case.table, case.kv_lens, scale=case.scale)
    assert not out[1].any() and torch.isneginf(lse[1]).all()
    kept = [0, 2]
    expected = reference.paged_attention(
        case.q[kept], case.k, case.v, case.table[kept], [70, 33], [0, 1, 2], scale=case.scale
    )
    assert_close((out[kept], lse[kept]), expected)


def test_prefill_alone_equals_the_mixed_call(make_case, assert_close):
    case = make_case([(1, 40), (30, 70)])
    assert_close(case.run(paged_prefill), case.expected())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_streamed_blocks_merged_with_resident_ones_equal_the_whole(make_case, assert_close, rows, block):
    case = make_case([(rows, 5 * block + 3 + rows)], block=block, group=4)
    expected = case.expected()
    staged = case.table[0, :3].astype(np.int64)
    resident = case.table[:, 3:]
    out, lse = paged_attention(
        case.q, case.k, case.v, resident, [2 * block + 3 + rows], case.cu_q, scale=case.scale, out_dtype=torch.float32
    )
    for ids in (staged[:2], staged[2:]):
        part = block_attention(case.q, case.k[ids], case.v[ids], scale=case.scale)
        out, lse = merge_states(out, lse, *part)
    assert_close((out, lse), expected)


def test_staged_blocks_may_be_strided_views(make_case, assert_close):
    case = make_case([(1, 96)], block=32, order="runs")  # the last layer's slice of rows that hold three layers
    part = block_attention(case.q, case.k[:3], case.v[:3], scale=case.scale)
    assert not case.k.is_contiguous()
    assert_close(part, reference.block_attention(case.q, case.k[:3], case.v[:3], scale=case.scale))
    part = block_attention(case.q, case.k[:3], case.v[:3], scale=case.scale, softcap=3.0)
    assert_close(part, reference.block_attention(case.q, case.k[:3], case.v[:3], scale=case.scale, softcap=3.0))


def test_buffers_kept_in_inference_mode_serve_outside_it(make_case, assert_close):
    case = make_case([(30, 200)])
    with torch.inference_mode():
        case.run(paged_attention)
    assert_close(case.run(paged_attention), case.expected())


def test_write_kv_matches_the_reference_byte_for_byte(make_case):
    random = np.random.default_rng(0)
    for slots in (
        np.arange(5, 69),
        np.r_[np.arange(3, 20), [-1, -1, 0], np.arange(40, 64)],
        random.permutation(100)[:40],
        np.full(4, -1),
        np.empty(0, np.int64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            case = make_case([(0, 112)], dtype=dtype, dims=(16, 24))
            expected_k, expected_v = case.k.clone(), case.v.clone()
            k_new, v_new = torch.randn(len(slots), 2, 16), torch.randn(len(slots), 2, 24)
            reference.write_kv(k_new, v_new, expected_k, expected_v, slots)
            write_kv(k_new, v_new, case.k, case.v, slots)
            same = (torch.nan_to_num(x.float()) for x in (case.k, expected_k, case.v, expected_v))
            k, expected_k, v, expected_v = same
            assert torch.equal(k, expected_k) and torch.equal(v, expected_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_single_row_given_twice_is_the_same_row(make_case, assert_close, monkeypatch, dtype):
    for is_slow in (True, False):
        monkeypatch.setattr(cpu_tile, "is_slow_with_one_row", lambda dtype, is_slow=is_slow: is_slow)
        case = make_case([(1, 300), (1, 77), (1, 16)], dtype=dtype, group=1, block=16, order="runs")
        out, lse = case.run(paged_attention)
        assert out.shape == case.q.shape
        assert_close((out, lse), case.expected(), *TOLERANCE[dtype])


def test_a_row_is_given_twice_where_the_processor_has_no_bfloat16(monkeypatch):
    def known(**facts):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
        cpu_tile.is_slow_with_one_row.cache_clear()
        return [dtype for dtype in cpu_tile.FLASH_DTYPES if cpu_tile.is_slow_with_one_row(dtype)]

    assert known(architecture="x86_64", avx512_bf16=False) == [torch.bfloat16]
    assert known(architecture="x86_64", avx512_bf16=True) == known(architecture="aarch64") == known() == []
    cpu_tile.is_slow_with_one_row.cache_clear()


def test_what_underflows_weighs_nothing_and_nothing_else_changes():
    x = torch.tensor([0.0, -1.0, -63.9, -64.1, -95.0, -3e4, float("-inf"), float("nan")])
    found = cpu_tile.exp_(x.clone())
    torch.testing.assert_close(found[:3], x[:3].exp(), rtol=1e-5, atol=0.0)
    assert found[3:7].tolist() == [0.0] * 4, "a denormal number makes every product with it slow"
    assert found[7].isnan()
