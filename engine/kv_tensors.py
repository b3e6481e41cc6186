"""Plain tensors as a past: what `load(as_tensors=True)` gives and `store` takes, for model code that is not ours.

    one layer group              [layers, 2, kv_heads, tokens, head_dim]; a pair (K, V) where their widths differ (MLA)
    several layer groups         a list of these, in the order of the layouts

K/V are after RoPE, as attention reads them. A windowed group gives and takes the newest tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tiers.errors import ConfigError
from ..tiers.layout import KVLayout
from .kv_copy import GroupKV


def to_tensors(groups: Sequence[GroupKV]) -> Any:
    """What the picture above says. Copies where K and V differ in width."""
    given = [_one(group) for group in groups]
    return given[0] if len(given) == 1 else given


def _one(group: GroupKV) -> Tensor | tuple[Tensor, Tensor]:
    if group.whole is not None:
        return group.whole
    return torch.stack([k for k, _ in group.layers]), torch.stack([v for _, v in group.layers])


def read_tensors(past: Any, layouts: Sequence[KVLayout], num_tokens: int) -> list[GroupKV]:
    """The inverse of to_tensors; copies nothing. num_tokens: of the prompt that they are stored for.

    Raises: ConfigError that names the tensor, its shape or dtype, and what would do.
    """
    given = [past] if len(layouts) == 1 else past
    if not isinstance(given, list | tuple) or len(given) != len(layouts):
        held = len(given) if isinstance(given, list | tuple) else type(given).__name__
        raise ConfigError(f"past: {held}; give a list of {len(layouts)}, one for each layer group")
    pairs = [
        _pair(f"past[{i}]" if len(layouts) > 1 else "past", one, layout)
        for i, (one, layout) in enumerate(zip(given, layouts))
    ]
    full = [k.shape[2] for (k, _), layout in zip(pairs, layouts, strict=True) if layout.window is None]
    if len(set(full)) > 1:
        raise ConfigError(
            f"past: layer groups of {sorted(set(full))} tokens; all with full attention hold equally many"
        )
    end = full[0] if full else max(num_tokens, *(k.shape[2] for k, _ in pairs))
    for k, _ in pairs:
        if k.shape[2] > end:
            raise ConfigError(
                f"past: a windowed layer group of {k.shape[2]} tokens behind one of {end}; give the newest {end}"
            )
    return [GroupKV(list(zip(k, v, strict=True)), end) for k, v in pairs]


def _pair(where: str, given: Any, layout: KVLayout) -> tuple[Tensor, Tensor]:
    """K [layers, kv_heads, tokens, head_dim] and V [layers, kv_heads, tokens, value_dim], checked."""
    form = f"[{layout.num_layers}, 2, {layout.num_kv_heads}, tokens, {layout.head_dim}]"
    if isinstance(given, Tensor):
        if layout.v_dim != layout.head_dim or given.dim() != 5 or given.shape[1] != 2:
            better = form if layout.v_dim == layout.head_dim else "a pair (K, V), which differ in width"
            raise ConfigError(f"{where}: shape {list(given.shape)}; give {better}")
        pair: Any = (given[:, 0], given[:, 1])
    else:
        pair = given
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        raise ConfigError(f"{where}: {type(given).__name__}; give a tensor {form}, or a pair of K and V")
    for name, x, width in (("K", pair[0], layout.head_dim), ("V", pair[1], layout.v_dim)):
        wanted = (layout.num_layers, layout.num_kv_heads, pair[0].shape[2] if pair[0].dim() == 4 else -1, width)
        if tuple(x.shape) != wanted:
            raise ConfigError(
                f"{where}: {name} has shape {list(x.shape)}; give [{layout.num_layers}, {layout.num_kv_heads}, tokens, {width}]"
            )
        if x.dtype != getattr(torch, layout.dtype):
            raise ConfigError(f"{where}: {name} has dtype {x.dtype}, the store holds {layout.dtype}; convert it first")
    return pair[0], pair[1]
