"""Checks with the needle model: its cache built in O(n), stock answers to compare with, and the score of any answers.

Layer 0 looks one token back and layer 1 needs no attention to give its K and V, so the cache of a million tokens takes
seconds to build and is the same, to the bit, as a prefill's. The margin (best logit minus second best, in nats) is the
metric, not only the answer: it shrinks before answers break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .needle import NULL, Needle

_LOOK_BACK = 32  # tokens; layer 0 needs one, the next-best offset trails by 20 nats

LayerKV = tuple[Tensor, Tensor]
Ask = Callable[[int, int], tuple[list[int], list[float]]]  # (key, how many tokens) -> (answer, margins)


@dataclass(frozen=True, slots=True)
class NeedleScore:
    """How many needles came back exactly, how many absent keys gave NULL, and the smallest margin in nats.

    The margin of a wrong token counts as negative.
    """

    asked: int
    exact: int
    absent_asked: int
    absent_null: int
    min_margin_nats: float


@torch.no_grad()
def build_needle_cache(model: LlamaForCausalLM, token_ids: Sequence[int], *, chunk: int = 1024) -> list[LayerKV]:
    """Return K and V of both layers for a whole context, without the quadratic part of a prefill.

    Shapes: each [kv_heads, tokens, head_dim], keys rotated, in the model's dtype.
    Cost:   O(tokens); 1.6 s for 131,072 tokens on two cores.
    """
    ids, n = torch.tensor([list(token_ids)]), len(token_ids)
    first, second = model.model.layers
    parts: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, n, chunk):
        end, low = min(n, start + chunk), max(0, start - _LOOK_BACK)
        hidden = model.model.embed_tokens(ids[:, low:end])
        turns = model.model.rotary_emb(hidden, position_ids=torch.arange(low, end)[None])
        q, k, v = _project(first, hidden, turns)
        group = q.shape[1] // k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
        )
        after = hidden + first.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        _, k_after, v_after = _project(second, after, turns)
        for kept, new in zip(parts, (k, v, k_after, v_after)):
            kept.append(new[0, :, start - low :])
    k_0, v_0, k_1, v_1 = (torch.cat(kept, 1) for kept in parts)
    return [(k_0, v_0), (k_1, v_1)]


@torch.no_grad()
def searching_query(model: LlamaForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """The query [heads, head_dim] with which layer 1 searches the context at the last of these tokens."""
    n = len(token_ids)
    low = max(0, n - _LOOK_BACK)
    first, second = model.model.layers
    hidden = model.model.embed_tokens(torch.tensor([list(token_ids[low:])]))
    turns = model.model.rotary_emb(hidden, position_ids=torch.arange(low, n)[None])
    q, k, v = _project(first, hidden, turns)
    group = q.shape[1] // k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
    )
    after = hidden + first.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    return _project(second, after, turns)[0][0, :, -1]


def _project(layer: Any, hidden: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (1, hidden.shape[1], -1, attention.head_dim)
    q, k, v = (getattr(attention, f"{name}_proj")(normed).view(shape).transpose(1, 2) for name in "qkv")
    q, k = apply_rotary_pos_emb(q, k, *turns)
    return q, k, v


def stock_cache(layers: list[LayerKV]) -> DynamicCache:
    """The same K and V as transformers' own cache."""
    cache = DynamicCache()
    for index, (k, v) in enumerate(layers):
        cache.update(k[None].clone(), v[None].clone(), index)
    return cache


@torch.no_grad()
def prefill_stock(model: LlamaForCausalLM, token_ids: Sequence[int], *, chunk: int = 2048) -> DynamicCache:
    """Compute the cache of a context the long way, with transformers alone."""
    cache = DynamicCache(config=model.config)
    for start in range(0, len(token_ids), chunk):
        ids = torch.tensor([list(token_ids[start : start + chunk])])
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def stock_asker(model: LlamaForCausalLM, cache: DynamicCache) -> Ask:
    """An `Ask` over transformers' own cache, which it leaves as it was."""

    @torch.inference_mode()
    def ask(key: int, count: int) -> tuple[list[int], list[float]]:
        token, answer, margins = key, [], []
        for _ in range(count):
            logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1].float()
            best = logits.topk(2)
            token = int(best.indices[0])
            answer.append(token)
            margins.append(float(best.values[0] - best.values[1]))
        cache.crop(-count)
        return answer, margins

    return ask


def score_needles(ask: Ask, needles: Sequence[Needle], absent: Sequence[int] = ()) -> NeedleScore:
    """Ask for every needle and every absent key and count."""
    exact, absent_null, margins = 0, 0, [float("inf")]
    for needle in needles:
        answer, found = ask(needle.key, len(needle.values))
        exact += answer == list(needle.values)
        margins += [m if a == v else -m for a, v, m in zip(answer, needle.values, found)]
    for key in absent:
        answer, _ = ask(key, 1)
        absent_null += answer == [NULL]
    return NeedleScore(len(needles), exact, len(absent), absent_null, min(margins))
