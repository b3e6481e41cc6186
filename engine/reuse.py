"""Why a cached history could not be reused to its end: where two renderings of a chat part, and what differs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Reason = Literal["retokenized", "history_shortened", "history_changed"]
_AROUND = 64  # tokens of text that are compared behind the break


@dataclass(frozen=True, slots=True)
class ReuseBreak:
    """The first token that is not what it was, and why.

    retokenized: the text is the same, cut into other tokens (sampled tokens are often not those that a tokenizer makes).
    history_shortened: the new prompt ends before the old one did, or leaves a part out. history_changed: other text.
    """

    at: int
    reason: Reason

    @property
    def explanation(self) -> str:
        return _SAID[self.reason]


_SAID: dict[Reason, str] = {
    "retokenized": "the same text was cut into other tokens; keep token ids (a session does) instead of rendering again",
    "history_shortened": "a part of the history is missing: a truncated window, or a template that drops earlier turns",
    "history_changed": "the text of the history differs: an edited message, a date in the system prompt, or a template "
    "that renders past turns in another way",
}


def explain_break(before: Sequence[int], now: Sequence[int], tokenizer: Any = None) -> ReuseBreak | None:
    """None when `now` goes on where `before` ended; both are token ids. Without a tokenizer text cannot be compared."""
    a, b = np.asarray(before, np.int64), np.asarray(now, np.int64)
    common = min(len(a), len(b))
    parted = np.flatnonzero(a[:common] != b[:common])
    at = int(parted[0]) if len(parted) else common
    if at == len(a):
        return None
    if tokenizer is not None and _same_text(tokenizer, a[at:], b[at:]):
        return ReuseBreak(at, "retokenized")
    if at == len(b) or _continues_later(a[at:], b[at:]):
        return ReuseBreak(at, "history_shortened")
    return ReuseBreak(at, "history_changed")


def _same_text(tokenizer: Any, a: np.ndarray, b: np.ndarray) -> bool:  # type: ignore[type-arg]
    """Whether the shorter of the two texts begins the longer one, give or take what a cut token shows."""
    first = tokenizer.decode(a[:_AROUND].tolist(), skip_special_tokens=False)
    second = tokenizer.decode(b[:_AROUND].tolist(), skip_special_tokens=False)
    length = min(len(first), len(second)) - 8  # a token at the end may differ
    return length > 0 and bool(first[:length] == second[:length])


def _continues_later(a: np.ndarray, b: np.ndarray) -> bool:  # type: ignore[type-arg]
    """Whether what comes now was further down before: something between was left out."""
    probe = b[:16]
    if len(probe) < 4 or len(a) < len(probe):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(a, len(probe))
    return bool((windows == probe).all(1).any())
