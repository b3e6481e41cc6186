"""What a request asks for, what it gets back, and how the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tiers.errors import ConfigError
from .attending import Attention, SelectionReport

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy, and so is what float32 logits cannot be divided by.

    top2_margin: also report best minus second-best logit of each token, in nats. logprobs: also report the natural log
    of each token's probability (before temperature and cuts) and of so many best ones. speculation: "ngram" (what
    followed the same tokens before) or "model" (the engine's draft model) proposes tokens; the output stays the same.
    num_beams: beam search with the best n of so many beams as outputs, best first; scores are summed natural logs divided
    by length ** length_penalty; with early_stopping it ends once num_beams have stopped.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    top2_margin: bool = False
    logprobs: int | None = None
    speculation: str | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    attention: Attention | None = None  # None: the engine's; text such as "select:32" is understood

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float) and math.isfinite(self.temperature):
            exact = float(self.temperature)
            object.__setattr__(self, "temperature", 0.0 if 0 < exact < LEAST_TEMPERATURE else exact)
        else:
            raise ConfigError(f"temperature={self.temperature!r}: need a finite number of at least 0")
        if self.max_tokens < 0 or self.n < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}, n={self.n}: need max_tokens >= 0 and n >= 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}, min_p={self.min_p}, top_k={self.top_k}: need "
                "temperature >= 0, 0 < top_p <= 1, 0 <= min_p < 1, top_k >= 0"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs={self.logprobs}: need 0 to {MAX_LOGPROBS}")
        if self.speculation not in (None, "ngram", "model"):
            raise ConfigError(f"speculation={self.speculation!r} is unknown; choose 'ngram' or 'model'")
        if self.attention is not None:
            object.__setattr__(self, "attention", Attention.parse(self.attention))
            if not self.attention.is_exact and (self.speculation or self.num_beams > 1):
                raise ConfigError(
                    f"attention={self.attention.kind!r} with speculation={self.speculation!r}, num_beams={self.num_beams}: "
                    "drafts and beams are compared by exact attention; use attention='full' with them"
                )
        if self.num_beams < 1 or (self.num_beams > 1 and self.n > self.num_beams):
            raise ConfigError(
                f"num_beams={self.num_beams}, n={self.n}: need num_beams >= 1, and no more outputs than beams"
            )
        if self.num_beams > 1 and (self.temperature or self.speculation or self.max_tokens < 1):
            raise ConfigError(
                f"num_beams={self.num_beams} with temperature={self.temperature}, speculation={self.speculation!r}, "
                f"max_tokens={self.max_tokens}: beam search is greedy, without speculation, of at least one token"
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
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # and right
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logs of probabilities: of the token, and of the best ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Output:
    """One finished sequence. `margins` in nats when asked for; `ledger` says where the time to first token went.

    finish_reason: length, stop, cancelled, deadline or error. `is_durable`: whether a crash keeps this turn of a session; None
    where nobody has stored it.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    usage: Usage = field(default_factory=Usage)
    margins: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None  # of beam search
    selection: SelectionReport | None = None  # of selected attention: what its steps read
    ledger: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    is_durable: bool | None = None

    def note(self, params: SamplingParams, logits: Tensor, token: int) -> None:
        """Keep what the parameters ask for of the logits [vocab] that a token was chosen from."""
        if params.top2_margin:
            self.margins.append(margin(logits))
        if params.logprobs is not None:
            scores = logits.float().log_softmax(-1)
            best = scores.topk(params.logprobs)
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self.logprobs.append(TokenLogprob(token, float(scores[token]), top))


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
            return best_of(logits)
        scores = logits.float().cpu()[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))


def best_of(logits: Tensor) -> int:
    """Index of the first of the highest logits [vocab]. On a CPU torch's own argmax takes ten times as long as numpy's."""
    if logits.is_cpu and logits.dtype is not torch.bfloat16:  # which numpy lacks
        return int(logits.numpy().argmax())
    return int(logits.argmax())


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
