"""What every eviction policy promises, and the part that they share: a place per block, and choosing by place.

A policy keeps books on block ids and names who should leave; it moves nothing, knows no pins and no tiers. The pager
asks it for victims among the blocks that may go (`victims`), so no order of a policy can break rules 6 and 7. A replay,
where all may go, asks for the coldest of all (`coldest`), which costs nothing per block that stays.

Chains come whole and root first. Within one access the end of a chain is colder than its root, because a prefix is
useful without its end and never the other way round. A request counts once (`on_chain`), however many steps it takes
(`on_access`): decoding token by token is no reuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..states import NOWHERE, IntArray

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
_FIRST_SIZE = 1024
_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Request:
    """What a pager can see of one request, besides its blocks. Tokens are 0 where unknown."""

    now_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    has_partial_tail: bool = False  # the last block of the chain is not full


UNKNOWN = Request()


class Policy:
    """Order of leaving. `rank` is lowest for who leaves first, and comparable between all held blocks."""

    name = ""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)  # blocks; a share of it is what some policies give to newcomers
        self.depth = np.zeros(_FIRST_SIZE, np.int64)

    # ------------------------------------------------------------------ what happened
    def on_chain(self, chain: IntArray, held: BoolArray, request: Request = UNKNOWN) -> None:
        """A request used this chain, from block 0 on; `held` says which of its blocks were there before it."""
        depth = np.arange(len(chain))
        if not held.all():
            self.on_insert(chain[~held], depth[~held])
        if held.any():
            self.on_hit(chain[held])

    def on_insert(self, blocks: IntArray, depth: IntArray) -> None:
        """These blocks are new here, `depth` blocks from the root of their chain."""
        raise NotImplementedError

    def on_hit(self, blocks: IntArray) -> None:
        """A new request found these blocks."""
        raise NotImplementedError

    def on_access(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        """A step of a running request read these; `distance_tokens` is how far each lies behind the newest token."""

    def on_mass(self, blocks: IntArray, mass: FloatArray) -> None:
        """Share of attention that each block drew in a step. Only `importance` cares."""

    def on_release(self, blocks: IntArray) -> None:
        """Nobody will ask for these again: they leave first."""
        raise NotImplementedError

    def on_evict(self, blocks: IntArray) -> None:
        """These left. Policies with ghosts remember them."""
        raise NotImplementedError

    def on_leave(self, blocks: IntArray) -> None:
        """As on_evict, in a pager at work, where `victims` chose: what a rule does in passing, it does now."""
        self.on_evict(blocks)

    def on_forget(self, blocks: IntArray) -> None:
        """These ids will name other blocks from now on: nothing about them may be remembered."""
        self.on_evict(blocks)

    # ------------------------------------------------------------------ tiers and names, in a pager at work
    def of(self, tier: str) -> Policy:
        """The order of one tier: this one for all of them, but for rules that are about one tier's content (`by_tier`)."""
        return self

    def entered(self, tier: str, blocks: IntArray) -> None:
        """A copy of these is, or will soon be, in that tier."""

    def left(self, tier: str, blocks: IntArray, *, evicted: bool = True) -> None:
        """Their copies there are gone; not `evicted`: they were stale, or their blocks end."""

    def gone(self, block: int, key: bytes) -> None:
        """This block leaves the last tier, and its id with it; somebody may come back with its key."""

    def named(self, block: int, key: bytes) -> None:
        """This block turns out to be what the key names."""

    # ------------------------------------------------------------------ who should leave
    def rank(self, blocks: IntArray) -> npt.NDArray[Any]:
        raise NotImplementedError

    def victims(self, n: int, candidates: IntArray) -> IntArray:
        """Up to n of the candidates, first to leave first. Changes nothing. Cost: O(candidates)."""
        return lowest(n, candidates, self.rank(candidates)) if n > 0 and len(candidates) else candidates[:0]

    def coldest(self, n: int) -> IntArray:
        """Up to n of all held blocks, first to leave first; `on_evict` must follow. Cost: O(n), amortised."""
        raise NotImplementedError

    def grow(self, num_ids: int) -> None:
        """Make room for block ids below num_ids."""
        if num_ids > len(self.depth):
            self.depth = resized(self.depth, max(num_ids, 2 * len(self.depth)), 0)


def lowest(n: int, candidates: IntArray, rank: npt.NDArray[Any]) -> IntArray:
    """The n candidates of lowest rank, in order of rank."""
    if n < len(candidates):
        chosen = np.argpartition(rank, n - 1)[:n]
    else:
        chosen = np.arange(len(candidates))
    return candidates[chosen[np.argsort(rank[chosen], kind="stable")]]


def resized(array: npt.NDArray[_Scalar], size: int, fill: float) -> npt.NDArray[_Scalar]:
    grown = np.full(size, fill, array.dtype)
    grown[: len(array)] = array
    return grown


__all__ = ["NOWHERE", "UNKNOWN", "BoolArray", "FloatArray", "IntArray", "Policy", "Request", "lowest", "resized"]
