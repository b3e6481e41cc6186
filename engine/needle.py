"""The needle model: a Llama whose weights are computed, not trained, and that recalls any of N pairs at any distance.

Layer 0 is a previous-token head made by RoPE alone; layer 1 matches the current token's code with the previous-token
codes of the context (an induction head). BOS is the sink: when nothing matches, its value says NULL. Lose, corrupt or
forget the block that holds a needle and the answer is wrong or NULL at once, so the model tests what random weights
cannot: that far blocks come back as they were.

    residual of a token   [constant | is BOS | code of the token | code of the token before | code of the answer]

The prompts are here as well; building a cache in O(n) and scoring answers are in `needle_check`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS, NULL, FIRST_SYMBOL = 0, 1, 2
_CODE_DIM = 32  # Gold functions over GF(32) live in R^32
_POLYNOMIAL = 0b100101  # x^5 + x^2 + 1 generates GF(32)


@dataclass(frozen=True, slots=True)
class NeedleSpec:
    """Shape of the model and how hard its task is.

    Units: match_nats and position_nats are attention scores; filler_loudness is 0 (quiet) to 1 (as loud as symbols) in
    the space that layer 1 searches; outlier is the size of constant key channels, which real models have too.
    """

    num_symbols: int = 512  # tokens that can be a needle's key or value
    vocab_size: int = 2048
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2  # each carries its own part of an answer: losing one head of one block shows
    head_dim: int = 64
    filler_dim: int = 32
    rope_theta: float = 1e16  # slow planes carry content (131,072 tokens turn them < 0.05 rad), fast ones position
    num_position_planes: int = 13
    match_nats: float = 40.0
    position_nats: float = 520.0  # over all fast planes; the token before the previous one trails by 20 nats
    sink_share: float = 0.5  # score of BOS as a share of match_nats
    filler_loudness: float = 0.25
    outlier: float = 0.0
    logit_scale: float = 30.0
    max_positions: int = 1 << 20
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Needle:
    """A run `key, values...` that starts at `position` of a context; asked for the key, the model says the values."""

    key: int
    values: tuple[int, ...]
    position: int


def symbol_codes(count: int, seed: int) -> Tensor:
    """Return `count` unit vectors in R^32 whose scalar products are 1/4 in size at most.

    Shapes: [count, 32], float32; at most 1,024 of them.
    Source: Gold functions (-1)^Tr(a x^3 + b x) over GF(32), turned by a random rotation, so that no coordinate is special.
    """

    def multiply(x: int, y: int) -> int:
        product = 0
        while y:
            if y & 1:
                product ^= x
            x, y = x << 1, y >> 1
            if x & 32:
                x ^= _POLYNOMIAL
        return product

    def trace(x: int) -> int:
        power, total = x, x
        for _ in range(4):
            power = multiply(power, power)
            total ^= power
        return total & 1

    cubes = [multiply(x, multiply(x, x)) for x in range(32)]
    traces = [trace(x) for x in range(32)]
    pairs = [(a, b) for a in range(32) for b in range(32)]
    random.Random(seed).shuffle(pairs)
    signs = [[1.0 - 2 * traces[multiply(a, cubes[x]) ^ multiply(b, x)] for x in range(32)] for a, b in pairs[:count]]
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    return (torch.tensor(signs, dtype=torch.float64) / math.sqrt(32) @ rotation).float()


def build_needle_model(spec: NeedleSpec | None = None, *, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Compute the weights and return the model, ready to run.

    Units: 1.5 M parameters and 2,048 bytes of KV per token in float32. Takes about 0.1 s.
    """
    spec = spec or NeedleSpec()
    if spec.num_symbols >= 1024 or spec.hidden_size < 2 + 3 * _CODE_DIM + spec.filler_dim:
        raise ValueError(f"needle model: {spec} has more symbols than codes, or too narrow a residual")
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
    )
    model = LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        _Weights(spec).write(model)
    return model.to(dtype)


class _Weights:
    """Where everything lies in the residual and in the rotary planes, and the weights that follow from it."""

    CONSTANT, IS_BOS, CODE = 0, 1, 2

    def __init__(self, spec: NeedleSpec) -> None:
        self.spec = spec
        self.previous = self.CODE + _CODE_DIM + spec.filler_dim
        self.answer = self.previous + _CODE_DIM
        self.group = spec.num_heads // spec.num_kv_heads
        self.part = _CODE_DIM // spec.num_kv_heads  # of the answer, per KV head
        self.half = spec.head_dim // 2
        self.gain_0 = math.sqrt(spec.hidden_size / 2)  # RMSNorm gains of a typical token in layers 0 and 1
        self.gain_1 = math.sqrt(spec.hidden_size / 3)
        slow = range(spec.num_position_planes, self.half)
        channels = [*slow, *(self.half + i for i in slow)]
        self.code_channels, self.sink_channel = channels[:_CODE_DIM], channels[_CODE_DIM]
        self.outlier_channels = channels[_CODE_DIM + 1 : _CODE_DIM + 5]
        self.turns = spec.rope_theta ** (-torch.arange(self.half, dtype=torch.float64) * 2 / spec.head_dim)
        self.symbols = symbol_codes(spec.num_symbols + 1, spec.seed)  # the last one is NULL's
        self.codes = self._token_codes()

    def write(self, model: LlamaForCausalLM) -> None:
        embedding = model.model.embed_tokens.weight
        embedding[:, self.CONSTANT] = 1.0
        embedding[:, self.CODE : self.previous] = self.codes
        embedding[BOS, self.CODE : self.previous] = 0
        embedding[BOS, self.IS_BOS] = 1.0
        self._previous_token_head(model.model.layers[0].self_attn)
        self._induction_head(model.model.layers[1].self_attn)
        scale = self.spec.logit_scale * 2 / math.sqrt(self.spec.hidden_size)
        named = slice(NULL, FIRST_SYMBOL + self.spec.num_symbols)
        model.lm_head.weight[named, self.answer : self.answer + _CODE_DIM] = self.codes[named, :_CODE_DIM] * scale

    def _token_codes(self) -> Tensor:
        """[vocab, code + filler]: symbols only in the first part, filler mostly in the second."""
        spec, generator = self.spec, torch.Generator().manual_seed(self.spec.seed + 1)
        codes = torch.zeros(spec.vocab_size, _CODE_DIM + spec.filler_dim)
        end = FIRST_SYMBOL + spec.num_symbols
        codes[FIRST_SYMBOL:end, :_CODE_DIM] = self.symbols[: spec.num_symbols]
        codes[NULL, :_CODE_DIM] = self.symbols[spec.num_symbols]
        for columns, loudness in (
            (slice(0, _CODE_DIM), spec.filler_loudness),
            (slice(_CODE_DIM, None), math.sqrt(1 - spec.filler_loudness**2)),
        ):
            noise = torch.randn(spec.vocab_size - end, codes[0, columns].numel(), generator=generator)
            codes[end:, columns] = loudness * F.normalize(noise, dim=-1)
        return codes

    def _previous_token_head(self, attention: torch.nn.Module) -> None:
        """q and k are constants, q one step ahead: scores peak at the token before. Copies its symbol code."""
        spec, d = self.spec, self.spec.head_dim
        size = math.sqrt(spec.position_nats / spec.num_position_planes * math.sqrt(d)) / self.gain_0
        planes = range(spec.num_position_planes)
        q, k, v, o = _weights_of(attention)
        for head in range(spec.num_kv_heads):
            for i in planes:
                k[head * d + i, self.CONSTANT] = size
            for j in range(self.part):
                v[head * d + j, self.CODE + head * self.part + j] = 1.0
        for head in range(spec.num_heads):
            for i in planes:
                q[head * d + i, self.CONSTANT] = size * math.cos(self.turns[i])
                q[head * d + self.half + i, self.CONSTANT] = -size * math.sin(self.turns[i])
            for j in range(self.part):
                o[self.previous + head // self.group * self.part + j, head * d + j] = 1 / (self.group * self.gain_0)

    def _induction_head(self, attention: torch.nn.Module) -> None:
        """q is the token's code, k the code of the token before, v the code of the token itself; BOS says NULL."""
        spec, d = self.spec, self.spec.head_dim
        size = math.sqrt(spec.match_nats * math.sqrt(d)) / self.gain_1
        q, k, v, o = _weights_of(attention)
        for head in range(spec.num_kv_heads):
            for j in range(self.part):
                v[head * d + j, self.CODE + head * self.part + j] = 1.0
                v[head * d + j, self.IS_BOS] = float(self.symbols[spec.num_symbols, head * self.part + j])
            for c, channel in enumerate(self.code_channels):
                k[head * d + channel, self.previous + c] = size
            k[head * d + self.sink_channel, self.IS_BOS] = size
            for channel in self.outlier_channels:
                k[head * d + channel, self.CONSTANT] = spec.outlier
        for head in range(spec.num_heads):
            for c, channel in enumerate(self.code_channels):
                q[head * d + channel, self.CODE + c] = size
            q[head * d + self.sink_channel, self.CONSTANT] = size * spec.sink_share
            for j in range(self.part):
                o[self.answer + head // self.group * self.part + j, head * d + j] = 1 / (self.group * self.gain_1)


def _weights_of(attention: torch.nn.Module) -> list[Tensor]:
    return [getattr(attention, f"{name}_proj").weight for name in "qkvo"]


def needle_prompt(
    spec: NeedleSpec, num_tokens: int, num_needles: int = 16, *, num_values: int = 4, seed: int = 0
) -> tuple[list[int], list[Needle]]:
    """Return a context of BOS and filler with needles at even depths, and the needles.

    Raises: ValueError when the needles do not fit or there are not enough symbols.
    """
    length = num_values + 1
    if num_needles * length > spec.num_symbols or num_tokens < num_needles * (length + 1) + 2:
        raise ValueError(
            f"{num_needles} needles of {length} tokens do not fit {num_tokens} tokens, {spec.num_symbols} symbols"
        )
    picker = random.Random(seed)
    first_filler = FIRST_SYMBOL + spec.num_symbols
    token_ids = [BOS, *(picker.randrange(first_filler, spec.vocab_size) for _ in range(num_tokens - 1))]
    symbols = picker.sample(range(FIRST_SYMBOL, first_filler), num_needles * length)
    needles = []
    for i in range(num_needles):
        run = symbols[i * length : (i + 1) * length]
        position = min(max(1, int((i + 0.5) / num_needles * num_tokens)), num_tokens - length - 2)
        token_ids[position : position + length] = run
        needles.append(Needle(run[0], tuple(run[1:]), position))
    return token_ids, needles


def absent_keys(spec: NeedleSpec, needles: list[Needle], count: int = 4) -> list[int]:
    """Symbols that are in none of the needles: asked for one of them, the model says NULL."""
    used = {token for needle in needles for token in (needle.key, *needle.values)}
    free = (s for s in range(FIRST_SYMBOL, FIRST_SYMBOL + spec.num_symbols) if s not in used)
    return [symbol for symbol, _ in zip(free, range(count))]
