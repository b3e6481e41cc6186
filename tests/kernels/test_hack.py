"""HACK's integer products on a CPU: the identity exactly, the rounding of q and p within stated bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import PageFormat, compressed_attention, quantize_blocks, reference, reference_compressed
from kvtier.kernels.cpu_hack import P_MAX, Q_MAX, hack_scores, hack_values, round_rows
from kvtier.kernels.cpu_quant import decode, hadamard, part_views

HACK = ["hack8", "hack4", "hack2"]
SPANS = [(1, 3, 2), (5, 2, 0), (1, 0, 4), (20, 1, 30)]


def exact_pages(fmt: PageFormat, count: int, seed: int) -> torch.Tensor:
    """Random codes with scales that are powers of two and zeros in quarters: every term is exact in float32."""
    torch.manual_seed(seed)
    pages = torch.randint(0, 256, (count, fmt.layer_bytes), dtype=torch.uint8)
    for views in part_views(pages, fmt):
        views.scales.copy_(2.0 ** torch.randint(-2, 3, views.scales.shape))
        views.zeros.copy_(torch.randint(-20, 21, views.zeros.shape) / 4)
    return pages


@pytest.mark.parametrize("name", HACK)
@pytest.mark.parametrize("seed", range(5))
def test_scores_and_sums_are_the_integer_identity_exactly(name, seed):
    fmt = PageFormat(name, 2, 32, 64, group=64)
    pages, ids = exact_pages(fmt, 3, seed), torch.tensor([2, 0, 1])
    k, v = reference_compressed.read_pages(pages[ids], fmt)
    q = torch.randint(-127, 128, (2, 5, 64)).float()
    q[..., 0] = 127.0  # so that the step is a power of two
    q *= 0.25
    keys, values = part_views(pages, fmt)
    scores = hack_scores(q, decode(keys.codes[ids], keys.part, torch.empty(3, 2, 32, 64)), keys, ids)
    expected = torch.einsum("hrd,nhtd->nhrt", q.double(), k)
    assert torch.equal(scores.double(), expected)
    weights = torch.randint(0, 128, (3, 2, 5, 32)).float()
    weights[..., 0] = 127.0
    acc = torch.zeros(2, 5, 64)
    hack_values(weights / 128, decode(values.codes[ids], values.part, torch.empty(3, 2, 32, 64)), values, ids, acc)
    assert torch.equal(acc.double(), torch.einsum("nhrt,nhtd->hrd", weights.double() / 128, v))


def test_the_identity_holds_with_all_four_terms():
    torch.manual_seed(0)
    a, b = torch.randint(-127, 128, (2, 50, 64)).double()
    scales, zeros = 2.0 ** torch.randint(-3, 4, (2, 50)).double(), torch.randint(-9, 10, (2, 50)).double() / 4
    direct = ((scales[0, :, None] * a + zeros[0, :, None]) * (scales[1, :, None] * b + zeros[1, :, None])).sum(-1)
    found = reference_compressed.homomorphic_product(a, scales[0], zeros[0], b, scales[1], zeros[1])
    assert torch.equal(found, direct)
    symmetric = scales[0] * (scales[1] * (a * b).sum(-1) + zeros[1] * a.sum(-1))  # what is left when q's zero is 0
    assert torch.equal(
        symmetric, reference_compressed.homomorphic_product(a, scales[0], 0 * zeros[0], b, scales[1], zeros[1])
    )


@pytest.mark.parametrize("name", HACK)
def test_sums_of_integers_stay_exact_in_float32(name):
    fmt = PageFormat(name, 8, 128, 128, group=128)
    largest = 1 << (fmt.bits - 1)
    assert Q_MAX * largest * fmt.keys.group < 1 << 24 and P_MAX * largest * fmt.values.group < 1 << 24


def rounded_queries(case) -> torch.Tensor:
    """The queries that the integers stand for; rounded in float32, so that ties fall as they do in the code."""
    fmt = case.fmt
    q = case.q @ hadamard(fmt.head_dim) if fmt.rotates else case.q
    codes, step = round_rows(q.unflatten(-1, (-1, fmt.keys.group)))
    rounded = (codes.double() * step.double()).flatten(-2)
    return rounded @ reference_compressed.hadamard(fmt.head_dim) if fmt.rotates else rounded


def test_queries_are_rounded_to_the_nearest_of_255_steps():
    x = torch.randn(50, 64)
    codes, step = round_rows(x)
    assert (codes == codes.round()).all() and codes.abs().max() <= 127
    assert ((codes * step - x).abs() <= step / 2 * 1.0001).all()
    assert not round_rows(torch.zeros(2, 4))[0].any()


def check_bounds(case, out, lse) -> None:
    """LSE: float32 away from attention with the rounded q, and from the true q by the rounding of scores at most.

    out: p is rounded to 1/254 of the largest p of its row and partition, so it errs by that share of sum |v| at most.
    """
    fmt, k_v = case.fmt, reference_compressed.dequantize_pages(case.pages, case.fmt)
    q = rounded_queries(case)
    rounded = type(case)(**{**vars(case), "q": q}).expected()
    exact = case.expected()
    has_keys = ~torch.isneginf(exact[1])
    assert torch.equal(~torch.isneginf(lse), has_keys)
    assert ((lse - rounded[1])[has_keys].abs() < 2e-5).all()
    group = case.q.shape[1] // fmt.kv_heads
    for s, length in enumerate(case.kv_lens):
        rows = slice(case.cu_q[s], case.cu_q[s + 1])
        k, v = (reference.gather_tokens(x, torch.as_tensor(case.table[s]), length) for x in k_v)
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1).abs()
        drift = torch.einsum("thd,nhd->thn", (q - case.q.double())[rows].abs(), keys.abs()) * case.scale
        if length:
            assert ((lse - exact[1])[rows].abs() <= drift.amax(-1) + 2e-5).all()
            scores = torch.einsum("thd,nhd->thn", q[rows], keys) * case.scale
            weights = torch.exp(scores - rounded[1][rows][..., None])
            part = fmt.values.group
            largest = weights.unflatten(-1, (-1, part)).amax(-1)  # [t, h, partitions]
            sums = values.unflatten(0, (-1, part)).sum(1)  # [partitions, h, d]
            bound = torch.einsum("thp,phd->thd", largest, sums) / 254
            assert ((out - rounded[0])[rows].abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.parametrize("name", HACK)
def test_rounding_errs_within_the_stated_bounds(make_pages, name):
    for block, dim, size, outliers in ((64, 64, 64, 0.0), (32, 128, 128, 0.0), (32, 64, 64, 10.0)):
        case = make_pages(PageFormat(name, 2, block, dim, group=size), SPANS, group=3, outliers=outliers)
        out, lse = compressed_attention(
            case.q, case.pages, case.fmt, case.table, case.kv_lens, case.cu_q, case.ahead, scale=case.scale
        )
        check_bounds(case, out, lse)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(HACK),
    block=st.sampled_from([32, 64]),
    spans=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=3),
    group=st.sampled_from([1, 4, 5]),
    seed=st.integers(0, 1 << 16),
)
def test_any_step_errs_within_the_stated_bounds(make_pages, name, block, spans, group, seed):
    case = make_pages(PageFormat(name, 2, block, 64, group=64), spans, group=group, seed=seed)
    out, lse = compressed_attention(
        case.q, case.pages, case.fmt, case.table, case.kv_lens, case.cu_q, case.ahead, scale=case.scale
    )
    check_bounds(case, out, lse)


def test_rotation_saves_two_bit_keys_from_outlier_channels(make_pages):
    """Per token, one loud channel takes all four codes of its partition; a Hadamard rotation spreads it."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 64, 128)
    k[..., [5, 70]] += 20.0
    errors = {}
    for name in ("hack2", "int2"):
        fmt = PageFormat(name, 1, 64, 128, group=32)
        pages = torch.zeros(1, fmt.layer_bytes, dtype=torch.uint8)
        quantize_blocks(k, k, [0], pages, [0], fmt)
        errors[name] = float((reference_compressed.dequantize_pages(pages, fmt)[0] - k).norm())
        if name == "hack2":  # the same codes without the rotation
            rows = k.view(64, 4, 32)
            low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
            step = (high - low) / 3
            plain = torch.floor((rows - low) / step + 0.5) * step + low
            errors["unrotated"] = float((plain.view_as(k) - k).norm())
    assert errors["hack2"] < 0.7 * errors["unrotated"]
