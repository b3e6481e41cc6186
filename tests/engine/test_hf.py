from __future__ import annotations

import pytest
import torch
import transformers as T

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine.hf import discover, fingerprint
from kvtier.engine.runner import ModelRunner
from kvtier.tiers.errors import ConfigError, UnsupportedModelError

SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


def llama(**extra):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, **extra)).eval()


def test_groups_follow_window_and_shape():
    config = T.Qwen2Config(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    layouts = discover(T.Qwen2ForCausalLM(config).eval()).layouts(16)
    assert [(g.window, g.num_layers) for g in layouts] == [(8, 1), (None, 1)]


def test_the_model_is_left_as_it_was():
    model = llama()
    before = model.config._attn_implementation
    discover(model)
    assert model.config._attn_implementation == before


def test_fingerprints_tell_weights_and_configs_apart():
    a, b = llama(), llama()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(a) != fingerprint(llama(rope_parameters={"rope_type": "default", "rope_theta": 5.0}))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)), "mamba"),
        (
            lambda: T.Llama4ForCausalLM(
                T.Llama4TextConfig(
                    **SMALL,
                    head_dim=16,
                    intermediate_size=32,
                    intermediate_size_mlp=32,
                    num_key_value_heads=1,
                    attention_chunk_size=8,
                    num_local_experts=2,
                )
            ),
            "chunked",
        ),
        (lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, num_layers=1, d_ff=32)), "encoder"),
    ],
)
def test_unsupported_families_are_refused_with_the_reason(model, reason, tmp_path):
    config = PagerConfig(device_bytes="1MiB", host_bytes="1MiB", nvme_path=tmp_path / "s", backend="cpu")
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine.from_model(model().eval(), config)
    assert not (tmp_path / "s").exists()


def test_a_context_longer_than_all_tiers_is_refused_before_anything_is_written():
    with Engine.from_model(llama(), PagerConfig(device_bytes="64KiB", host_bytes="64KiB", backend="cpu")) as engine:
        with pytest.raises(ConfigError, match="longer than all tiers together"):
            engine.generate([[1] * 100_000], SamplingParams(max_tokens=1))
        assert engine.pager.status()["tiers"]["device"]["used_bytes"] == 0


def test_pages_lie_where_the_model_is():
    """Also where there is a GPU besides: `auto` follows the model, and what contradicts it is refused by name."""
    sizes = dict(device_bytes="64KiB", host_bytes="64KiB")
    with Engine.from_model(llama(), PagerConfig(**sizes)) as engine:
        assert engine.pager.backend.name == "cpu"
    with pytest.raises(ConfigError, match=r"backend='cuda': the model is on 'cpu'"):
        Engine.from_model(llama(), PagerConfig(**sizes, backend="cuda"))


def test_a_model_on_another_device_than_its_pages_is_refused():
    model = llama()
    with Engine.from_model(model, PagerConfig(device_bytes="64KiB", host_bytes="64KiB")) as engine:
        before = model.config._attn_implementation
        with pytest.raises(ConfigError, match="the model is on 'meta', its pages on 'cpu'"):
            ModelRunner(llama().to("meta"), discover(model), engine.pager)
        assert model.config._attn_implementation == before
