"""Rules that are about what one cache holds (a hand, a share for newcomers, ghosts, an age), one for each tier of a pager.

Each hears of a use what concerns the blocks that its tier holds, of each copy that comes and goes, and nothing else; so
device, host and nvme each run the rule as published. A ghost of a tier lives while the block lies in another one; of a
block that has left all of them, each rule's memory is kept by its key, for as many blocks as the tiers hold, and given back
when the key is named again. No pins, no copies, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from .base import IntArray, Policy
from .queues import QueuePolicy


class ByTier(Policy):
    """`rules`: fastest tier first."""

    def __init__(self, rules: Mapping[str, QueuePolicy]) -> None:
        super().__init__(sum(rule.capacity for rule in rules.values()))
        self._rules = dict(rules)
        self.name = next(iter(rules.values())).name
        self._remembered: OrderedDict[bytes, list[int]] = OrderedDict()
        self.grow(len(self.depth))

    def grow(self, num_ids: int) -> None:
        super().grow(num_ids)
        for rule in self._rules.values():
            rule.grow(num_ids)
            rule.depth = self.depth

    def of(self, tier: str) -> Policy:
        return self._rules[tier]

    # ------------------------------------------------------------------ what happened
    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        """Which tier they are in, `entered` tells."""
        self.depth[blocks] = depth

    def on_hit(self, blocks: IntArray) -> None:
        for rule in self._rules.values():
            held = _held(rule, blocks)
            if held.any():
                rule.on_hit(blocks[held])

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        for rule in self._rules.values():
            held = _held(rule, blocks)
            if held.any():
                rule.on_access(blocks[held], None if distance_tokens is None else distance_tokens[held])

    def on_release(self, blocks: IntArray) -> None:
        for rule in self._rules.values():
            rule.on_release(blocks[_held(rule, blocks)])

    def on_forget(self, blocks: IntArray) -> None:
        for rule in self._rules.values():
            rule.on_forget(blocks)

    def entered(self, tier: str, blocks: IntArray) -> None:
        rule = self._rules[tier]
        new = blocks[~_held(rule, blocks)]
        if len(new):
            rule.on_insert(new, self.depth[new])

    def left(self, tier: str, blocks: IntArray, *, evicted: bool = True) -> None:
        rule = self._rules[tier]
        blocks = blocks[_held(rule, blocks)]
        if len(blocks):
            rule.on_leave(blocks) if evicted else rule.on_forget(blocks)

    # ------------------------------------------------------------------ memory beyond an id
    def gone(self, block: int, key: bytes) -> None:
        self._remembered[key] = [rule.memory_of(block) for rule in self._rules.values()]
        self._remembered.move_to_end(key)
        while len(self._remembered) > self.capacity:
            self._remembered.popitem(last=False)

    def named(self, block: int, key: bytes) -> None:
        memories = self._remembered.pop(key, None)
        if memories is None:
            return
        one = np.array([block])
        for rule, memory in zip(self._rules.values(), memories, strict=True):
            if memory >= 0 and _held(rule, one).all():
                rule.on_return(one, memory)


def _held(rule: QueuePolicy, blocks: IntArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return rule.queues.place[blocks] >= 0
