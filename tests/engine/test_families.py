"""Greedy output over pages equals transformers' DynamicCache, token for token, while blocks really swap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

from kvtier import Engine, PagerConfig, SamplingParams

NEW_TOKENS = 16
_BASE: dict[str, Any] = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=None,
)
_HEAD = dict(head_dim=32)
_MIXED = ["sliding_attention", "full_attention"] * 2
_MLA = dict(
    num_key_value_heads=8,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=32,
    v_head_dim=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=24, layer_types=_MIXED),
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _HEAD),
    "mistral": ("MistralConfig", "MistralForCausalLM", _HEAD | dict(sliding_window=24)),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _HEAD | dict(sliding_window=24, query_pre_attn_scalar=32, attn_logit_softcapping=2.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _HEAD
        | dict(sliding_window=24, query_pre_attn_scalar=32, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(sliding_window=24)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _HEAD | dict(sliding_window=24, num_local_experts=4, num_experts_per_tok=2, layer_types=_MIXED),
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA),
}
EAGER = {"gemma2", "gpt_oss"}


def tiny(family: str, **changes: Any) -> Any:
    config_name, class_name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(T, config_name)(**(_BASE | extra | changes))
    config._attn_implementation = "eager" if family in EAGER else "sdpa"
    model = getattr(T, class_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # livelier logits than the default initialisation
            elif "sinks" in name:
                parameter.normal_()
    return model


@torch.inference_mode()
def stock(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    cache, out, x = T.DynamicCache(config=model.config), [], torch.tensor([prompt])
    for _ in range(new_tokens):
        logits = model(x, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        out.append(int(logits.argmax()))
        x = torch.tensor([[out[-1]]])
    return out


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 512, (n,), generator=generator).tolist() for n in (5, 33, 90, 161)]


def small_config(model: Any, blocks: int, **settings: Any) -> PagerConfig:
    """Room for that many 16-token blocks of all layers, a generous host tier."""
    from kvtier.engine.hf import discover

    size = sum(layout.block_bytes for layout in discover(model).layouts(16))
    return PagerConfig(device_bytes=blocks * size, host_bytes=60 * size, backend="cpu", **settings)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_token_identical_to_dynamic_cache_with_a_device_tier_too_small(family: str):
    model = tiny(family)
    wanted = [stock(model, prompt, NEW_TOKENS) for prompt in prompts()]
    with Engine.from_model(model, small_config(model, 15), block_size=16, max_batch_tokens=48) as engine:
        together = engine.generate(prompts(), SamplingParams(max_tokens=NEW_TOKENS))
        assert [out.token_ids for out in together] == wanted
        again = [engine.generate([prompt], SamplingParams(max_tokens=NEW_TOKENS))[0] for prompt in prompts()]
        assert [out.token_ids for out in again] == wanted  # solo, and from whatever is cached
        assert again[3].usage.cached_tokens > 0
        moved = engine.pager.counters
        assert moved.get("moved_blocks", direction="device_to_host") > 0
        engine.pager.drain()
        engine.pager.check_integrity()
        assert not any(group.pages.pins.any() for group in engine.pager._core.groups)


def test_chunk_size_does_not_matter():
    model = tiny("qwen2")
    wanted = [stock(model, prompt, 8) for prompt in prompts()]
    for chunk in (7, 16, 200):
        with Engine.from_model(model, small_config(model, 40), block_size=16, max_batch_tokens=chunk) as engine:
            outputs = engine.generate(prompts(), SamplingParams(max_tokens=8))
        assert [out.token_ids for out in outputs] == wanted
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_resume_after_a_restart_equals_never_having_stopped(family: str, tmp_path):
    model, prompt = tiny(family), prompts()[2]
    first = stock(model, prompt, 10)
    second = stock(model, [*prompt, *first, 7, 8, 9], 10)
    config = small_config(model, 12, nvme_path=tmp_path / "store", nvme_bytes="64MiB")
    with Engine.from_model(model, config, block_size=16, max_batch_tokens=48) as engine:
        session = engine.session("chat")
        assert session.send(prompt, SamplingParams(max_tokens=10)).token_ids == first
        session.park()
    with Engine.from_model(model, config, block_size=16, max_batch_tokens=48) as engine:
        session = engine.session("chat")
        out = session.send([7, 8, 9], SamplingParams(max_tokens=10))
        assert out.token_ids == second
        assert out.usage.recomputed_tokens == 0
        assert (
            engine.pager.counters.get("computed_tokens") == 1 + 3 + 9
        )  # the last sampled token, the new ones, decodes


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "ring"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_streamed_sequence_larger_than_the_device_tier_is_exact(family: str, in_place: bool):
    model, prompt = tiny(family), prompts()[3]
    wanted = stock(model, prompt, 12)
    with Engine.from_model(model, small_config(model, 7), block_size=16, max_batch_tokens=32) as engine:
        engine.pager.backend.reads_host = in_place
        out = engine.generate([prompt], SamplingParams(max_tokens=12))[0]
        assert out.token_ids == wanted
        ways = [engine.pager.counters.get(f"{done}_slices", reason="stream") for done in ("attended", "moved")]
        assert [count > 0 for count in ways] == [in_place, not in_place]


def test_fork_and_rollback_go_their_own_ways():
    model, prompt = tiny("llama"), prompts()[2]
    with Engine.from_model(model, small_config(model, 30), block_size=16) as engine:
        session = engine.session("a")
        first = session.send(prompt, SamplingParams(max_tokens=6)).token_ids
        (child,) = session.fork()
        mine = session.send([3], SamplingParams(max_tokens=6)).token_ids
        theirs = child.send([4], SamplingParams(max_tokens=6)).token_ids
        session.rollback(len(prompt) + len(first))
        assert session.send([4], SamplingParams(max_tokens=6)).token_ids == theirs
        engine.pager.check_integrity()
    model.set_attn_implementation("sdpa")
    assert mine == stock(model, [*prompt, *first, 3], 6)
    assert theirs == stock(model, [*prompt, *first, 4], 6)


def test_sampling_is_repeatable_by_seed():
    model = tiny("llama")
    with Engine.from_model(model, small_config(model, 30), block_size=16) as engine:
        params = SamplingParams(max_tokens=8, temperature=0.9, top_k=50, top_p=0.95, seed=3, n=2)
        one, two = engine.generate(prompts()[1:2], params)
        again = engine.generate(prompts()[1:2], params)
        assert [one.token_ids, two.token_ids] == [out.token_ids for out in again]
        assert one.token_ids != two.token_ids
        assert one.ledger["ttft_s"] == pytest.approx(sum(v for k, v in one.ledger.items() if k != "ttft_s"))
