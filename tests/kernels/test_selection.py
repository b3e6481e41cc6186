"""Page selection: bounds that hold, sinks and newest always chosen, the needle's page found, omitted weight bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import (
    omitted_share,
    paged_decode,
    reference,
    score_pages,
    select_pages,
    summarize_blocks,
)


def build(blocks, *, heads=2, group=2, dim=16, block=16, seed=0, dtype=torch.float32):
    """One sequence per entry, each of so many blocks on scattered pages, and the summaries of all pages."""
    torch.manual_seed(seed)
    total = sum(blocks)
    order = np.random.default_rng(seed).permutation(total + 2)
    table, at = np.full((len(blocks), max([1, *blocks])), -1), 0
    for s, count in enumerate(blocks):
        table[s, :count], at = order[at : at + count], at + count
    k, v = (torch.full((total + 2, heads, block, dim), float("nan"), dtype=dtype) for _ in range(2))
    used = table[table >= 0]
    k[used], v[used] = torch.randn(2, total, heads, block, dim).to(dtype)
    summaries = torch.full((total + 2, heads, 2, dim), float("nan"), dtype=dtype)
    summarize_blocks(k, used, summaries, used)
    return torch.randn(len(blocks), heads * group, dim), k, v, table, summaries


def test_a_bound_is_never_below_a_score_and_close_for_one_key():
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        q, k, _, table, summaries = build([5, 0, 3], seed=seed, dtype=dtype)
        scores = score_pages(q, summaries, table, [5, 0, 3])
        assert torch.isneginf(scores[0, :, 5:]).all() and torch.isneginf(scores[1]).all()
        for s, count in ((0, 5), (2, 3)):
            keys = k[table[s, :count]].double().repeat_interleave(2, 1)
            true = torch.einsum("hd,bhtd->hbt", q[s].double(), keys).amax(-1)
            assert (scores[s, :, :count].double() >= true - 1e-5).all()
    q, k, _, table, summaries = build([4], block=16)
    k[:] = k[:, :, :1]  # all tokens of a block alike: the bound is the score
    summarize_blocks(k, table[0], summaries, table[0])
    true = torch.einsum("hd,bhd->hb", q[0], k[table[0], :, 0].repeat_interleave(2, 1))
    assert torch.allclose(score_pages(q, summaries, table, [4])[0], true, atol=1e-5)


def test_only_valid_tokens_are_summarised():
    q, k, _, table, summaries = build([3])
    last = table[0, 2]
    k[last, :, 5:] = float("nan")
    summarize_blocks(k, [last], summaries, [last], [5])
    assert torch.equal(summaries[last, :, 0], k[last, :, :5].amin(1))
    assert torch.equal(summaries[last, :, 1], k[last, :, :5].amax(1))
    assert torch.isfinite(score_pages(q, summaries, table, [3])).all()


def test_sinks_and_newest_are_always_in_and_order_is_kept():
    q, _, _, table, summaries = build([40, 3, 0, 7])
    counts = [40, 3, 0, 7]
    scores = score_pages(q, summaries, table, counts)
    scores[0, :, [0, 38, 39]] = -1e9
    picked = select_pages(scores, counts, 8, scale=0.25, keep_first=1, keep_last=2)
    assert picked.counts.tolist() == [8, 3, 0, 7]
    for s, count in enumerate(picked.counts.tolist()):
        ids = picked.indices[s, :count].tolist()
        assert ids == sorted(set(ids)) and (picked.indices[s, count:] == -1).all()
        assert set(torch.nonzero(picked.chosen[s]).flatten().tolist()) == set(ids)
    assert {0, 38, 39} <= set(picked.indices[0].tolist())
    compact = picked.table(table)
    assert (compact[0] == table[0, picked.indices[0].numpy()]).all() and (compact[1, 3:] == -1).all()
    assert picked.lengths([39 * 16 + 5, 48, 0, 112], 16).tolist() == [7 * 16 + 5, 48, 0, 112]


def test_choosing_all_blocks_is_full_attention(assert_close):
    q, k, v, table, summaries = build([6, 2])
    lens = [6 * 16 - 3, 20]
    scores = score_pages(q, summaries, table, [6, 2])
    picked = select_pages(scores, [6, 2], 6, scale=0.25)
    out, lse = paged_decode(q, k, v, picked.table(table), picked.lengths(lens, 16), scale=0.25)
    assert_close((out, lse), reference.paged_attention(q, k, v, table, lens, [0, 1, 2], scale=0.25))
    assert (omitted_share(scores, picked, lse, scale=0.25, block=16) == 0).all()


@pytest.mark.parametrize("k", [8, 16, 32])
def test_the_needle_s_page_is_recalled_among_many(k):
    """8,192 pages of noise; in one of them a key that one query head looks for."""
    generator = torch.Generator().manual_seed(k)
    summaries = torch.stack([torch.randn(8192, 2, 16, 64, generator=generator).amin(2) for _ in range(2)], 2)
    summaries[:, :, 1] = -summaries[:, :, 1]
    hits = 0
    for needle in (5, 4096, 8000, 17, 7777):
        q = torch.randn(1, 4, 64, generator=generator)
        mine = summaries.clone()
        mine[needle, 1, 1] = torch.maximum(mine[needle, 1, 1], 3 * q[0, 2])  # head 2 reads KV head 1
        mine[needle, 1, 0] = torch.minimum(mine[needle, 1, 0], 3 * q[0, 2])
        scores = score_pages(q, mine, np.arange(8192)[None], [8192])
        hits += needle in select_pages(scores, [8192], k, scale=0.125).indices[0].tolist()
    assert hits == 5


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 30),
    k=st.integers(2, 30),
    group=st.integers(1, 4),
    loud=st.floats(0.1, 8.0),
    seed=st.integers(0, 1 << 16),
)
def test_weight_left_out_is_within_its_bound(count, k, group, loud, seed):
    q, keys, v, table, summaries = build([count], group=group, seed=seed)
    q = q * loud
    scores = score_pages(q, summaries, table, [count])
    picked = select_pages(scores, [count], k, scale=0.25)
    kept = paged_decode(q, keys, v, picked.table(table), picked.lengths([count * 16], 16), scale=0.25)
    full = reference.paged_attention(q, keys, v, table, [count * 16], [0, 1], scale=0.25)
    share = -torch.expm1(kept[1].double() - full[1])
    bound = omitted_share(scores, picked, kept[1], scale=0.25, block=16).double()
    assert (share <= bound + 1e-5).all()
    spread = 2 * v[table[0]].abs().amax()
    assert ((kept[0] - full[0]).abs() <= bound[..., None] * spread + 1e-5).all()


def test_what_does_not_fit_is_refused():
    q, k, _, table, summaries = build([3])
    for arguments, match in (
        ((q[..., :8], summaries, table, [3]), "belong together"),
        ((q, summaries, table, [3, 3]), "num_blocks"),
        ((q, summaries, table, [4]), "blocks"),
        ((q, summaries, table + 10, [3]), r"block_table\[0, 0\]"),
    ):
        with pytest.raises(ValueError, match=match):
            score_pages(*arguments)
    for arguments, match in (
        ((k, [0], summaries[:, :1], [0]), "summaries must be"),
        ((k, [0], summaries.bfloat16(), [0]), "round"),
        ((k, [9], summaries, [0]), "block ids"),
        ((k, [0], summaries, [9]), "summary ids"),
        ((k, [0, 1], summaries, [0]), "2 blocks"),
        ((k, [0], summaries, [0], [17]), "valid_lengths"),
    ):
        with pytest.raises(ValueError, match=match):
            summarize_blocks(*arguments)
    with pytest.raises(ValueError, match="k=2"):
        select_pages(torch.zeros(1, 1, 4), [4], 2, scale=1.0, keep_first=2, keep_last=1)
