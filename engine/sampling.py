"""What a request asks for, what it gets back, and how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tiers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy. top2_margin: also report best minus second-best logit of each token, in nats."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    top2_margin: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or self.n < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}, n={self.n}: need max_tokens >= 0 and n >= 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}, min_p={self.min_p}, top_k={self.top_k}: need "
                "temperature >= 0, 0 < top_p <= 1, 0 <= min_p < 1, top_k >= 0"
            )


@dataclass(slots=True)
class Usage:
    """Tokens of a request. cached = device + host + disk, by the tier that held them when the request came."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    recomputed_tokens: int = 0
    ttft_s: float = 0.0


@dataclass(slots=True)
class Output:
    """One finished sequence. `margins` in nats when asked for; `ledger` says where the time to first token went."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    usage: Usage = field(default_factory=Usage)
    margins: list[float] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)
    text: str | None = None


class Sampler:
    """Chooses tokens of one sequence; a seed makes it repeatable.

    Without a seed, `state` (what `rng_state` of an earlier sampler said) goes on where that one stopped.
    """

    def __init__(self, params: SamplingParams, index: int = 0, *, state: bytes | None = None) -> None:
        self._params = params
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed(params.seed + index)
        elif state is not None:
            self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        else:
            self._generator.seed()
        self._warpers = _warpers(params)

    @property
    def rng_state(self) -> bytes:
        return bytes(self._generator.get_state().numpy())

    def choose(self, logits: Tensor) -> int:
        """The next token from logits [vocab]."""
        if self._params.temperature == 0:
            return int(logits.argmax())
        scores = logits.float().cpu()[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def margin(logits: Tensor) -> float:
    """Best minus second-best logit, in nats. Shapes: logits [vocab]."""
    best = logits.float().topk(2).values
    return float(best[0] - best[1])


def _warpers(params: SamplingParams) -> list[Any]:
    if params.temperature == 0:
        return []
    from transformers.generation import logits_process as lp

    warpers: list[Any] = []
    if params.temperature != 1.0:
        warpers.append(lp.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(lp.MinPLogitsWarper(params.min_p))
    return warpers
