"""Past: transformers' caches as plain K and V per layer, and back.

A cache that we hand out is a DynamicCache of the model's own kinds of layers. Only its sliding layers are ours: they
compute like transformers' and also remember what passed through them, because a window alone is not enough to store a
prompt that others shall be able to continue from anywhere. Everything that is refused names the field and the mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..tiers.errors import ConfigError, UnsupportedModelError
from .hf import LayerSpec, ModelSpec, discover, group_layers
from .kv_copy import GroupKV, LayerKV


class KeepingSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that also keeps references to the K/V that left its window, since the cache was loaded.

    Attention sees what it sees in the stock layer. Cropping, reordering and resetting end the keeping.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._kept: list[LayerKV] = []

    def begin(self, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        """Start from what a window holds of the first num_tokens tokens: [1, kv_heads, tokens, dim]."""
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.cumulative_length = keys, values, num_tokens
        self._kept = [(keys, values)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._kept or not self.cumulative_length:
            self._kept.append((key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)

    def everything(self) -> LayerKV:
        """All that is held, [1, kv_heads, tokens, dim]: the newest tokens, up to cumulative_length."""
        if not self._kept:
            assert self.keys is not None and self.values is not None
            return self.keys, self.values
        if len(self._kept) > 1:
            k, v = (torch.cat([pair[i] for pair in self._kept], dim=-2) for i in range(2))
            self._kept = [(k, v)]
        return self._kept[0]

    def crop(self, tokens_to_remove: int) -> None:
        self._kept = []
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self._kept = []
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        self._kept = []
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._kept = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._kept = []
        super().batch_select_indices(indices)


@torch.inference_mode()
def discover_cache(model: Any) -> ModelSpec:
    """What the model's own cache holds per layer, seen by running two tokens; for MLA that is less than attention reads.

    Raises: UnsupportedModelError where positions, attention or cache are of a kind that cannot be stored.
    """
    seen_by_attention = discover(model)
    past = DynamicCache(config=model.config)
    model(
        input_ids=torch.tensor([[1, 2]], device=next(model.parameters()).device), past_key_values=past, use_cache=True
    )
    seen: dict[int, LayerSpec] = {}
    for index, (layer, attends) in enumerate(zip(past.layers, seen_by_attention.layers, strict=True)):
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or window != attends.window:
            raise UnsupportedModelError(
                f"model family {model.config.model_type!r} is not supported: layer {index} attends within window="
                f"{attends.window}, its cache is a {type(layer).__name__} with window={window}"
            )
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        k, v = layer.keys.shape, layer.values.shape
        if k[1] != v[1]:
            raise UnsupportedModelError(
                f"model family {model.config.model_type!r} is not supported: layer {index} caches {k[1]} heads of K and "
                f"{v[1]} of V"
            )
        seen[index] = LayerSpec(attends.num_heads, k[1], k[3], v[3], window)
    return group_layers(model, seen)


def make_past(model: Any, spec: ModelSpec, groups: Sequence[GroupKV]) -> DynamicCache:
    """A cache that holds the first groups[i].end tokens, ready for model(..., past_key_values=...)."""
    past = DynamicCache(config=model.config)
    num_tokens = groups[0].end
    for index, (group, number) in enumerate(spec.group_of):
        layer: Any = past.layers[index]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer = past.layers[index] = KeepingSlidingLayer(layer.sliding_window)
        if not num_tokens:
            continue
        keys, values = (x[None] for x in groups[group].layers[number])
        if isinstance(layer, KeepingSlidingLayer):
            layer.begin(keys, values, num_tokens)
        else:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
    return past


def read_past(past: Any, spec: ModelSpec, dtype: torch.dtype) -> list[GroupKV]:
    """K/V of a cache that the model filled, per layer group. Copies nothing.

    Raises: ConfigError for every cache that is not a DynamicCache of batch size 1 with the model's shapes and dtype.
    """
    if not isinstance(past, Cache):
        raise ConfigError(
            f"past={type(past).__name__}: give a transformers cache, or tensors as load(as_tensors=True) does"
        )
    if len(past.layers) != len(spec.layers):
        raise ConfigError(
            f"past.layers: {len(past.layers)} layers, the model has {len(spec.layers)}; give the cache that this model filled"
        )
    ends = [_num_tokens(index, layer) for index, layer in enumerate(past.layers)]
    if len(set(ends)) > 1:
        raise ConfigError(
            f"past.layers: they hold {min(ends)} to {max(ends)} tokens; give a cache after a whole forward"
        )
    groups: list[list[LayerKV]] = [[] for _ in spec.groups]
    for index, (group, _) in enumerate(spec.group_of):
        groups[group].append(_layer_kv(index, past.layers[index], spec, dtype))
    return [GroupKV(layers, ends[0]) for layers in groups]


def _num_tokens(index: int, layer: Any) -> int:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, KeepingSlidingLayer):
        raise ConfigError(
            f"past.layers[{index}] is a {type(layer).__name__}; only a DynamicCache can be stored: use the one that load "
            "gave, or DynamicCache(config=model.config)"
        )
    return int(layer.get_seq_length())


def _layer_kv(index: int, layer: Any, spec: ModelSpec, dtype: torch.dtype) -> LayerKV:
    want = spec.layers[index]
    if not layer.is_initialized:
        empty = [torch.empty(want.num_kv_heads, 0, width, dtype=dtype) for width in (want.head_dim, want.value_dim)]
        return empty[0], empty[1]
    k, v = layer.everything() if isinstance(layer, KeepingSlidingLayer) else (layer.keys, layer.values)
    for name, states, width in (("keys", k, want.head_dim), ("values", v, want.value_dim)):
        where = f"past.layers[{index}].{name}"
        if states.shape[0] != 1:
            raise ConfigError(
                f"{where}: batch size {states.shape[0]}; a prefix is stored for one sequence at a time: pick one with "
                "past.batch_select_indices(torch.tensor([i]))"
            )
        if states.shape[1] != want.num_kv_heads or states.shape[3] != width:
            raise ConfigError(
                f"{where}: {states.shape[1]} heads of width {states.shape[3]}, the model has {want.num_kv_heads} KV heads of "
                f"width {width}; give the cache that this model filled"
            )
        if states.dtype != dtype:
            raise ConfigError(
                f"{where}: dtype {states.dtype}, the store holds {dtype}; run the model without autocast, in {dtype}"
            )
    return k[0], v[0]
