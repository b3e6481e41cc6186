"""Merging with Triton: exact over any number of parts, parts without keys ignored."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import reference, triton_merge


def states(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(parts)
    outs, lses = torch.randn(parts, 5, 3, 20), 5 * torch.randn(parts, 5, 3)
    lses[:, 2, 1] = float("-inf")
    lses[0, 3:] = float("-inf")
    outs[torch.isneginf(lses)] = float("nan")
    return outs, lses


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_merge_many_is_exact(assert_close, parts):
    outs, lses = states(parts)
    assert_close(triton_merge.merge_many(outs, lses), reference.merge_many(outs, lses), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_states_is_exact(assert_close, dtype):
    outs, lses = states(2)
    outs = outs.to(dtype)
    result = triton_merge.merge_states(outs[0], lses[0], outs[1], lses[1])
    assert result[0].dtype == dtype
    expected = reference.merge_states(outs[0], lses[0], outs[1], lses[1])
    assert_close(result, expected, 1e-6 if dtype == torch.float32 else 2.0**-8)


def test_a_part_that_met_nan_makes_the_result_nan_and_not_empty(assert_close):
    """An empty row would be left out of the next merge, and what remains looks like an answer."""
    outs, lses = states(3)
    outs[1, 0, 0], lses[1, 0, 0] = float("nan"), float("nan")
    many, many_lse = triton_merge.merge_many(outs, lses)
    two, two_lse = triton_merge.merge_states(outs[0], lses[0], outs[1], lses[1])
    for out, lse in ((many, many_lse), (two, two_lse)):
        assert out[0, 0].isnan().all() and lse[0, 0].isnan()
        assert not out[0, 1:].isnan().any() and not lse.isnan()[1:].any()
    again, again_lse = triton_merge.merge_states(two, two_lse, outs[2], lses[2])
    assert again[0, 0].isnan().all() and again_lse[0, 0].isnan()


def test_rounding_is_to_the_nearest_even_bfloat16():
    """In the interpreter a cast to bfloat16 truncates; merging one part with nothing must give torch's rounding."""
    out = torch.randn(64, 4, 32) * torch.logspace(-20, 20, 64)[:, None, None]
    lse, nothing = torch.zeros(64, 4), torch.full((64, 4), float("-inf"))
    target, target_lse = torch.empty(64, 4, 32, dtype=torch.bfloat16), torch.empty(64, 4)
    parts, lses = torch.stack([out, out]), torch.stack([lse, nothing])
    triton_merge.merge_parts(parts, lses, target, target_lse)
    assert torch.equal(target, out.bfloat16())
