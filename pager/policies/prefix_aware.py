"""A chain is eaten from its end, and the dearer it would be to have it back, the later.

What a block saves is the time to compute it again, or to load it from the tier below where that is quicker. Computing
grows with depth, as attention does; so long chains are dearer, up to where loading wins. Source: GreedyDual (`costed`),
with the cost of a block of the chain's mean depth; the cost model is that of a transformer's FLOPs per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .base import UNKNOWN, BoolArray, IntArray, Request
from .costed import Costed

_CLASSES = 16  # of cost, two to a doubling
_ASKED_EVERY = 64  # uses: what loading takes, as measured
EVEN_TOKENS = 32768  # where attention costs as much as all else: about so for 8B models


class PrefixAware(Costed):
    """`load_cost` says the time to load a block from below over the time to compute one at depth 0; inf: nothing is below."""

    name = "prefix"

    def __init__(self, capacity: int, block_size: int, load_cost: Callable[[], float] = lambda: math.inf) -> None:
        super().__init__(capacity, 2.0 ** (np.arange(_CLASSES) / 2))
        self._per_block, self._ask_load_cost = block_size / EVEN_TOKENS, load_cost
        self._load_cost, self._asked = load_cost(), 0

    def on_chain(self, chain: IntArray, held: BoolArray, request: Request = UNKNOWN) -> None:
        self.put(chain, np.full(len(chain), self._class_of(len(chain) / 2)))

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        self.depth[blocks] = depth
        self.put(blocks, np.full(len(blocks), self._class_of(float(depth.mean()) if len(depth) else 0.0)))

    def on_hit(self, blocks: IntArray) -> None:
        """Of a chain perhaps only those that one tier holds."""
        deepest = int(self.depth[blocks].max()) if len(blocks) else 0
        self.put(blocks, np.full(len(blocks), self._class_of((deepest + 1) / 2)))

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.on_hit(blocks)

    def _class_of(self, depth: float) -> int:
        self._asked += 1
        if not self._asked % _ASKED_EVERY:
            self._load_cost = self._ask_load_cost()
        cost = min(1.0 + depth * self._per_block, self._load_cost)
        return min(_CLASSES - 1, max(0, int(2 * math.log2(max(cost, 1e-9)))))
