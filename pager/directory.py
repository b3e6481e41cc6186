"""Directory: for every block of one layer group its key, where it is in each tier, references and version.

Pure bookkeeping on arrays: no I/O, no clock, no streams. The group decides and tells us what happened. A block id is
an index into these arrays; an id is reused only after its block has left every tier and every table.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
import numpy.typing as npt

from ..tiers.errors import InvariantError
from .inspection.events import tags_of
from .states import NOWHERE, HostSlots, IntArray, Pages, SlotState

_FIRST_SIZE = 1024


class Directory:
    """Block -> key, page, host slot, NVMe slot, references, version."""

    def __init__(self, pages: Pages, host: HostSlots) -> None:
        self.pages = pages
        self.host = host
        self.page = np.full(_FIRST_SIZE, NOWHERE, np.int64)
        self.host_slot = np.full(_FIRST_SIZE, NOWHERE, np.int64)
        self.nvme_slot = np.full(_FIRST_SIZE, NOWHERE, np.int64)
        self.nvme_valid = np.zeros(_FIRST_SIZE, bool)  # False while the write is on its way
        self.nvme_holds = np.zeros(_FIRST_SIZE, np.int32)
        self.nvme_hit = np.zeros(_FIRST_SIZE, bool)  # read since it was written
        self.owner = np.zeros(_FIRST_SIZE, np.uint32)  # tag of the namespace that it belongs to
        self.refs = np.zeros(_FIRST_SIZE, np.int32)
        self.version = np.zeros(_FIRST_SIZE, np.int64)
        self.serial = np.zeros(_FIRST_SIZE, np.int64)  # which of the blocks that had this id it is
        self.tag = np.zeros(_FIRST_SIZE, np.uint32)  # first bytes of the key; stays when the block is unnamed
        self.used_s = np.zeros(_FIRST_SIZE, np.float64)
        self.tokens = np.zeros(_FIRST_SIZE, np.int32)
        self.depth = np.zeros(_FIRST_SIZE, np.int64)
        self.pinned_until = np.zeros(_FIRST_SIZE, np.float64)
        self.is_released = np.zeros(_FIRST_SIZE, bool)  # hints, until the next use: not used again,
        self.is_demoted = np.zeros(_FIRST_SIZE, bool)  # not used soon
        self.is_reused = np.zeros(_FIRST_SIZE, bool)  # found again by somebody, at any time
        self.fetched = np.zeros(_FIRST_SIZE, np.uint8)  # tiers that it was prefetched into and not read in: fetched.py
        self.child_tag = np.zeros(_FIRST_SIZE, np.uint32)  # of the first whole block that was named behind this one
        self.is_fork = np.zeros(_FIRST_SIZE, bool)  # another one was, too
        self.is_unpackable = np.zeros(_FIRST_SIZE, bool)  # its values do not fit the host tier's format
        self.is_rounded = np.zeros(_FIRST_SIZE, bool)  # its page was filled from a tier that keeps fewer bits
        self.named = np.zeros(_FIRST_SIZE, np.int64)  # which of all namings gave it its key; 0 while it has none
        self.is_live = np.zeros(_FIRST_SIZE, bool)
        self.is_named = np.zeros(_FIRST_SIZE, bool)
        self.key: list[bytes | None] = [None] * _FIRST_SIZE
        self.parent: list[bytes | None] = [None] * _FIRST_SIZE
        self.by_key: dict[bytes, int] = {}
        self._free: list[int] = list(range(_FIRST_SIZE - 1, -1, -1))
        self._num_created = self._num_named = 0

    # ------------------------------------------------------------------ making and forgetting blocks
    def create(self, depth: IntArray, owner: int | npt.NDArray[np.uint32]) -> IntArray:
        """New live blocks of a namespace, in no tier, with no reference and no key."""
        if len(self._free) < len(depth):
            self._grow(len(depth) - len(self._free))
        first = len(self._free) - len(depth)
        blocks = np.array(self._free[first:][::-1], np.int64)
        del self._free[first:]
        at = slice(blocks[0], blocks[-1] + 1) if _is_run(blocks) else blocks  # of a million, much faster
        self.page[at] = self.host_slot[at] = self.nvme_slot[at] = NOWHERE
        self.nvme_valid[at] = False
        self.nvme_holds[at] = 0
        self.refs[at] = 0
        self.version[at] = 0
        self.serial[at] = np.arange(self._num_created, self._num_created + len(blocks))
        self._num_created += len(blocks)
        self.tag[at] = 0
        self.tokens[at] = 0
        self.pinned_until[at] = 0.0
        self.is_released[at] = self.is_demoted[at] = self.is_fork[at] = False
        self.is_reused[at] = False
        self.child_tag[at] = self.fetched[at] = 0
        self.is_unpackable[at] = self.is_rounded[at] = False
        self.depth[at] = depth
        self.owner[at] = owner
        self.is_live[at] = True
        return blocks

    def bind(self, block: int, key: bytes, parent: bytes | None, tokens: int) -> bool:
        """Name a block. False when another block already has that key (this one then stays private)."""
        if self.key[block] is not None:
            raise InvariantError(f"block {block} already has a key")
        if key in self.by_key:
            return False
        self.by_key[key] = block
        self.key[block] = key
        self.is_named[block] = True
        self._num_named += 1
        self.named[block] = self._num_named
        self.tag[block] = int.from_bytes(key[:4], "big")
        self.parent[block] = parent
        self.tokens[block] = tokens
        return True

    def note_child(self, parent: int, key: bytes) -> None:
        """A whole block of this key continues that one: chains part where there are two."""
        tag = int.from_bytes(key[:4], "big")
        if not self.child_tag[parent]:
            self.child_tag[parent] = tag
        self.is_fork[parent] |= self.child_tag[parent] != tag

    def bind_many(self, blocks: IntArray, keys: list[bytes] | npt.NDArray[np.void], tokens: IntArray) -> IntArray:
        """Name nameless blocks, as after a restart. Returns those whose key another block has already."""
        names, ids = keys if isinstance(keys, list) else keys.tolist(), blocks.tolist()
        first = dict(zip(names, ids, strict=True))
        is_known = len(first) < len(names) or not self.by_key.keys().isdisjoint(first.keys())
        if is_known:
            first = dict(zip(reversed(names), reversed(ids), strict=True))  # of two alike, the earlier one
            for key in first.keys() & self.by_key.keys():
                del first[key]
            keys, names, ids = list(first), list(first), list(first.values())
        self.by_key.update(first)
        named = np.array(ids, np.int64) if is_known else blocks
        self.is_named[named] = True
        self.named[named] = np.arange(self._num_named + 1, self._num_named + 1 + len(named))
        self._num_named += len(named)
        self.tokens[blocks] = tokens
        self.tag[named] = tags_of(keys)
        if _is_run(named):
            self.key[ids[0] : ids[-1] + 1] = names
        else:
            for key, block in first.items():
                self.key[block] = key
        return blocks[~self.is_named[blocks]]

    def forget(self, blocks: IntArray) -> None:
        """These blocks have left every tier and every table: their ids may be reused."""
        somewhere = (self.page[blocks] >= 0) | (self.host_slot[blocks] >= 0) | (self.nvme_slot[blocks] >= 0)
        if somewhere.any() or self.refs[blocks].any():
            block = int(blocks[np.argmax(somewhere | (self.refs[blocks] != 0))])
            raise InvariantError(
                f"block {block}: forgotten with refs={self.refs[block]} page={self.page[block]} "
                f"host={self.host_slot[block]} nvme={self.nvme_slot[block]}"
            )
        for block in blocks[self.is_named[blocks]].tolist():
            self.unbind(block)
        self.is_live[blocks] = False
        self._free.extend(blocks.tolist())

    def unbind(self, block: int) -> None:
        key = self.key[block]
        if key is not None:
            del self.by_key[key]
            self.key[block] = None
            self.is_named[block] = False
            self.named[block] = 0
            self.parent[block] = None

    # ------------------------------------------------------------------ questions
    def find(self, keys: list[bytes]) -> IntArray:
        """Block ids by key, NOWHERE where unknown."""
        return np.fromiter(map(self.by_key.get, keys, repeat(NOWHERE)), np.int64, len(keys))

    def in_device(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        return self.pages.readable(self.page[blocks])

    def in_host(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        slots = self.host_slot[blocks]
        return (
            (slots >= 0) & (self.host.state[np.maximum(slots, 0)] == SlotState.VALID) if len(self.host) else slots >= 0
        )

    def on_nvme(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        return self.nvme_valid[blocks]

    def is_valid(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether some tier holds a whole copy. Blocks of NOWHERE (-1) are not."""
        held = blocks >= 0
        safe = blocks if held.all() else np.maximum(blocks, 0)
        found = self.in_device(safe)
        if not found.all():  # mostly the first tier has them all
            found = found | self.in_host(safe) | self.on_nvme(safe)
        return held & found

    def live(self) -> IntArray:
        return np.flatnonzero(self.is_live)

    def _grow(self, more: int) -> None:
        """Room for so many ids more, at least; the size doubles."""
        old = new = len(self.page)
        while new < old + more:
            new *= 2
        for name, fill in (("page", NOWHERE), ("host_slot", NOWHERE), ("nvme_slot", NOWHERE)):
            setattr(self, name, _extended(getattr(self, name), new, fill))
        for name in (
            "nvme_valid",
            "nvme_holds",
            "nvme_hit",
            "tag",
            "used_s",
            "owner",
            "refs",
            "version",
            "serial",
            "tokens",
            "depth",
            "pinned_until",
            "is_released",
            "is_demoted",
            "child_tag",
            "fetched",
            "is_reused",
            "is_fork",
            "is_unpackable",
            "is_rounded",
            "is_live",
            "is_named",
            "named",
        ):
            setattr(self, name, _extended(getattr(self, name), new, 0))
        self.key.extend([None] * (new - old))
        self.parent.extend([None] * (new - old))
        self._free[:0] = range(new - 1, old - 1, -1)


def _is_run(ids: IntArray) -> bool:
    """Whether they follow each other."""
    return len(ids) > 0 and bool((np.diff(ids) == 1).all())


def _extended(array: npt.NDArray[np.generic], size: int, fill: int) -> npt.NDArray[np.generic]:
    grown = np.full(size, fill, array.dtype)
    grown[: len(array)] = array
    return grown
