"""Block keys: the keyed hash chain that names what a block holds.

A key covers everything that must match before K/V may be reused: model and layout fingerprint, namespace (with its
secret), every token before the block, and the block's own tokens. A partial tail block gets a key only when it is
sealed by a park; its token count makes it different from every full block.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..tiers.owners import SALT_MARK, owner_of, owner_tag, unsalted
from .remembered import RUN_TOKENS, Remembered

__all__ = ["KEY_BYTES", "SALT_MARK", "KeyChain", "owner_tag", "salted", "unsalted"]

KEY_BYTES = 32
MAX_SECRET_BYTES = 64  # limit of keyed BLAKE2b


def salted(namespace: str, salt: str) -> str:
    """The namespace whose blocks only requests with this salt share."""
    return f"{namespace}{SALT_MARK}{hashlib.blake2b(salt.encode(), digest_size=8).hexdigest()}"


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """32 bits each, little endian. Raises OverflowError for what is no token id.

    Cost: 8 ns a token of a list, a third of numpy's way; a copy of an array.
    """
    if isinstance(token_ids, np.ndarray) or sys.byteorder != "little" or array("I").itemsize != 4:
        return np.asarray(token_ids, np.dtype("<u4")).tobytes()
    return array("I", token_ids).tobytes()


class KeyChain:
    """Keys of one namespace under one model and layout.

    Source: keyed BLAKE2b (RFC 7693) chained per block; 0.6 us per 16-token block on one core.
    """

    def __init__(
        self,
        fingerprint: str,
        namespace: str,
        secret: bytes,
        block_size: int,
        remembered: Remembered | None = None,
    ) -> None:
        """`remembered`: where prompts are looked for before they are hashed."""
        if len(secret) > MAX_SECRET_BYTES:
            raise ValueError(f"namespace secret has {len(secret)} bytes; at most {MAX_SECRET_BYTES}")
        self._secret = secret
        self._keyed = hashlib.blake2b(digest_size=KEY_BYTES, key=secret)
        self._block_size = block_size
        self.owner = owner_of(namespace)
        root = f"kvtier-key-1|{fingerprint}|{namespace}|{block_size}".encode()
        self.root = hashlib.blake2b(root, digest_size=KEY_BYTES, key=secret).digest()
        self._branch: tuple[int, bytes] | None = None  # first block that is named apart, and as what
        self._remembered = remembered
        self._run_bytes = 4 * block_size * max(1, RUN_TOKENS // block_size)  # of a run's tokens

    @property
    def block_size(self) -> int:
        return self._block_size

    def branched(self, num_tokens: int, name: str) -> KeyChain:
        """The same chain up to num_tokens; blocks that hold later tokens are named apart, as of `name`."""
        chain = copy.copy(self)
        chain._branch = num_tokens // self._block_size, name.encode()
        return chain

    def extend(
        self, keys: list[bytes], token_ids: Sequence[int], goes_on: Callable[[bytes], bool] | None = None
    ) -> None:
        """Append the keys of all full blocks of `token_ids` that `keys` does not cover yet.

        `goes_on` is asked now and then, with the last key so far, whether those behind it are wanted at all.
        Cost: a hash per block, and none for what is remembered of earlier prompts.
        """
        if self._branch is not None and len(keys) < self._branch[0]:
            self._extend(keys, token_ids[: self._branch[0] * self._block_size], None)
        self._extend(keys, token_ids, goes_on)

    def _extend(self, keys: list[bytes], token_ids: Sequence[int], goes_on: Callable[[bytes], bool] | None) -> None:
        end = len(token_ids) // self._block_size
        if len(keys) >= end:
            return
        is_first = True
        for raw in self._runs_of(token_ids, len(keys), end, first_alone=goes_on is not None):
            parent = self._parent(keys[-1] if keys else None, len(keys))
            remembered = self._remembered if len(raw) == self._run_bytes else None
            run = None if remembered is None else remembered.find(parent, raw)
            was_known = run is not None
            if run is None:
                run = self._hashed(parent, raw)
                if remembered is not None:
                    remembered.add(parent, raw, run)
            keys += run
            if goes_on is not None and (is_first or not was_known) and not goes_on(keys[-1]):
                return  # nothing is saved by stopping at what is remembered, but the rest of a prompt need not be looked at
            is_first = False

    def _runs_of(self, token_ids: Sequence[int], start: int, end: int, *, first_alone: bool) -> Iterator[bytes]:
        """The tokens of blocks [start, end) run by run. `first_alone`: the others may not be wanted."""
        block_bytes, run = 4 * self._block_size, self._run_bytes
        first, last = start * block_bytes, end * block_bytes
        if first_alone and first == 0 and last > run:
            yield token_bytes(token_ids[: run // 4])
            first = run
        behind = first if first > run else 0  # a copy of the list would cost half as much as turning it into bytes
        raw = token_bytes(token_ids[behind // 4 :] if behind else token_ids)
        while first < last:
            stop = min(first - first % run + run, last)
            yield raw[first - behind : stop - behind]
            first = stop

    def _hashed(self, parent: bytes, raw: bytes) -> list[bytes]:
        """Keys of the blocks of these tokens."""
        step = self._block_size * 4
        keyed = self._keyed.copy  # a copy has the secret absorbed already: a quarter less than keying each hash
        found = []
        for offset in range(0, len(raw), step):  # a chain is sequential: no array form
            link = keyed()
            link.update(parent + raw[offset : offset + step])
            parent = link.digest()
            found.append(parent)
        return found

    def seal(self, parent: bytes | None, tail_token_ids: Sequence[int], block: int = -1) -> bytes:
        """Key of a partial tail block (fewer than block_size tokens); `block` is its number, for a branched chain."""
        raw = token_bytes(tail_token_ids)
        told = self._parent(parent, block) + raw + b"tail"
        return hashlib.blake2b(told, digest_size=KEY_BYTES, key=self._secret).digest()

    def _parent(self, parent: bytes | None, block: int) -> bytes:
        """What the key of a block is made from beside its tokens: the key before it, turned where the branch begins."""
        before = parent or self.root
        if self._branch is None or self._branch[0] != block:
            return before
        return hashlib.blake2b(before + self._branch[1] + b"branch", digest_size=KEY_BYTES, key=self._secret).digest()
