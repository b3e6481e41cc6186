"""Blocks of KV to try codecs on: of models that attend, and of distributions. No trained model: its K has more structure.

Every sample is rows of 2 MiB blocks as a tier holds them: [layers, 2, kv_heads, tokens, head_dim] of one dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier import KVLayout

OUTLIER = 8.0  # size of the needle model's four constant key channels
VOCAB = 512
CHUNK = 1024  # tokens per forward pass


@dataclass(frozen=True, slots=True)
class Sample:
    """Blocks of one kind: uint8 [blocks, layout.block_bytes]."""

    name: str
    layout: KVLayout
    rows: npt.NDArray[np.uint8]


def samples(num_blocks: int) -> Iterator[Sample]:
    """So many blocks of every kind, the same in every run."""
    import torch

    random = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")
    wide = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=16, dtype="float32")
    needle = KVLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_size=2048, dtype="bfloat16")
    yield Sample("needle model with outlier channels, bf16", needle, _needle(torch, needle, num_blocks))
    yield Sample("random Llama in bf16", random, _llama(torch, random, num_blocks, torch.bfloat16))
    yield Sample("random Llama in fp32, KV as bf16", random, _llama(torch, random, num_blocks, torch.float32))
    yield Sample("random Llama in fp32, KV as fp32", wide, _llama(torch, wide, num_blocks, torch.float32))
    drawn = torch.randn(num_blocks, random.block_bytes // 2, generator=torch.Generator().manual_seed(0))
    yield Sample("gaussian, bf16", random, _bytes(torch, drawn.bfloat16()))
    yield Sample("zeros", random, np.zeros((num_blocks, random.block_bytes), np.uint8))


def _needle(torch: Any, layout: KVLayout, num_blocks: int) -> npt.NDArray[np.uint8]:
    from kvtier.engine.needle import NeedleSpec, build_needle_model, needle_prompt

    spec = NeedleSpec(outlier=OUTLIER)
    ids, _ = needle_prompt(spec, num_blocks * layout.block_size)
    return _blocks(torch, build_needle_model(spec), ids, layout)


def _llama(torch: Any, layout: KVLayout, num_blocks: int, dtype: Any) -> npt.NDArray[np.uint8]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = 2 * layout.num_kv_heads
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads * 64,
        intermediate_size=512,
        num_hidden_layers=layout.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        max_position_embeddings=max(4096, num_blocks * layout.block_size),
    )
    ids = torch.randint(VOCAB, (num_blocks * layout.block_size,), generator=torch.Generator().manual_seed(1))
    return _blocks(torch, LlamaForCausalLM(config).eval().to(dtype), ids.tolist(), layout)


def _blocks(torch: Any, model: Any, ids: list[int], layout: KVLayout) -> npt.NDArray[np.uint8]:
    """What the model keeps of these tokens, cut into blocks."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        for start in range(0, len(ids), CHUNK):
            model(tokens[:, start : start + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1)
    kept = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    kept = kept.to(getattr(torch, layout.dtype)).unflatten(3, (-1, layout.block_size))
    return _bytes(torch, kept.permute(3, 0, 1, 2, 4, 5).flatten(1).contiguous())


def _bytes(torch: Any, rows: Any) -> npt.NDArray[np.uint8]:
    raw: npt.NDArray[np.uint8] = rows.contiguous().view(torch.uint8).numpy()
    return raw
