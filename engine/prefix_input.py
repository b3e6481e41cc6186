"""What callers hand to a prefix cache, checked: a model or layouts, and a past with the prompt that it is said to be of.

No pager, no state. Guards: what is stored was computed from the first token on, for these tokens, as far as that can be
told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..tiers.errors import ConfigError
from ..tiers.layout import KVLayout
from ..tiers.parts import GroupPart
from .kv_copy import GroupKV
from .kv_tensors import read_tensors


def groups_of(past: Any, ids: list[int], layouts: Sequence[KVLayout], spec: Any) -> list[GroupKV]:
    """A past as K/V per layer group, checked against the prompt that it is for. `spec` is None for a cache opened by layout."""
    if spec is None or isinstance(past, torch.Tensor | list | tuple):
        groups = read_tensors(past, layouts, len(ids))
    else:
        from .past import read_past

        if getattr(past, "kvtier_chunks", 1) > 1:
            raise ConfigError(
                "past: it was put together by load_chunks, so its K/V are approximate; store only what a model computed "
                "from the first token on"
            )
        groups = read_past(past, spec, getattr(torch, spec.dtype))
        loaded, named = getattr(past, "kvtier_prefix", (0, digest([])))
        if digest(ids[:loaded]) != named and len(ids) >= loaded:
            raise ConfigError(
                f"token_ids: the first {loaded} are not those that this past was loaded for; give its own"
            )
    if groups[0].end < len(ids):
        raise ConfigError(
            f"past: it holds {groups[0].end} tokens, token_ids names {len(ids)}; store token_ids[:{groups[0].end}] "
            "(a token that was just sampled has no K/V yet)"
        )
    return groups


def covered(groups: Sequence[GroupKV]) -> Callable[[int], None]:
    """Raises where a windowed past no longer holds what would have to be written."""
    first = max(group.first for group in groups)

    def require(start: int) -> None:
        if start < first:
            raise ConfigError(
                f"past: a layer with a sliding window has dropped tokens {start} to {first - 1}, which are not stored yet; "
                "use the past that load gives (it keeps them, also when it starts empty), or warm"
            )

    return require


def layouts_of(model: Any, layout: Any, fingerprint: str) -> list[KVLayout]:
    if (model is None) == (layout is None):
        raise ConfigError("give either model= (a Hugging Face decoder) or layout= (KVLayouts of your own model)")
    if model is not None:
        return []
    layouts = [layout] if isinstance(layout, KVLayout) else list(layout)
    if not fingerprint:
        raise ConfigError(
            "model_fingerprint='': a store by layout needs text that names the model, its weights and its positions, "
            "so that no other model's K/V are ever loaded"
        )
    for one in layouts:
        if one.sinks:
            raise ConfigError(f"layout {one.name!r}: sinks={one.sinks} are not supported here; use window=None")
    return layouts


def check_heads(device: object, layouts: Sequence[KVLayout], cut: Sequence[Sequence[GroupPart]]) -> None:
    """Raises ConfigError where heads of a layer would have formats of their own."""
    for layout, parts in zip(layouts, cut, strict=True):
        if any(len(part.heads) < layout.num_kv_heads for part in parts):
            raise ConfigError(
                f"device={device!r}: a prefix cache keeps all heads of a layer in one format; give formats by layers, or "
                "use an Engine"
            )


def digest(token_ids: list[int]) -> bytes:
    return hashlib.blake2b(np.asarray(token_ids, "<u4").tobytes(), digest_size=16).digest()
