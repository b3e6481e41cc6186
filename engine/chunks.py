"""Documents in any order: K/V of chunks that were computed alone, put one behind the other at other positions.

A chunk is stored as a prompt of its own, from position 0, so its name is its tokens and nothing before them; that makes it
valid as the beginning of any prompt, exactly. Used later in a prompt its keys are rotated to where it stands now, and what
is missing is that its tokens never saw the chunks before it: the answer is approximate. Computing the first tokens of
every chunk again, with everything before them in sight, mends the most of it. Guards: the model's own rotation is checked
layer by layer before any key is turned, and what was put together is never stored as if it were exact.

Sources: position-independent caching (EPIC, arXiv 2410.15332), CacheBlend (arXiv 2405.16444).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..kernels.rope import rotate, turn_table
from ..tiers.errors import ConfigError, UnsupportedModelError
from .hf import ModelSpec

PROBE_POSITION = 1021  # a token computed here and at 0 shows how a model rotates its keys
MAX_PROBE_ERROR = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of a key's largest channel
LoadChunk = Callable[[list[int]], Any]  # tokens -> a past of exactly these


@dataclass(frozen=True, slots=True)
class ChunkError:
    """What putting chunks together changed, against computing the whole prompt: of the logits after each further token.

    mean_kl_nats: Kullback-Leibler divergence of the next-token distributions; same_token: share of tokens where the most
    likely one is the same; key_error: of the keys, relative to their size, all layers together.
    """

    mean_kl_nats: float
    max_kl_nats: float
    same_token: float
    key_error: float
    recomputed_tokens: int
    reused_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.reused_tokens} tokens reused, {self.recomputed_tokens} recomputed: "
            f"keys off by {100 * self.key_error:.1f} %, "
            f"KL {self.mean_kl_nats:.2g} nats (at most {self.max_kl_nats:.2g}), "
            f"same token {100 * self.same_token:.0f} %"
        )


class KeyTurner:
    """Rotates cached keys of one model to other positions, as the model itself would have."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        """Raises UnsupportedModelError for a model whose keys cannot be moved, saying which layer and why."""
        self._family = model.config.model_type
        if any(layer.window is not None for layer in spec.layers):
            raise self._refusal("its sliding-window layers keep only the newest tokens of a chunk")
        self._frequencies = [self._of_layer(index, *pair, model) for index, pair in enumerate(zip(*_probes(model)))]

    def turn(self, layer: int, keys: Tensor, num_tokens: int) -> Tensor:
        """Keys [..., tokens, head_dim] as they are num_tokens positions later; new ones unless nothing changes."""
        frequencies = self._frequencies[layer]
        if frequencies is None or not num_tokens:
            return keys
        return rotate(keys, turn_table([num_tokens], frequencies)[0].to(keys.device), 1.0)

    def _of_layer(self, index: int, early: Tensor, late: Tensor, model: Any) -> Tensor | None:
        """The frequencies by which a layer rotates; None for one that does not (NoPE)."""
        limit = MAX_PROBE_ERROR[early.dtype] * float(early.abs().max())
        if float((late - early).abs().max()) <= limit:
            if not _frequencies(model):
                raise self._refusal("it has no rotary position embedding")
            return None
        for frequencies in _frequencies(model):
            if 2 * len(frequencies) <= early.shape[-1]:
                turned = rotate(early, turn_table([PROBE_POSITION], frequencies)[0].to(early.device), 1.0)
                if float((late - turned).abs().max()) <= limit:
                    return frequencies
        raise self._refusal(f"layer {index} moves its keys in another way than by rotating halves of their channels")

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"chunks cannot be moved in model family {self._family!r}: {why}")


@torch.no_grad()
def _probes(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Keys of one token per layer, computed at position 0 and at PROBE_POSITION: it sees only itself, so nothing else
    differs."""
    found = []
    for position in (0, PROBE_POSITION):
        past, device = DynamicCache(config=model.config), next(model.parameters()).device
        ids, at = torch.tensor([[1]], device=device), torch.tensor([[position]], device=device)
        model(input_ids=ids, position_ids=at, past_key_values=past, use_cache=True)
        found.append([_keys(layer) for layer in past.layers])
    return found[0], found[1]


def _keys(layer: Any) -> Tensor:
    keys: Tensor = layer.keys
    return keys


def _frequencies(model: Any) -> list[Tensor]:
    """Every set of rotary frequencies that the model has; what YaRN and its like do to them is in them."""
    named = ("inv_freq", "original_inv_freq")
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2].endswith(named) and buffer.dim() == 1:
            found += [buffer] if not any(torch.equal(buffer, other) for other in found) else []
    return found


@torch.no_grad()
def join_chunks(
    model: Any, turner: KeyTurner, chunks: Sequence[list[int]], load: LoadChunk, recompute_first: int
) -> tuple[int, DynamicCache]:
    """A past of all chunks in this order, and how many of its tokens were computed here."""
    joined, at, computed = DynamicCache(config=model.config), 0, 0
    for number, ids in enumerate(chunks):
        skip = min(recompute_first, len(ids)) if number else 0
        if skip:
            run(model, joined, ids[:skip])
            computed += skip
        if skip < len(ids):
            for index, layer in enumerate(load(ids).layers):
                keys = turner.turn(index, layer.keys[:, :, skip:], at)
                joined.update(keys, layer.values[:, :, skip:], index)
        at += len(ids)
    return computed, joined


def run(model: Any, past: Any, ids: Sequence[int]) -> Tensor:
    """Logits [tokens, vocab] of these tokens behind a past, which holds them afterwards."""
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=tokens, past_key_values=past, use_cache=True).logits[0]
    return logits


@torch.no_grad()
def measure(model: Any, joined: DynamicCache, computed: int, ids: Sequence[int], question: Sequence[int]) -> ChunkError:
    """Compare a past of chunks with a whole prefill of the same tokens, under a question asked behind both."""
    whole = DynamicCache(config=model.config)
    run(model, whole, ids)
    pairs = [(a.keys.float(), b.keys.float()) for a, b in zip(joined.layers, whole.layers, strict=True)]  # type: ignore[union-attr]
    off = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    ours, theirs = (run(model, past, question).float().log_softmax(-1) for past in (joined, whole))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return ChunkError(
        float(divergence.mean()), float(divergence.max()), float(same), off**0.5, computed, len(ids) - computed
    )


def check_chunks(chunks: Sequence[Sequence[int]], recompute_first: int) -> None:
    """Raises ConfigError."""
    if not chunks:
        raise ConfigError("chunks: give at least one")
    if recompute_first < 0:
        raise ConfigError(f"recompute_first={recompute_first}: give a number of tokens, 0 or more")
