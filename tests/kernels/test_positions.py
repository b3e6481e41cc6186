"""Cached keys used at other positions: rotating q back gives what keys computed there give, YaRN's included."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import (
    PageFormat,
    block_attention,
    compressed_attention,
    plan_pages,
    plan_turns,
    quantize_blocks,
    reference,
    reference_compressed,
    turned_attention,
)
from kvtier.kernels.rope import rotate, turn_back, turn_keys, turn_table

transformers = pytest.importorskip("transformers")

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 4.0, "original_max_position_embeddings": 32768},
}  # fmt: skip
DIM = 32


def rotary(name):
    """Return inv_freq and a function that rotates [tokens, heads, DIM] as the model does."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        head_dim=DIM,
        rope_parameters=ROPES[name],
        max_position_embeddings=131072,
    )
    module = LlamaRotaryEmbedding(config)

    def apply(x, positions):
        cos, sin = module(x[None], torch.as_tensor(positions)[None])
        return apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)

    return module.inv_freq, module.attention_scaling, apply


@pytest.mark.parametrize("name", ROPES)
def test_turned_queries_meet_cached_keys_as_keys_computed_there(name):
    inv_freq, factor, apply = rotary(name)
    assert (factor != 1.0) == (name == "yarn")
    torch.manual_seed(0)
    raw = torch.randn(64, 4, DIM)
    q = apply(torch.randn(1, 4, DIM), [3000])
    cached = apply(raw, range(64))  # computed as if the chunk came first
    for offset in (0, 1, 700, -20, 2900):
        turns = plan_turns([[offset]], inv_freq)
        expected = torch.einsum("qhd,thd->hqt", q, apply(raw, range(offset, offset + 64)))
        found = torch.einsum("qhd,thd->hqt", turn_back(q, turns)[0], cached)
        # The model makes its angles in float32: at position 3,000 they are 1e-4 off, ours are not.
        assert torch.allclose(found, expected, atol=2e-3 * factor**2)
        assert torch.allclose(
            turn_keys(cached[None], turns.cos_sin)[0], apply(raw, range(offset, offset + 64)), atol=1e-3
        )


def test_turning_is_exact_where_angles_are():
    """Against keys rotated in float64 to the new position, at offsets where float32 angles would have no digits left."""
    inv_freq = 10_000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) * 2 / DIM)
    torch.manual_seed(1)
    q, k = torch.randn(3, 4, DIM), torch.randn(50, 4, DIM)
    for offset in (1, 131_072, -999_983):
        angles = offset * inv_freq
        exact = torch.stack([angles.cos(), angles.sin()])
        low, high = k.double().split(DIM // 2, -1)
        moved = torch.cat([low * exact[0] - high * exact[1], high * exact[0] + low * exact[1]], -1)
        expected = torch.einsum("qhd,thd->hqt", q.double(), moved)
        found = torch.einsum("qhd,thd->hqt", turn_back(q, plan_turns([[offset]], inv_freq))[0].double(), k.double())
        assert (found - expected).abs().max() < 3e-6


def documents(fmt=None):
    """Three documents of two blocks each, computed at position 0, used in the order 2, 0, 1 behind each other."""
    torch.manual_seed(2)
    inv_freq = 10_000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) * 2 / DIM)
    k, v = torch.randn(2, 6, 2, 32, DIM)
    table = [[4, 5, 0, 1, 2, 3]]
    offsets = [[0, 0, 64, 64, 128, 128]]
    q = torch.randn(5, 4, DIM)
    return q, k, v, table, plan_turns(offsets, inv_freq), inv_freq


def expected_of(q, k, v, table, offsets, inv_freq, **rules):
    cos_sin = turn_table(offsets, inv_freq)
    moved = rotate(k[table].double(), cos_sin.double()[:, None, None], 1.0).double()
    return reference.block_attention(q, moved, v[table], scale=0.2, **rules)


def test_documents_in_any_order(assert_close):
    q, k, v, table, turns, inv_freq = documents()
    expected = expected_of(q, k, v, table[0], [0, 0, 64, 64, 128, 128], inv_freq)
    assert_close(turned_attention(q, k, v, table, [192], [0, 5], turns, scale=0.2), expected, 4e-6, 5e-6)
    capped = expected_of(q, k, v, table[0], [0, 0, 64, 64, 128, 128], inv_freq, softcap=2.0)
    assert_close(turned_attention(q, k, v, table, [192], [0, 5], turns, scale=0.2, softcap=2.0), capped, 4e-6, 5e-6)
    wrong = block_attention(q, k, v, scale=0.2)[0]
    assert (wrong.double() - expected[0]).abs().max() > 1e-2  # the rotation matters


@pytest.mark.parametrize("name", ["int4", "fp8", "hack8"])
def test_compressed_documents_in_any_order(assert_close, name):
    q, k, v, table, turns, inv_freq = documents()
    fmt = PageFormat(name, 2, 32, DIM, group=32)
    pages = torch.zeros(6, fmt.layer_bytes, dtype=torch.uint8)
    quantize_blocks(k, v, range(6), pages, range(6), fmt)
    before = pages.clone()
    kept = (x.float() for x in reference_compressed.dequantize_pages(pages, fmt))
    expected = expected_of(q, *kept, table[0], [0, 0, 64, 64, 128, 128], inv_freq)
    found = compressed_attention(q, pages, fmt, table, [192], [0, 5], scale=0.2, turns=turns)
    assert_close(found, expected, *((4e-6, 5e-6) if not fmt.is_hack else (3e-2, 1e-2)))
    assert torch.equal(pages, before)


def test_partial_rotary_channels_are_left_alone():
    x = torch.randn(2, 3, 48)
    turned = rotate(x, turn_table([7], torch.ones(8, dtype=torch.float64))[:, None], 1.0)
    assert torch.equal(turned[..., 16:], x[..., 16:]) and not torch.equal(turned[..., :16], x[..., :16])
    with pytest.raises(ValueError, match="96 rotary channels"):
        rotate(x, torch.zeros(1, 2, 48), 1.0)


def test_what_does_not_fit_is_refused():
    q, k, v, table, turns, _ = documents()
    turns.ids[0, 3] = 9
    with pytest.raises(ValueError, match=r"turn_ids\[0, 3\] = 9 is not one of the 3"):
        turned_attention(q, k, v, table, [192], [0, 5], turns, scale=0.2)
    with pytest.raises(ValueError, match="whole blocks"):
        turned_attention(q, k, v, table, [191], [0, 5], turns, scale=0.2)
    with pytest.raises(ValueError, match="shaped as block_table"):
        turned_attention(q, k, v, [table[0][:5]], [160], [0, 5], turns, scale=0.2)
    fmt = PageFormat("int4", 2, 32, DIM, group=32)
    pages = torch.zeros(6, fmt.layer_bytes, dtype=torch.uint8)
    plan = plan_pages(pages, fmt, table, [192], [0, 5])
    with pytest.raises(ValueError, match="both to the plan"):
        compressed_attention(q, pages, fmt, table, [192], [0, 5], scale=0.2, turns=turns, plan=plan)
