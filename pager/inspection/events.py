"""Decision events: which blocks moved, left or were refused, when and why, in a ring of fixed size.

One row per batch and one small row per block of it, written where the books change, under the pager's lock. Rows hold the
first four bytes of a block's key (its tag) and never the key: an inspector shows no more than that. What the ring has
overwritten is gone; readers are told where it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..states import IntArray

if TYPE_CHECKING:
    from ..directory import Directory

KINDS = (
    "computed",  # a new block got a page; the engine writes it
    "promoted",  # host -> device
    "demoted",  # device -> host
    "read",  # nvme -> host
    "written",  # host -> nvme
    "relocated",  # nvme -> nvme
    "evicted",  # a copy left a tier, another one may exist
    "dropped",  # the last copy left: the next one who asks computes it again
    "pinned",
    "refused",  # not taken by a tier: quota
    "corrupt",  # read back wrong; never served
    "failed",  # a copy that did not arrive
    "released",  # a client said that it is not used again
)
KIND = {name: number for number, name in enumerate(KINDS)}
TIERS = ("device", "host", "nvme")
TIER = {name: number for number, name in enumerate(TIERS)}
OF_MOVE = {  # kind of move -> kind of event, tier that the block came to
    "host_to_device": (KIND["promoted"], TIER["device"]),
    "device_to_host": (KIND["demoted"], TIER["host"]),
    "nvme_to_host": (KIND["read"], TIER["host"]),
    "host_to_nvme": (KIND["written"], TIER["nvme"]),
    "nvme_to_nvme": (KIND["relocated"], TIER["nvme"]),
}
BATCH = np.dtype(
    [
        ("serial", "<i8"),
        ("first", "<i8"),  # position of its first block, counted from the start of the process
        ("count", "<i8"),
        ("time_s", "<f8"),
        ("started_s", "<f8"),  # of a copy its submission, else time_s
        ("nbytes", "<i8"),
        ("kind", "u1"),
        ("tier", "u1"),
        ("reason", "u1"),
        ("policy", "u1"),
        ("group", "u1"),
    ]
)
MAX_NAMES = 255
NUM_BATCHES, NUM_BLOCKS = 1 << 14, 1 << 17


class Names:
    """Small numbers for the few words that are reasons and policies."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {"": 0}
        self._names = [""]

    def number(self, name: str) -> int:
        found = self._number.get(name)
        if found is None:
            if len(self._names) > MAX_NAMES:
                return 0
            found = self._number[name] = len(self._names)
            self._names.append(name)
        return found

    def __getitem__(self, number: int) -> str:
        return self._names[number]


@dataclass(frozen=True, slots=True)
class Found:
    """Batches with the blocks of each that were asked for, oldest first."""

    batches: npt.NDArray[Any]
    blocks: list[IntArray]
    tags: list[npt.NDArray[np.uint32]]


class EventRing:
    """The last NUM_BATCHES batches and their last NUM_BLOCKS blocks. Cost: about 3 us a batch and 20 ns a block."""

    def __init__(
        self, clock: Callable[[], float], *, num_batches: int = NUM_BATCHES, num_blocks: int = NUM_BLOCKS
    ) -> None:
        self.clock, self.names = clock, Names()
        self.num_written = 0  # batches since the start of the process
        self._batches = np.zeros(num_batches, BATCH)
        self._block = np.zeros(num_blocks, np.int64)
        self._tag = np.zeros(num_blocks, np.uint32)
        self._owner = np.zeros(num_blocks, np.uint32)
        self._next = 0  # block position, counted from the start

    # ------------------------------------------------------------------ writing
    def note(
        self,
        kind: int,
        tier: int,
        group: int,
        directory: Directory,
        blocks: IntArray,
        reason: str,
        *,
        policy: str = "",
        started_s: float | None = None,
        nbytes: int = 0,
    ) -> None:
        """One batch. The lock of the books is held; blocks are live, or were until this call."""
        count = len(blocks)
        if not count:
            return
        now_s, first = self.clock(), self._next
        self._batches[self.num_written % len(self._batches)] = (
            self.num_written,
            first,
            count,
            now_s,
            now_s if started_s is None else started_s,
            nbytes,
            kind,
            tier,
            self.names.number(reason),
            self.names.number(policy),
            group,
        )
        self.num_written += 1
        self._next = first + count
        kept = blocks[-len(self._block) :]
        start = (self._next - len(kept)) % len(self._block)
        size = min(len(kept), len(self._block) - start)
        self._put(directory, slice(start, start + size), kept[:size])
        if size < len(kept):
            self._put(directory, slice(0, len(kept) - size), kept[size:])

    def _put(self, directory: Directory, where: slice, blocks: IntArray) -> None:
        self._block[where] = blocks
        self._tag[where] = directory.tag[blocks]
        self._owner[where] = directory.owner[blocks]

    # ------------------------------------------------------------------ reading
    @property
    def first_serial(self) -> int:
        """The oldest batch that is still there."""
        return max(0, self.num_written - len(self._batches))

    def batches(self, since: int = 0) -> npt.NDArray[Any]:
        """Batches from this serial on, oldest first; a copy."""
        serials = np.arange(max(since, self.first_serial), self.num_written)
        return self._batches[serials % len(self._batches)]

    def blocks_of(self, batch: Any, most: int = 1 << 62) -> tuple[IntArray, npt.NDArray[np.uint32]]:
        """Ids and tags of a batch's blocks, as far as they are still there."""
        end = int(batch["first"] + batch["count"])
        low = max(int(batch["first"]), self._next - len(self._block))
        at = np.arange(low, max(low, min(end, low + most))) % len(self._block)
        return self._block[at], self._tag[at]

    def about(self, wanted: npt.NDArray[np.uint32], group: int | None = None) -> Found:
        """Every batch that has a block with one of these tags, with those blocks. Cost: one pass over the ring."""
        low = max(0, self._next - len(self._block))
        positions = np.arange(low, self._next)
        tags = self._tag[positions % len(self._block)]
        hits = positions[np.isin(tags, wanted)]
        batches = self.batches()
        if not len(batches) or not len(hits):
            return Found(batches[:0], [], [])
        hits = hits[hits >= batches["first"][0]]
        of = np.searchsorted(batches["first"], hits, side="right") - 1
        if group is not None:
            keep = batches["group"][of] == group
            hits, of = hits[keep], of[keep]
        rows, starts = np.unique(of, return_index=True)
        parts = np.split(hits % len(self._block), starts[1:])
        return Found(batches[rows], [self._block[p] for p in parts], [self._tag[p] for p in parts])

    def by_owner(self, kind: int, since_s: float) -> dict[int, int]:
        """Blocks by namespace tag in batches of one kind since a time."""
        batches = self.batches()
        batches = batches[(batches["kind"] == kind) & (batches["time_s"] >= since_s)]
        total: dict[int, int] = {}
        for batch in batches:
            end = int(batch["first"] + batch["count"])
            at = np.arange(max(int(batch["first"]), self._next - len(self._block)), end) % len(self._block)
            for owner, count in zip(*np.unique(self._owner[at], return_counts=True), strict=True):
                total[int(owner)] = total.get(int(owner), 0) + int(count)
        return total

    def row(self, batch: Any) -> dict[str, Any]:
        """A batch as plain values; times are of the pager's clock."""
        return {
            "serial": int(batch["serial"]),
            "time_s": float(batch["time_s"]),
            "what": KINDS[batch["kind"]],
            "tier": TIERS[batch["tier"]],
            "reason": self.names[batch["reason"]],
            "policy": self.names[batch["policy"]],
            "group": int(batch["group"]),
            "blocks": int(batch["count"]),
            "bytes": int(batch["nbytes"]),
            "seconds": float(batch["time_s"] - batch["started_s"]),
        }


def tag_of(key: bytes) -> int:
    """The first eight hexadecimal digits of a key, as a number: all of it that anybody is shown."""
    return int.from_bytes(key[:4], "big")


def tags_of(keys: list[bytes] | npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """`tag_of` many keys of one length."""
    if not len(keys):
        return np.zeros(0, np.uint32)
    whole = (
        np.frombuffer(b"".join(keys), np.uint8) if isinstance(keys, list) else np.ascontiguousarray(keys).view(np.uint8)
    )
    raw = whole.reshape(len(keys), -1)[:, :4]
    return np.ascontiguousarray(raw).view(">u4").reshape(-1).astype(np.uint32)
