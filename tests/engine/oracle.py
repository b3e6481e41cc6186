"""What a model says by itself: one forward pass over prompt and answer proves every token of the answer.

Nothing of kvtier runs here but the sampler, whose choices are repeated on the model's own logits. A greedy token may be any
whose logit is the highest but for rounding: steps of other shapes add in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvtier import SamplingParams
from kvtier.engine.sampling import Sampler

ROUNDING = 2e-3  # nats between two logits that are the same but for the order of adding


class Oracle:
    """A model that no engine has."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], window: int = 0, sinks: int = 0) -> Tensor:
        """Of every place [tokens, vocab]; each sees all before it, or with a window that and the sinks."""
        mask = None
        if window:
            q, k = torch.arange(len(tokens))[:, None], torch.arange(len(tokens))[None]
            visible = (k <= q) & ((q - k < window) | (k < sinks))
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        found: Tensor = self.model(torch.tensor([list(tokens)]), attention_mask=mask, use_cache=False).logits[0]
        return found

    def check(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        params: SamplingParams,
        index: int = 0,
        *,
        window: int = 0,
        sinks: int = 0,
        rounding: float = ROUNDING,
    ) -> None:
        """Raises AssertionError at the first token of the answer that the model would not have said."""
        if not answer:
            return
        rows = self.logits([*prompt, *answer], window, sinks)[len(prompt) - 1 : -1]
        sampler = Sampler(params, index)
        for place, (row, token) in enumerate(zip(rows, answer, strict=True)):
            best = sampler.choose(row)
            is_right = token == best or (params.temperature == 0 and float(row[best] - row[token]) <= rounding)
            assert is_right, (
                f"token {place} of the answer to {len(prompt)} tokens is {token} (logit {float(row[token]):.4f}), "
                f"not {best} ({float(row[best]):.4f})"
            )

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """Sum of the natural logs of the answer's probabilities, per token."""
        rows = self.logits([*prompt, *answer])[len(prompt) - 1 : -1].log_softmax(-1)
        return float(rows[torch.arange(len(answer)), torch.tensor(list(answer))].sum()) / len(answer)
