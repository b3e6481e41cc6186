"""Scoring blocks with Triton gives what the CPU path gives; summaries of other pages are never read."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import score_pages, triton_select


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 24), (3, 4, 128)], ids=str)
def test_scores_are_those_of_the_cpu(dtype, shape):
    heads, group, dim = shape
    torch.manual_seed(0)
    summaries = torch.full((60, heads, 2, dim), float("nan"), dtype=dtype)
    summaries[:50] = torch.randn(50, heads, 2, dim).sort(2).values.to(dtype)
    table = torch.stack([torch.randperm(50)[:40] for _ in range(3)]).int()
    table[1, 7:] = 55
    counts = torch.tensor([40, 7, 0], dtype=torch.int32)
    q = torch.randn(3, heads * group, dim)
    found, expected = triton_select.score_pages(q, summaries, table, counts), score_pages(q, summaries, table, counts)
    assert torch.equal(torch.isneginf(found), torch.isneginf(expected))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
