"""Token ids as pipelines have them: lists or tensors, checked once, before anything is looked up or stored under them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tiers.errors import ConfigError

MAX_TOKEN_ID = 1 << 32
TokenIds = Sequence[int] | torch.Tensor


def ids_of(token_ids: TokenIds) -> list[int]:
    """Token ids of one prompt. Raises ConfigError for an empty one, a batch, and what is no token id."""
    if isinstance(token_ids, torch.Tensor):
        if token_ids.dim() == 2 and token_ids.shape[0] == 1:
            token_ids = token_ids[0]
        if token_ids.dim() != 1 or token_ids.is_floating_point():
            raise ConfigError(
                f"token_ids: a tensor of shape {list(token_ids.shape)} and dtype {token_ids.dtype}; give [tokens] or [1, "
                "tokens] of integers, one prompt at a time"
            )
        token_ids = token_ids.tolist()
    ids = [int(token) for token in token_ids]
    if not ids:
        raise ConfigError("token_ids: a prompt needs at least one token")
    if min(ids) < 0 or max(ids) >= MAX_TOKEN_ID:
        raise ConfigError(f"token_ids: from {min(ids)} to {max(ids)}; token ids are 0 to 2**32 - 1")
    return ids
