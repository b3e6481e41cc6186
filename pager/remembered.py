"""Remembered: keys of prompts that were hashed before, found again by their tokens, so that nobody hashes them twice.

A run of blocks is found by the key before it and by the very bytes of its tokens. A key commits to all tokens before it, to
model, namespace and secret, so a run is told to nobody whose chain does not lead there; and a dictionary compares what it
finds, so no digest of the tokens is believed. One bound for all chains; what was not asked for the longest goes first.
Knows nothing of blocks and tiers: a remembered key need not be held anywhere.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

RUN_TOKENS = 1024  # of a run: what is less, like the end of a prompt, is hashed each time, in 40 us at most
MAX_BYTES = 48 << 20  # about four million tokens in blocks of 16
_KEY_BYTES = 100  # what a key takes here: itself, where its block is gone, and its place in a list


class Remembered:
    """Of all chains of one pager. May be asked from any thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.nbytes, self._max_bytes = 0, max_bytes
        self._runs: OrderedDict[tuple[bytes, bytes], list[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, parent: bytes, tokens: bytes) -> list[bytes] | None:
        """Keys of the run of exactly these tokens behind that key. Not to be changed."""
        name = parent, tokens
        with self._lock:
            keys = self._runs.get(name)
            if keys is not None:
                self._runs.move_to_end(name)
            return keys

    def add(self, parent: bytes, tokens: bytes, keys: list[bytes]) -> None:
        """These are its keys. What was asked for the longest ago is forgotten where the bound asks for it."""
        with self._lock:
            if (parent, tokens) not in self._runs:
                self._runs[parent, tokens] = keys
                self.nbytes += _cost(tokens, keys)
            while self.nbytes > self._max_bytes:
                (_, tokens), keys = self._runs.popitem(last=False)
                self.nbytes -= _cost(tokens, keys)


def _cost(tokens: bytes, keys: list[bytes]) -> int:
    return len(tokens) + _KEY_BYTES * len(keys)
