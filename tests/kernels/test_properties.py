"""Any step through the CPU path equals the reference, whatever lies in the slots that nobody owns.

Shapes, lengths, orders of pages and rules are drawn; the slots outside are NaN or an infinity, so one that is read shows in
the output. Compressed pages, rounding and selection have such tests of their own beside them; `interpreted/` draws the same
for the Triton kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import (
    PageFormat,
    block_attention,
    compressed_attention,
    copy_blocks,
    gather_rows,
    merge_many,
    merge_states,
    mixed_attention,
    paged_attention,
    paged_decode,
    paged_prefill,
    plan_turns,
    quantize_blocks,
    reference,
    scatter_rows,
    score_pages,
    summarize_blocks,
    turned_attention,
    write_kv,
)

POISON = st.sampled_from([float("nan"), float("inf"), float("-inf")])
BLOCKS = st.sampled_from([16, 32, 64])
GROUPS = st.sampled_from([1, 2, 4, 7, 8])
DIMS = st.sampled_from([(16, 16), (64, 64), (24, 16), (32, 80)])
ORDERS = st.sampled_from(["scattered", "runs", "woven"])
SEEDS = st.integers(0, 1 << 16)
WINDOWS = st.none() | st.integers(1, 150)
SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 150)), min_size=1, max_size=4).map(
    lambda spans: [(rows, rows + before) for rows, before in spans]
)
few = settings(max_examples=10, deadline=None)


@few
@given(
    spans=SPANS, heads=st.integers(1, 3), group=GROUPS, dims=DIMS, block=BLOCKS, order=ORDERS, poison=POISON, seed=SEEDS,
    window=WINDOWS, sinks=st.integers(0, 40), softcap=st.none() | st.just(3.0),
)  # fmt: skip
def test_any_step_matches_the_reference(make_case, assert_close, spans, **drawn):
    case = make_case(spans, **drawn)
    expected = case.expected()
    assert_close(case.run(paged_attention), expected, 5e-6, 1e-5)
    assert_close(case.run(paged_prefill), expected, 5e-6, 1e-5)


@few
@given(
    lens=st.lists(st.integers(0, 150), min_size=1, max_size=4), heads=st.integers(1, 2), group=GROUPS, block=BLOCKS,
    order=ORDERS, poison=POISON, seed=SEEDS, window=WINDOWS, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_decode_matches_the_reference(make_case, assert_close, lens, **drawn):
    case = make_case([(int(keys > 0), keys) for keys in lens], sinks=4, **drawn)
    out, lse = case.expected()
    has_keys = torch.tensor([keys > 0 for keys in lens])
    q = torch.randn(len(lens), *case.q.shape[1:]).to(case.q.dtype)
    q[has_keys] = case.q
    found = paged_decode(q, case.k, case.v, case.table, lens, scale=case.scale, **case.rules)
    loose = case.q.dtype == torch.bfloat16
    assert_close((found[0][has_keys], found[1][has_keys]), (out, lse), 2e-2 if loose else 5e-6, 1e-3 if loose else 1e-5)
    assert not found[0][~has_keys].any() and torch.isneginf(found[1][~has_keys]).all()


@few
@given(
    rows=st.integers(1, 40), keys=st.integers(0, 5), heads=st.integers(1, 3), group=GROUPS, dims=DIMS, block=BLOCKS,
    order=ORDERS, poison=POISON, seed=SEEDS,
)  # fmt: skip
def test_any_staged_blocks_match_the_reference(make_case, assert_close, rows, keys, **drawn):
    case = make_case([(0, keys * drawn["block"])], **drawn)
    q = torch.randn(rows, case.k.shape[1] * drawn["group"], case.k.shape[3])
    pages = case.table[0, :keys]
    found = block_attention(q, case.k, case.v, scale=case.scale, pages=pages)
    expected = reference.block_attention(q, case.k[pages], case.v[pages], scale=case.scale)
    assert_close(found, expected, 5e-6, 1e-5)


@few
@given(
    spans=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=3),
    name=st.sampled_from(["fp8", "int8", "int4", "int2"]), group=GROUPS, poison=POISON, seed=SEEDS, window=WINDOWS,
)  # fmt: skip
def test_any_compressed_blocks_and_their_tail_are_one_attention(
    make_pages, make_case, assert_close, spans, name, group, poison, seed, window
):
    fmt = PageFormat(name, 2, 32, 32, group=32)
    pages = make_pages(fmt, [(rows, blocks, more) for rows, blocks, more in spans], group=group, seed=seed)
    tail = make_case(
        [(rows, rows + more) for rows, _, more in spans], heads=2, group=group, dims=(32, 32), block=32, poison=poison,
        seed=seed + 1,
    )  # fmt: skip
    kind = dict(scale=0.2, window=window)
    out, lse = mixed_attention(
        pages.q,
        pages.pages,
        fmt,
        pages.table,
        pages.kv_lens,
        tail.k,
        tail.v,
        tail.table,
        tail.kv_lens,
        tail.cu_q,
        **kind,
    )
    parts = [
        compressed_attention(pages.q, pages.pages, fmt, pages.table, pages.kv_lens, pages.cu_q, pages.ahead, **kind),
        paged_attention(pages.q, tail.k, tail.v, tail.table, tail.kv_lens, tail.cu_q, **kind),
    ]
    expected = reference.merge_many(*(torch.stack([part[i].double() for part in parts]) for i in (0, 1)))
    assert_close((out, lse), expected, 5e-6, 1e-5)


@few
@given(
    blocks=st.lists(st.integers(0, 5), min_size=1, max_size=3), group=GROUPS, block=BLOCKS, poison=POISON, seed=SEEDS,
    offsets=st.lists(st.integers(-5000, 5000), min_size=1, max_size=3),
)  # fmt: skip
def test_any_turned_blocks_are_blocks_with_turned_keys(
    make_case, assert_close, blocks, group, block, poison, seed, offsets
):
    case = make_case(
        [(0, n * block) for n in blocks], group=group, block=block, dims=(32, 32), poison=poison, seed=seed
    )
    random = np.random.default_rng(seed)
    moved = random.choice(offsets, case.table.shape)
    inv_freq = 100.0 ** (-torch.arange(16) / 16)
    q = torch.randn(2 * len(blocks), *case.q.shape[1:])
    bounds = [2 * i for i in range(len(blocks) + 1)]
    found = turned_attention(
        q, case.k, case.v, case.table, case.kv_lens, bounds, plan_turns(moved, inv_freq), scale=case.scale
    )
    k = case.k.double().clone()
    for (s, i), offset in np.ndenumerate(moved):
        if i < blocks[s]:
            angles = float(offset) * inv_freq.double()
            low, high = k[case.table[s, i]].chunk(2, -1)
            turned = [low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()]
            k[case.table[s, i]] = torch.cat(turned, -1)
    parts = [
        reference.block_attention(
            q[2 * s : 2 * s + 2], k[case.table[s, :n]], case.v[case.table[s, :n]], scale=case.scale
        )
        for s, n in enumerate(blocks)
    ]  # fmt: skip
    assert_close(found, (torch.cat([o for o, _ in parts]), torch.cat([x for _, x in parts])), 1e-5, 2e-5)


@few
@given(
    lens=st.lists(st.integers(0, 150), min_size=1, max_size=3), block=BLOCKS, poison=POISON, seed=SEEDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), skipped=st.integers(1, 5),
)  # fmt: skip
def test_any_tokens_are_written_to_their_slots_and_nowhere_else(make_case, lens, block, poison, seed, dtype, skipped):
    case = make_case([(0, keys) for keys in lens], block=block, poison=poison, seed=seed, dtype=dtype)
    slots = np.concatenate(
        [case.table[s, np.arange(n) // block] * block + np.arange(n) % block for s, n in enumerate(lens)]
    )
    slots[::skipped] = -1
    before, k, v = case.k.clone(), case.k.clone(), case.v.clone()
    new_k, new_v = (torch.randn(len(slots), *x.shape[1::2]).to(dtype) for x in (k, v))
    write_kv(new_k, new_v, k, v, slots)
    expected = before.transpose(1, 2).flatten(0, 1).clone()
    kept = slots >= 0
    expected[torch.from_numpy(slots[kept])] = new_k[torch.from_numpy(kept)]
    assert torch.equal(k.transpose(1, 2).flatten(0, 1).view(torch.uint8), expected.view(torch.uint8))


@few
@given(count=st.integers(1, 12), width=st.integers(1, 70), taken=st.integers(0, 12), seed=SEEDS)
def test_any_rows_are_copied_as_they_are(count, width, taken, seed):
    random = np.random.default_rng(seed)
    source = torch.from_numpy(random.integers(0, 256, (count, width), np.uint8))
    target = torch.zeros_like(source)
    ids, places = random.integers(0, count, min(taken, count)), random.permutation(count)[: min(taken, count)]
    copy_blocks(source, target, ids, places)
    assert torch.equal(target[places], source[ids])
    gathered = gather_rows(source, ids)
    again = torch.zeros_like(target)
    scatter_rows(gathered, again, places)
    assert torch.equal(again, target)


@few
@given(parts=st.integers(1, 6), rows=st.integers(1, 5), loud=st.sampled_from([1.0, 80.0]), empty=POISON, seed=SEEDS)
def test_any_partial_results_merge_exactly_and_empty_ones_count_for_nothing(
    assert_close, parts, rows, loud, empty, seed
):
    generator = torch.Generator().manual_seed(seed)
    outs, lses = (torch.randn(parts, rows, 2, *width, generator=generator) for width in ((8,), ()))
    lses *= loud
    is_empty = torch.rand(lses.shape, generator=generator) < 0.3
    expected = reference.merge_many(
        outs.masked_fill(is_empty[..., None], 0.0), lses.masked_fill(is_empty, float("-inf"))
    )
    outs, lses = outs.masked_fill(is_empty[..., None], empty), lses.masked_fill(is_empty, float("-inf"))
    assert_close(merge_many(outs, lses), expected, 2e-6, 2e-5)
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], float("-inf"))
    for one in zip(outs, lses):
        out, lse = merge_states(out, lse, *one)
    # One after the other they meet an LSE that was rounded before: at 200 by 8e-6.
    assert_close((out, lse), expected, 2e-6 if loud == 1.0 else 1e-4, 2e-5 if loud == 1.0 else 1e-4)


@few
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=3), heads=st.integers(1, 2), group=GROUPS, poison=POISON,
    valid=st.integers(1, 16), seed=SEEDS,
)  # fmt: skip
def test_any_score_bounds_the_valid_keys_and_sees_no_others(make_case, counts, heads, group, poison, valid, seed):
    last = 16 - valid  # of each sequence's last block so many slots are not valid
    case = make_case([(0, max(16 * n - last, 0)) for n in counts], heads=heads, poison=poison, seed=seed)
    summaries = torch.full((len(case.k), heads, 2, 16), poison)
    owned = [(s, i, valid if i == n - 1 else 16) for s, n in enumerate(counts) for i in range(n)]
    pages = [int(case.table[s, i]) for s, i, _ in owned]
    if pages:
        summarize_blocks(case.k, pages, summaries, pages, [tokens for *_, tokens in owned])
    q = torch.randn(len(counts), heads * group, 16)
    scores = score_pages(q, summaries, case.table, counts)
    for s, i, tokens in owned:
        keys = case.k[case.table[s, i], :, :tokens].repeat_interleave(group, 0)
        products = torch.einsum("hd,htd->ht", q[s], keys)
        assert torch.isfinite(scores[s, :, i]).all()
        assert (scores[s, :, i] >= products.amax(1) - 1e-4).all()
    for s, n in enumerate(counts):
        assert torch.isneginf(scores[s, :, n:]).all()


@pytest.mark.parametrize("debug", ["0", "1"])
@pytest.mark.parametrize("entry", [-1, 10_000])
def test_every_kernel_that_takes_a_table_refuses_entries_outside_the_pool(make_case, monkeypatch, entry, debug):
    monkeypatch.setenv("KVTIER_DEBUG", debug)
    case = make_case([(1, 40), (3, 32)])
    case.table[1, 1] = entry
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        case.run(paged_attention)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        case.run(paged_prefill)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        paged_decode(case.q[:2], case.k, case.v, case.table, case.kv_lens, scale=1.0)
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        score_pages(case.q[:2], torch.zeros(len(case.k), 2, 2, 16), case.table, [3, 2])
    turns = plan_turns(np.zeros((2, 3), int), torch.ones(8))
    with pytest.raises(ValueError, match=r"block_table\[1, 1\]"):
        turned_attention(case.q, case.k, case.v, case.table, [32, 32], case.cu_q, turns, scale=1.0)
    with pytest.raises(ValueError, match=r"pages\[0\]"):
        block_attention(case.q, case.k, case.v, scale=1.0, pages=[entry])
    with pytest.raises(ValueError, match=r"block ids\[0\]"):
        summarize_blocks(case.k, [entry], torch.zeros(1, 2, 2, 16), [0])
    fmt = PageFormat("int8", 2, 16, 16, group=32)
    pages = torch.zeros(2, fmt.layer_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"page ids\[0\]"):
        quantize_blocks(case.k, case.v, [0], pages, [entry], fmt)
    for copy in (lambda: gather_rows(pages, [entry]), lambda: scatter_rows(pages, pages.clone(), [entry, 0])):
        with pytest.raises(ValueError, match=r"_ids\[0\]"):
            copy()
