"""Unmodified Hugging Face decoders: what their attention looks like, whether we can page it, and its fingerprint.

Nothing is parsed from configs that a forward pass can show: a two-token run under a spy attention records, per layer,
heads, widths, window, softcap and sinks. What cannot be paged exactly is refused here, before anything is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tiers.errors import ConfigError, UnsupportedModelError
from ..tiers.layout import KVLayout
from ..tiers.parts import GroupPart

SPY = "kvtier_spy"
_HARMLESS = {
    "dropout", "position_ids", "use_cache", "is_causal", "cache_position", "output_attentions", "output_hidden_states",
    "return_dict", "logits_to_keep", "position_embeddings", "output_router_logits", "past_key_values", "layer_idx",
}  # fmt: skip
_VOLATILE = {"transformers_version", "_name_or_path", "architectures", "use_cache", "_attn_implementation", "dtype"}
_SAMPLE = 4096  # elements of each weight that go into the fingerprint


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One attention layer as it calls: shapes, and the terms that a kernel must honour."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    sinks: int = 0  # first tokens that are seen beside the window


@dataclass(frozen=True, slots=True)
class StreamingWindow:
    """Endless generation in constant memory: layers that see everything see this many last tokens, and the first ones.

    What lies between is forgotten, so answers differ from the whole model's once a text is longer than both together.
    Positions stay those of the whole text. Source: attention sinks, StreamingLLM (arXiv 2309.17453).
    """

    window: int  # tokens
    sinks: int = 4  # tokens

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ConfigError(f"streaming window={self.window}, sinks={self.sinks}: need window >= 1 and sinks >= 0")


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Where K and V of a layer, or of some of its KV heads, are: the layer group, and the layer's number within it."""

    group: int
    number: int
    heads: tuple[int, ...] | None = None  # all


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's attention layers, and where each has its K and V: in one layer group, or by heads in several."""

    layers: tuple[LayerSpec, ...]
    parts_of: tuple[tuple[LayerPart, ...], ...]
    groups: tuple[LayerSpec, ...]
    dtype: str
    names: tuple[str, ...]  # of the groups

    @property
    def group_of(self) -> list[tuple[int, int]]:
        """Of each layer its group and its number there, where no layer is cut by heads."""
        return [(part.group, part.number) for (part,) in self.parts_of]

    def split(self, cut: Sequence[Sequence[GroupPart]]) -> ModelSpec:
        """The same model with every group cut into these parts."""
        made = [(old, part) for old, parts in enumerate(cut) for part in parts]

        def of_layer(old: int, number: int) -> tuple[LayerPart, ...]:
            return tuple(
                LayerPart(index, part.layers.index(number), part.heads if len(part.heads) < all_heads else None)
                for index, (of_group, part) in enumerate(made)
                if of_group == old and number in part.layers
                for all_heads in [self.groups[old].num_kv_heads]
            )

        groups = [_of_heads(self.groups[old], len(part.heads)) for old, part in made]
        parts_of = tuple(of_layer(*where) for where in self.group_of)
        return ModelSpec(self.layers, parts_of, tuple(groups), self.dtype, tuple(part.name for _, part in made))

    def streamed(self, streaming: StreamingWindow) -> ModelSpec:
        """The same model with a window, and sinks, in every layer that has none."""

        def narrow(layer: LayerSpec) -> LayerSpec:
            return layer if layer.window else replace(layer, window=streaming.window, sinks=streaming.sinks)

        layers = {index: narrow(layer) for index, layer in enumerate(self.layers)}
        return _grouped(layers, self.dtype)

    def layouts(self, block_size: int) -> list[KVLayout]:
        """One layout per layer group: layers of the same window and shapes."""
        return [
            KVLayout(
                num_layers=sum(part.group == index for parts in self.parts_of for part in parts),
                num_kv_heads=group.num_kv_heads,
                head_dim=group.head_dim,
                block_size=block_size,
                dtype=self.dtype,
                value_dim=None if group.value_dim == group.head_dim else group.value_dim,
                window=group.window,
                sinks=group.sinks,
                name=self.names[index],
            )
            for index, group in enumerate(self.groups)
        ]


def discover(model: Any) -> ModelSpec:
    """Run two tokens under a spy and describe what was seen. Raises UnsupportedModelError with the reason."""
    _refuse_by_config(model)
    from transformers import AttentionInterface

    seen: dict[int, LayerSpec] = {}

    def spy(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        _refuse_by_call(model, module, attention_mask, kwargs)
        index = module.layer_idx
        if index in seen or getattr(module, "is_kv_shared_layer", False):
            raise _unsupported(model, f"layer {index} shares or repeats its K/V with another layer")
        seen[index] = LayerSpec(
            query.shape[1], key.shape[1], key.shape[-1], value.shape[-1], kwargs.get("sliding_window")
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(SPY, spy)
    before = model.config._attn_implementation
    model.set_attn_implementation(SPY)
    try:
        device = next(model.parameters()).device
        ids = torch.tensor([[1, 2]], device=device)
        with torch.inference_mode():
            model(input_ids=ids, position_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    except TypeError as error:
        raise _unsupported(model, f"it cannot be called as a decoder ({error})") from error
    finally:
        model.set_attn_implementation(before)
    return group_layers(model, seen)


def group_layers(model: Any, seen: dict[int, LayerSpec]) -> ModelSpec:
    """Layers of the same window and shapes make a group. Raises UnsupportedModelError where a layer is missing."""
    num_layers = model.config.get_text_config().num_hidden_layers
    missing = sorted(set(range(num_layers)) - set(seen))
    if missing:
        raise _unsupported(model, f"layer {missing[0]} has no attention that stores K/V (linear or state-space layers)")
    return _grouped(seen, str(next(model.parameters()).dtype).removeprefix("torch."))


def _grouped(seen: Mapping[int, LayerSpec], dtype: str) -> ModelSpec:
    layers = tuple(seen[index] for index in sorted(seen))
    kinds: list[tuple[Any, ...]] = []
    groups: list[LayerSpec] = []
    parts_of, counts = [], []
    for layer in layers:
        kind = (layer.window, layer.sinks, layer.num_kv_heads, layer.head_dim, layer.value_dim)
        if kind not in kinds:
            kinds.append(kind)
            groups.append(layer)
            counts.append(0)
        index = kinds.index(kind)
        parts_of.append((LayerPart(index, counts[index]),))
        counts[index] += 1
    names = tuple(f"window{group.window}" if group.window else "full" for group in groups)
    return ModelSpec(layers, tuple(parts_of), tuple(groups), dtype, names)


def _of_heads(layer: LayerSpec, num_kv_heads: int) -> LayerSpec:
    """So many KV heads of a layer, with the query heads that read them."""
    return replace(layer, num_kv_heads=num_kv_heads, num_heads=layer.num_heads // layer.num_kv_heads * num_kv_heads)


def _refuse_by_config(model: Any) -> None:
    config = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(model, "it is an encoder-decoder; only decoders are paged")
    if not model.is_backend_compatible():
        raise _unsupported(model, "its attention does not go through transformers' attention interface")
    if "chunked_attention" in (getattr(text, "layer_types", None) or []):
        raise _unsupported(model, "it has chunked attention layers, which are not paged yet")
    for rope in _rope_types(getattr(text, "rope_parameters", None)):
        if rope in ("dynamic", "longrope"):
            raise _unsupported(
                model,
                f"its RoPE type {rope!r} depends on the longest position of a call, so cached keys would not hold",
            )


def _rope_types(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [kind for nested in parameters.values() for kind in _rope_types(nested)]


def _refuse_by_call(model: Any, module: Any, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise _unsupported(model, f"layer {module.layer_idx} builds its own attention mask")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _unsupported(model, f"layer {module.layer_idx} attends to tokens behind it (it is not causal)")
    known = _HARMLESS | {"scaling", "sliding_window", "softcap", "s_aux"}
    for name, value in kwargs.items():
        if name not in known and value is not None and value is not False:
            raise _unsupported(model, f"layer {module.layer_idx} passes {name}={type(value).__name__} to its attention")


def _unsupported(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model family {model.config.model_type!r} is not supported: {reason}")


def describe(model: Any) -> dict[str, Any]:
    """What a reader of a store needs to know of the model that made it: family, positions, RoPE. JSON values only."""
    text = model.config.get_text_config()
    wanted = ("vocab_size", "num_attention_heads", "max_position_embeddings", "sliding_window", "rope_parameters")
    fields = {name: getattr(text, name, None) for name in wanted}
    said = {"model_type": model.config.model_type, "architectures": model.config.architectures, **fields}
    return dict(json.loads(json.dumps(said, default=str)))


def fingerprint(model: Any) -> str:
    """Hex digest of what decides K/V: config, RoPE, dtype and a sample of every weight.

    The sample is up to 4,096 elements spread over each tensor: it tells checkpoints and fine-tunes apart, not two
    models that somebody made differ in a few weights on purpose.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().cpu()
        digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}".encode())
        digest.update(part.view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    return digest.hexdigest()
