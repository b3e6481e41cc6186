"""The cuts of sampling: what may be drawn, and nothing else; with one token left, drawing is choosing the best."""

from __future__ import annotations

import pytest
import torch

from kvtier import SamplingParams
from kvtier.engine.sampling import Sampler
from kvtier.tiers.errors import ConfigError

LOGITS = torch.tensor([0.0, 3.0, 2.5, 1.0, -4.0])  # probabilities 0.028, 0.56, 0.34, 0.076, 0.0005


def drawn(**params) -> set[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3, **params))
    return {sampler.choose(LOGITS) for _ in range(400)}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.8}, {1, 2}),
        ({"min_p": 0.5}, {1, 2}),
        ({"min_p": 0.1}, {1, 2, 3}),
        ({"top_k": 4, "top_p": 0.93, "min_p": 0.3}, {1, 2}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_only_what_the_cuts_leave_is_drawn(params, allowed):
    assert drawn(**params) - {4} == allowed and (not params or drawn(**params) == allowed)


@pytest.mark.parametrize(
    "params", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"top_k": -1}]
)
def test_cuts_that_cannot_be_are_refused(params):
    with pytest.raises(ConfigError, match=next(iter(params))):
        SamplingParams(**params)
