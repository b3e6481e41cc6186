"""Widened summaries: no key that a tier gives back in fewer bits lies outside them, so the bound on scores holds for it too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import (
    PageFormat,
    dequantize_blocks,
    omitted_share,
    quantize_blocks,
    score_pages,
    select_pages,
    summarize_blocks,
    summarize_pages,
    widen_summaries,
)
from kvtier.kernels.formats import FORMATS

HEADS, BLOCK, DIM = 2, 32, 64


def keys_of(seed: int, scale: float, shift: float, outlier: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(3, HEADS, BLOCK, DIM, generator=generator) * scale
    k += shift * scale * torch.randn(1, HEADS, 1, DIM, generator=generator)
    k[..., seed % DIM] *= outlier
    return k.to(dtype)


def rounded(k: torch.Tensor, name: str) -> torch.Tensor:
    fmt, ids = PageFormat(name, HEADS, BLOCK, DIM), range(len(k))
    pages = torch.zeros(len(k), fmt.layer_bytes, dtype=torch.uint8)
    quantize_blocks(k, k, ids, pages, ids, fmt)
    back = torch.empty_like(k)
    dequantize_blocks(pages, ids, back, torch.empty_like(k), ids, fmt)
    return back


def summaries_of(k: torch.Tensor, *names: str) -> torch.Tensor:
    made = torch.empty(len(k), HEADS, 2, DIM, dtype=k.dtype)
    summarize_blocks(k, range(len(k)), made, range(len(k)))
    for name in names:
        widen_summaries(made, range(len(k)), PageFormat(name, HEADS, BLOCK, DIM))
    return made


def is_covered(k: torch.Tensor, summaries: torch.Tensor) -> bool:
    return bool((k.amin(2) >= summaries[:, :, 0]).all() and (k.amax(2) <= summaries[:, :, 1]).all())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]),
    shift=st.sampled_from([0.0, 3.0]),
    outlier=st.sampled_from([1.0, 50.0]),
)
def test_no_rounded_key_lies_outside_its_widened_summary(name, dtype, seed, scale, shift, outlier):
    k = keys_of(seed, scale, shift, outlier, dtype)
    assert is_covered(rounded(k, name), summaries_of(k, name))


@pytest.mark.parametrize(("above", "below"), [("int8", "int4"), ("int8", "int2"), ("fp8", "int4"), ("hack8", "hack4")])
def test_keys_rounded_twice_are_covered_by_both(above, below):
    for seed in range(5):
        k = keys_of(seed, 1.0, 3.0, 20.0)
        assert is_covered(rounded(rounded(k, above), below), summaries_of(k, above, below))


@pytest.mark.parametrize("name", ["fp8", "int8", "hack8", "hack2"])
def test_a_summary_that_was_not_widened_does_not_cover_them(name):
    k = keys_of(1, 1.0, 3.0, 20.0)
    assert not is_covered(rounded(k, name), summaries_of(k))


@pytest.mark.parametrize(
    ("name", "most"), [("int2", 0.01), ("int4", 0.01), ("int8", 0.02), ("hack8", 0.05), ("fp8", 0.2)]
)
def test_summaries_widen_by_little(name, most):
    k = keys_of(2, 1.0, 1.0, 1.0)
    narrow, wide = summaries_of(k), summaries_of(k, name)
    width = (narrow[:, :, 1] - narrow[:, :, 0]).mean()
    assert 0 < (wide[:, :, 1] - wide[:, :, 0]).mean() / width - 1 < 2 * most


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "hack8"])
def test_the_bound_on_what_is_left_out_holds_for_rounded_blocks(name):
    for seed in range(4):
        k, scale = keys_of(seed, 2.0, 1.0, 1.0).repeat(4, 1, 1, 1), 0.3
        k[:, :, 1:] = k[:, :, :1]  # all keys of a block alike: the bound of exact keys is reached
        k += 0.01 * torch.randn(k.shape, generator=torch.Generator().manual_seed(seed))
        kept, q = rounded(k, name), torch.randn(1, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(seed + 99))
        scores = score_pages(q, summaries_of(k, name), torch.arange(len(k))[None], [len(k)])
        chosen = select_pages(scores, [len(k)], 4, scale=scale)
        products = torch.einsum("hgd,nhbd->hgnb", q[0].view(HEADS, 2, DIM), kept).flatten(0, 1) * scale
        read = chosen.chosen[0]
        lse = products[:, read].flatten(1).logsumexp(1)
        left = products[:, ~read].flatten(1).logsumexp(1)
        share = torch.sigmoid(left - lse)
        told = omitted_share(scores, chosen, lse[None], scale=scale, block=BLOCK)[0]
        assert (told >= share - 1e-6).all()


def test_formats_of_another_shape_are_refused():
    made = torch.zeros(2, HEADS, 2, DIM)
    with pytest.raises(ValueError, match=r"summaries must be \[n, 4, 2, 64\]"):
        widen_summaries(made, [0], PageFormat("int8", 4, BLOCK, DIM))
    with pytest.raises(ValueError, match=r"summary ids\[0\] = 2"):
        widen_summaries(made, [2], PageFormat("int8", HEADS, BLOCK, DIM))


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["fp8", "int8", "int4", "int2"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    outlier=st.sampled_from([1.0, 50.0]),
)
def test_summaries_of_compressed_pages_cover_their_keys_closely(name, dtype, seed, scale, outlier):
    k = keys_of(seed, scale, 3.0, outlier)
    fmt, ids = PageFormat(name, HEADS, BLOCK, DIM), range(len(k))
    pages = torch.zeros(len(k) + 1, fmt.layer_bytes, dtype=torch.uint8)
    quantize_blocks(k, k, ids, pages, [i + 1 for i in ids], fmt)
    back, made = torch.empty_like(k), torch.full((len(k), HEADS, 2, DIM), float("nan"), dtype=dtype)
    dequantize_blocks(pages, [i + 1 for i in ids], back, torch.empty_like(k), ids, fmt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvtier.kernels.rounding.KEYS_AT_ONCE", HEADS * BLOCK * DIM * 2)  # in two pieces
        summarize_pages(pages, [i + 1 for i in ids], fmt, made, ids)
    assert is_covered(back, made)
    close = torch.stack([back.amin(2), back.amax(2)], 2)
    assert ((made.float() - close).abs() <= 2 * torch.finfo(dtype).eps * close.abs() + 1e-7).all()


def test_pages_whose_attention_rounds_q_have_no_summaries():
    fmt = PageFormat("hack8", HEADS, BLOCK, DIM)
    with pytest.raises(ValueError, match="hack8"):
        summarize_pages(
            torch.zeros(1, fmt.layer_bytes, dtype=torch.uint8), [0], fmt, torch.zeros(1, HEADS, 2, DIM), [0]
        )
