"""What the daemon counts of clients' requests: found in which tier, missed, and missed for how long.

A client with the feature "usage" tells of each request; of others every look-up of a prompt stands for one. Changes no book of
blocks. Guards the figures: what a client believes in and has left meanwhile is not counted as found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..core import Core
from ..lookups import note_found
from ..prefix import Match
from ..states import IntArray
from .client import Client


class RequestCounts:
    """Of one store. `visible`: valid blocks by key that a client may see, negative for all else. Under the core's lock."""

    def __init__(self, core: Core, visible: Callable[[Client, int, list[bytes]], IntArray]) -> None:
        self._core, self._visible = core, visible

    def used(
        self, client: Client, keys: list[bytes], num_tokens: int, by_tier: tuple[int, int, int], *, is_turn: bool
    ) -> None:
        """A client's request, in the client's words: what it found in its own memory (device), in ours and on disk.

        It may believe in blocks that have left since it last asked: those are taken off.
        """
        with self._core.lock:
            size = self._core.block_size
            hit_blocks = sum(by_tier) // size
            gone = self._gone(client, keys[:hit_blocks])
            lost = max(0, len(gone) - by_tier[0] // size) * size
            host = max(0, by_tier[1] - lost)
            by_tier = by_tier[0], host, max(0, by_tier[2] - (lost - (by_tier[1] - host)))
            missed = [*(gone if lost else ()), *keys[hit_blocks:]]
            self._count(client, keys, missed, num_tokens, by_tier, is_turn=is_turn)

    def looked_up(self, client: Client, keys: list[bytes], blocks: IntArray) -> None:
        """`blocks` of the first group were found, in order; a windowed one may lack some that it need not have."""
        size, d = self._core.block_size, self._core.groups[0].directory
        in_host = int(((blocks < 0) | d.in_host(np.maximum(blocks, 0))).sum())
        by_tier = (0, in_host * size, (len(blocks) - in_host) * size)
        self._count(client, keys, keys[len(blocks) :], len(keys) * size, by_tier, is_turn=False)

    def _gone(self, client: Client, keys: list[bytes]) -> list[bytes]:
        """Those that the full layer groups do not hold."""
        index = next((i for i, group in enumerate(self._core.groups) if group.layout.window is None), None)
        if index is None:
            return []
        return [keys[i] for i in np.flatnonzero(self._visible(client, index, keys) < 0).tolist()]

    def _count(
        self,
        client: Client,
        keys: list[bytes],
        missed: list[bytes],
        num_tokens: int,
        by_tier: tuple[int, int, int],
        *,
        is_turn: bool,
    ) -> None:
        tenant, hit_tokens = client.tenant, sum(by_tier)
        ghosts = self._core.observer.looked_up(
            tenant.name, tenant.owns_tags, keys, missed, num_tokens, hit_tokens, is_turn=is_turn
        )
        note_found(self._core, Match(hit_tokens, *by_tier, ghost_tokens=ghosts), num_tokens)
