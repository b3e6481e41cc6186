"""Quantising with torch: within half a step of what was given, equal to the float64 reference, bad numbers refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels import PageFormat, dequantize_blocks, quantize_blocks, reference_compressed
from kvtier.kernels.cpu_quant import from_table, grouped, hadamard, part_views
from kvtier.kernels.formats import FORMATS

SHAPES = [(64, 64, 32), (32, 64, 64), (16, 32, 32), (128, 128, 128)]  # block, head_dim, group


def legal(name: str, heads: int, block: int, dim: int, group: int) -> PageFormat:
    """The format nearest to what is asked: HACK's wants longer blocks and groups."""
    if name.startswith("hack"):
        bits = int(name.removeprefix("hack"))
        block, group = max(block, 32), max(group, next(g for g in (32, 64, 128) if g >= dim * bits // 8))
    return PageFormat(name, heads, block, dim, group=group)


def make(fmt: PageFormat, count: int, seed: int = 0, outliers: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random K and V; K with constant outlier channels, as real models have them."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(count, fmt.kv_heads, fmt.block, fmt.keys.dim, generator=generator)
    k[..., 3::16] += outliers
    return k, torch.randn(count, fmt.kv_heads, fmt.block, fmt.values.dim, generator=generator)


def compress(fmt: PageFormat, k: torch.Tensor, v: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    pages = torch.full((rows or len(k), fmt.layer_bytes), 0xFF, dtype=torch.uint8)
    quantize_blocks(k, v, range(len(k)), pages, range(len(k)), fmt)
    return pages


def bound(views, k: torch.Tensor) -> torch.Tensor:
    """Half a step and the rounding of a float16 zero, per value; e4m3: a sixteenth of the value, or of its last step."""
    rows, _ = grouped(k, views.part)
    scale = from_table(views.scales.double(), views.part)
    if views.part.axis == "page":
        return torch.maximum(rows.abs() / 16, scale * 2**-10).view(k.shape) * 1.0001
    zero = from_table(views.zeros.double(), views.part).abs() if views.zeros is not None else 0.0
    return ((scale / 2 + zero * 2**-11) * 1.0001 + 1e-6).expand(rows.shape).reshape(k.shape)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_read_back_is_within_half_a_step(name, shape):
    block, dim, group = shape
    fmt = legal(name, 2, block, dim, group)
    for outliers in (0.0, 30.0):
        k, v = make(fmt, 3, outliers=outliers)
        pages = compress(fmt, k, v)
        stored_k, stored_v = reference_compressed.read_pages(pages, fmt)
        k_rotated = k @ hadamard(dim) if fmt.rotates else k
        for x, stored, views in zip((k_rotated, v), (stored_k, stored_v), part_views(pages, fmt)):
            assert ((x.double() - stored).abs() <= bound(views, x.double())).all()


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_zeros_are_the_reference_s(name):
    fmt = legal(name, 1, 32, 64, 32)
    k, v = make(fmt, 1)
    pages = compress(fmt, k, v)
    k = k @ hadamard(64) if fmt.rotates else k
    for x, stored, views in zip((k, v), reference_compressed.read_pages(pages, fmt), part_views(pages, fmt)):
        part = views.part
        for place, tokens, channels in reference_compressed.groups(part):
            values = x[0, 0, tokens, channels].double().numpy()
            codes, scale, zero = reference_compressed.quantize_group(values, part)
            assert float(views.scales[0, 0][place]) == scale
            assert views.zeros is None or float(views.zeros[0, 0][place]) == zero
            wrong = np.abs(codes * scale + zero - stored[0, 0, tokens, channels].numpy()) > 1e-9
            steps = (values - zero) / scale
            is_tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-4  # float32 may fall on the other side
            assert not (wrong & ~is_tie).any() if part.axis != "page" else wrong.mean() < 0.01


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_come_back_where_they_are_wanted(name, dtype):
    fmt = PageFormat(name, 2, 32, 64, group=64)
    k, v = (x.to(dtype) for x in make(fmt, 3))
    pages = torch.full((6, fmt.layer_bytes + 128), 0xFF, dtype=torch.uint8)[:, 128:]  # a layer's slice of wider rows
    quantize_blocks(k, v, [2, 0], pages, np.array([5, 1]), fmt)
    assert (pages[[0, 2, 3, 4]] == 0xFF).all()
    out_k, out_v = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    dequantize_blocks(pages, [1, 5], out_k, out_v, [2, 1], fmt)
    expected = reference_compressed.dequantize_pages(pages[[1, 5]], fmt)
    for out, wanted in zip((out_k, out_v), expected):
        assert torch.isnan(out[0]).all()
        assert torch.allclose(out[[2, 1]].double(), wanted, atol=2e-6, rtol=2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("name", ["int4", "int2", "hack4"])
def test_constant_channels_are_exact(name):
    fmt = PageFormat(name, 1, 32, 32, group=32)
    k = torch.randn(32).bfloat16().float().expand(1, 1, 32, 32).contiguous()
    k = k if not fmt.is_hack else k.transpose(2, 3).contiguous()
    v = torch.full((1, 1, 32, 32), -3.25)
    pages = compress(fmt, k @ hadamard(32) if fmt.rotates else k, v)
    stored_k, stored_v = reference_compressed.read_pages(pages, fmt)
    assert torch.equal(stored_v, v.double())
    assert fmt.rotates or torch.equal(stored_k, k.double())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_numbers_that_are_not_finite_are_refused_with_their_place(name, bad):
    fmt = legal(name, 2, 32, 64, 32)
    k, v = make(fmt, 2)
    v[1, 1, 20, 40] = bad
    with pytest.raises(ValueError, match="block 1 of those given, KV head 1"):
        compress(fmt, k, v)


@pytest.mark.parametrize("name", FORMATS)
def test_with_marks_bad_blocks_are_marked_and_the_others_written(name):
    """For devices that nobody may wait for: K and V mark the same entry, and nobody takes a mark back."""
    fmt = legal(name, 2, 32, 64, 32)
    k, v = make(fmt, 5)
    good = compress(fmt, k, v)
    k[1, 0, 3, 5], v[3, 1, 20, 40] = float("nan"), 1e30
    pages, bad = torch.zeros_like(good), torch.tensor([0, 0, 0, 0, 1, 7], dtype=torch.int32)
    quantize_blocks(k, v, range(5), pages, range(5), fmt, bad=bad)
    assert bad.tolist() == [0, 1, 0, 1, 1, 7]  # longer than there are blocks
    kept = torch.zeros_like(good)
    quantize_blocks(k[::2], v[::2], range(3), kept, [0, 2, 4], fmt)
    assert torch.equal(pages[::2], kept[::2])
    for wrong in (bad[:4], bad.long(), bad.repeat(2)[::2], bad[None]):
        with pytest.raises(ValueError, match="bad must be"):
            quantize_blocks(k, v, range(5), pages, range(5), fmt, bad=wrong)


def test_zeros_and_tiny_numbers_survive():
    for name in FORMATS:
        fmt = legal(name, 1, 16, 32, 32)
        for size in (0.0, 1e-9, 1e-4):
            k, v = (size * x for x in make(fmt, 1))
            out_k, out_v = torch.empty_like(k), torch.empty_like(v)
            dequantize_blocks(compress(fmt, k, v), [0], out_k, out_v, [0], fmt)
            assert (out_k - k).abs().max() <= max(size, 1e-7) * 4 and torch.isfinite(out_v).all()


def test_conversions_that_do_not_fit_are_refused(monkeypatch):
    fmt = PageFormat("int4", 2, 32, 64, group=32)
    k, v = make(fmt, 2)
    pages = torch.zeros(4, fmt.layer_bytes, dtype=torch.uint8)
    for change, match in (
        (dict(k=k[:, :1]), "k must be"),
        (dict(v=v[..., :32]), "v must be"),
        (dict(pages=pages[:, :-1]), "uint8"),
        (dict(pages=pages.float()), "uint8"),
        (dict(pages=torch.zeros(4, fmt.layer_bytes + 8, dtype=torch.uint8)[:, 8:]), "multiples of 16"),
        (dict(source_ids=[0, 2]), "block ids"),
        (dict(target_ids=[0, 4]), "page ids"),
        (dict(target_ids=[0]), "2 blocks for 1"),
    ):
        arguments = dict(k=k, v=v, source_ids=[0, 1], pages=pages, target_ids=[0, 1], fmt=fmt) | change
        with pytest.raises(ValueError, match=match):
            quantize_blocks(**arguments)
    monkeypatch.setenv("KVTIER_DEBUG", "1")
    with pytest.raises(ValueError, match="more than once"):
        quantize_blocks(k, v, [0, 1], pages, [2, 2], fmt)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    block=st.sampled_from([16, 32, 128]),
    dim=st.sampled_from([32, 64, 128]),
    group=st.sampled_from([32, 64, 128]),
    heads=st.integers(1, 3),
    size=st.floats(1e-3, 1e3),
    shift=st.floats(-100.0, 100.0),
    seed=st.integers(0, 1 << 16),
)
def test_any_format_errs_by_half_a_step_at_most(name, block, dim, group, heads, size, shift, seed):
    fmt = legal(name, heads, block, dim, group)
    k, v = make(fmt, 2, seed)
    v = v * size + shift
    pages = compress(fmt, k, v)
    stored = reference_compressed.read_pages(pages, fmt)[1]
    assert ((v.double() - stored).abs() <= bound(part_views(pages, fmt)[1], v.double())).all()
