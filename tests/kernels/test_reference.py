"""The references against cases small enough to know the answer, and against torch's own attention."""

from __future__ import annotations

import math

import torch

from kvtier.kernels import reference


def test_visibility_by_hand():
    seen = reference.visible_keys(2, 6, window=2, sinks=1)
    assert seen.tolist() == [[True, False, False, True, True, False], [True, False, False, False, True, True]]
    assert reference.visible_keys(3, 3).tolist() == torch.ones(3, 3, dtype=torch.bool).tril().tolist()


def test_one_key_is_its_value_and_its_score():
    q, k, v = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]]), torch.tensor([[[5.0]]])
    out, lse = reference.dense_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), scale=0.5)
    assert out.item() == 5.0 and lse.item() == 3.0
    out, lse = reference.dense_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), scale=0.5, softcap=2.0)
    assert math.isclose(lse.item(), 2.0 * math.tanh(1.5))


def test_paged_reference_equals_torch_attention(make_case):
    case = make_case([(12, 12)], group=1)
    keys, values = (reference.gather_tokens(x, torch.from_numpy(case.table[0]), 12) for x in (case.k, case.v))
    inputs = (x.double().transpose(0, 1)[None] for x in (case.q, keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=case.scale)
    assert torch.allclose(case.expected()[0], expected[0].transpose(0, 1))


def test_equal_parts_merge_to_their_mean():
    outs, lses = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1)
    out, lse = reference.merge_many(outs, lses)
    assert out.item() == 2.0 and math.isclose(lse.item(), math.log(2.0))
