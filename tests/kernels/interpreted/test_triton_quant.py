"""Quantising with Triton gives the bytes that torch gives, and reads back what torch reads back."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import PageFormat, quantize_blocks, triton_quant
from kvtier.kernels.cpu_quant import dequantize_part, hadamard, part_views, quantize_part
from kvtier.kernels.formats import FORMATS

SHAPES = [(64, 64, 32), (16, 32, 64), (32, 96, 128)]  # block, head_dim, group
CASES = [(n, s) for n in FORMATS for s in SHAPES if s[1] != 96 or n not in ("hack2", "hack4")]  # those rotate 2**n


@pytest.mark.parametrize("name, shape", CASES, ids=str)
def test_bytes_are_those_of_torch(name, shape):
    block, dim, group = shape
    if name.startswith("hack"):
        block, group = max(block, 32), max(group, dim if name == "hack8" else 32)
    fmt = PageFormat(name, 2, block, dim, group=group)
    torch.manual_seed(0)
    k, v = (x.transpose(1, 2) for x in torch.randn(2, 3, block, 2, dim))  # strided, as the pool's views are
    k, v = k * 3 + torch.randn(dim) * 10, v.bfloat16()
    v[0, 1, :4] = 0.0
    expected = torch.full((5, fmt.layer_bytes), 0x55, dtype=torch.uint8)
    pages = expected.clone()
    source, target = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    quantize_blocks(k, v, source, expected, target, fmt)
    keys = k.float() @ hadamard(dim) if fmt.rotates else k
    for x, views in zip((keys, v), part_views(pages, fmt)):
        triton_quant.quantize_part(x, views, source, target)
        back = torch.full((5, 2, block, dim), float("nan"))
        triton_quant.dequantize_part(views, back, target, source)
        wanted = dequantize_part(views, target.long(), torch.empty(2, 2, block, dim))
        assert torch.allclose(back[source.long()], wanted, atol=1e-6, rtol=1e-6)
        assert torch.isnan(back[[1, 3, 4]]).all()
        half = torch.empty(5, 2, block, dim, dtype=torch.bfloat16)
        triton_quant.dequantize_part(views, half, target, source)
        assert torch.equal(half[source.long()], back[source.long()].bfloat16())
    assert torch.equal(pages, expected)


SPOILT = [float("nan"), float("inf"), -float("inf"), 1e30]


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_that_no_format_holds_are_marked_as_torch_marks_them(name):
    """Minima and maxima pass over NaN, here as on a GPU, so a scale alone does not tell."""
    fmt = PageFormat(name, 2, 64, 64, group=64)
    k, v = torch.randn(2, len(SPOILT) + 4, 2, 64, 64, generator=torch.Generator().manual_seed(2))
    for i, value in enumerate(SPOILT):
        k[1 + i, 1, 63, 17] = v[1 + i, 0, 40, 63] = value
    k[-2, 0, :, 3] = v[-2, 1, 5] = 1e6 + torch.arange(64)  # a zero point beyond float16, between codes that would fit
    source = torch.arange(len(k) - 1, -1, -1, dtype=torch.int32)
    for x, views in zip((k, v), part_views(torch.zeros(len(k), fmt.layer_bytes, dtype=torch.uint8), fmt)):
        bad, wanted = (torch.zeros(len(k), dtype=torch.int32) for _ in range(2))
        triton_quant.quantize_part(x, views, source, source, bad)
        quantize_part(x[source.long()], views, source.long(), wanted)
        assert torch.equal(bad, wanted)
        assert wanted.flip(0).tolist() == [0, *[1] * len(SPOILT), 0, int(views.part.has_zeros), 0]


def test_every_fp8_value_and_every_tie_is_rounded_as_torch_rounds():
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[torch.isfinite(grid)].sort().values
    values = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.linspace(-447, 447, 1537), torch.randn(4000)])
    values = torch.cat([values, torch.zeros(-len(values) % 512)]).view(1, 1, -1, 32)
    block = 1 << (values.shape[2] - 1).bit_length()
    x = torch.zeros(1, 1, block, 32)
    x[:, :, : values.shape[2]] = values
    x[0, 0, -1, 0] = 448.0  # so that the scale is 1
    fmt = PageFormat("fp8", 1, block, 32)
    pages = torch.zeros(1, fmt.layer_bytes, dtype=torch.uint8)
    views = part_views(pages, fmt)[0]
    triton_quant.quantize_part(x, views, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert views.scales.item() == 1.0
    assert torch.equal(views.codes, x.to(torch.float8_e4m3fn).view(torch.uint8))
