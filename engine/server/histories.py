"""What a prompt_cache_key's last conversation was, so that a client hears where and why its next one could not reuse it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..reuse import explain_break
from .replies import ReuseBreakReply

MAX_HISTORY_TOKENS = 16 << 20  # over all keys, 4 bytes each; the oldest are forgotten


class Histories:
    """Token ids by namespace and key. Of one event loop."""

    def __init__(self, tokenizer: Any, max_tokens: int = MAX_HISTORY_TOKENS) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._known: OrderedDict[tuple[str, str], np.ndarray[Any, Any]] = OrderedDict()
        self._num_tokens = 0

    def compare(self, namespace: str, key: str | None, prompt: Sequence[int]) -> ReuseBreakReply | None:
        """None where the prompt goes on where the last conversation ended, or where there was none."""
        before = self._known.get((namespace, key)) if key is not None else None
        found = None if before is None else explain_break(before.tolist(), prompt, self._tokenizer)
        return (
            None if found is None else ReuseBreakReply(at=found.at, reason=found.reason, explanation=found.explanation)
        )

    def remember(self, namespace: str, key: str | None, prompt: Sequence[int], answer: Sequence[int]) -> None:
        if key is None:
            return
        self._forget((namespace, key))
        self._known[namespace, key] = np.asarray([*prompt, *answer], "<u4")
        self._num_tokens += len(prompt) + len(answer)
        while self._num_tokens > self._max_tokens:
            self._forget(next(iter(self._known)))

    def _forget(self, name: tuple[str, str]) -> None:
        gone = self._known.pop(name, None)
        self._num_tokens -= 0 if gone is None else len(gone)
