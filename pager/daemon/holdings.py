"""Holdings: what one client process holds of one layer group. It dies with the process, never with the socket (rule 10).

    reserved   slots that the client may be writing to; STAGING until it commits
    leased     slots that the client may be reading from, counted; held as for any copy (rule 7)
    copying    of both: slots that we copy into or out of for the client; they are not given back meanwhile
    held       blocks that must not vanish while the client's sequences refer to them; a reference each
    pinned     blocks that stay in every tier until a time, referred to or not

Changes the books of a group, under the lock of whoever calls. Guards rule 8: while the process lives, a slot with a copy of
it in flight is neither freed nor given to anybody else, connected or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import hints
from ..group import BlockGroup
from ..inspection.events import tags_of
from ..states import NOWHERE, IntArray, SlotState


class Holdings:
    """Of one client in one group."""

    def __init__(self, group: BlockGroup, lease_limit: int, hold_limit: int) -> None:
        self.group = group
        self.lease_limit, self.hold_limit = lease_limit, hold_limit
        self.reserved = np.zeros(len(group.host), bool)
        self.leased = np.zeros(len(group.host), np.int32)
        self.copying = np.zeros(len(group.host), np.int32)  # copies of ours that the client ordered, under way
        self.held: set[int] = set()
        self._private: set[int] = set()  # of the held: blocks that nobody else can know of
        self._pins: dict[int, tuple[int, float]] = {}  # blocks: serial, and until when
        self._unflushed: dict[int, int] = {}  # of the held: committed since the last flush, and which commit it was
        self._num_committed = 0

    # ------------------------------------------------------------------ questions
    def num_slots(self) -> int:
        return int(self.reserved.sum() + self.leased.sum())

    def room(self) -> int:
        """Slots that it may still lease or reserve."""
        return max(0, self.lease_limit - self.num_slots())

    def references(self) -> IntArray:
        """Blocks once per reference of this client."""
        held = np.fromiter(self.held, np.int64, len(self.held))
        return np.concatenate([held, self.group.host.block[self.reserved]])

    # ------------------------------------------------------------------ slots
    def reserve(self, slots: IntArray, owner: int) -> None:
        """Take free slots: STAGING, for blocks that have no name yet."""
        group = self.group
        blocks = group.directory.create(np.zeros(len(slots), np.int64), owner)
        group.ref(blocks)
        group.host.stage(slots, blocks)
        group.directory.host_slot[blocks] = slots
        group.note_new(blocks)
        self.reserved[slots] = True

    def lease(self, slots: IntArray) -> None:
        """A lease per mention of a slot."""
        np.add.at(self.group.host.holds, slots, 1)  # rule 7
        np.add.at(self.leased, slots, 1)

    def release(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Give back leases and reservations, one per mention of a slot; False where there is neither any more."""
        earlier = _earlier_mentions(slots)
        is_leased = self.leased[slots] > earlier
        is_reserved = self.reserved[slots] & (earlier == 0)  # a slot is one or the other
        ended, counts = np.unique(slots[is_leased], return_counts=True)
        self._end_leases(ended, counts)
        self._end_reservations(slots[is_reserved])
        return is_leased | is_reserved

    def is_in_use(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether a copy runs that giving these slots back, once per mention, would leave without a hold."""
        last: npt.NDArray[np.bool_] = (self.copying[slots] > 0) & (self.leased[slots] <= 1 + _earlier_mentions(slots))
        return last

    def _end_leases(self, slots: IntArray, count: npt.NDArray[np.signedinteger]) -> None:
        group = self.group
        group.host.holds[slots] -= count
        self.leased[slots] -= count
        blocks = group.host.block[slots]
        blocks = blocks[blocks >= 0]
        group.discard_dead(blocks[group.directory.refs[blocks] == 0])

    def _end_reservations(self, slots: IntArray) -> None:
        group = self.group
        blocks = group.host.block[slots]
        self.reserved[slots] = False
        group.host.drop(slots)
        group.directory.host_slot[blocks] = NOWHERE
        group.policy.left("host", blocks, evicted=False)
        group.unref(blocks)

    # ------------------------------------------------------------------ commits
    def commit(
        self,
        slots: IntArray,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        tokens: IntArray,
        owners: npt.NDArray[np.uint32],
        *,
        hold: bool,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Reserved slots, each once, were written whole: name their blocks, and lease them. Returns per block whether it
        was taken and whether it is held now; not taken is a key that a valid block, or an earlier one of these, has.

        A private block (no tokens) without a hold is forgotten when its lease ends: nobody could ask for it.
        """
        group, d = self.group, self.group.directory
        blocks = group.host.block[slots]
        taken = self._free_names(keys)
        for i in np.flatnonzero(taken).tolist():
            self._name(int(blocks[i]), keys[i], parents[i], int(tokens[i]), int(owners[i]))
        at, named = slots[taken], blocks[taken]
        group.policy.depth[named] = d.depth[named]
        group.touch(named)
        group.host.publish(at)
        self.reserved[at] = False
        self.lease(at)
        is_held = np.zeros(len(slots), bool)
        is_held[taken] = self._end_reservations_of(named, hold=hold, is_private=tokens[taken] == 0)
        return taken, is_held

    def _free_names(self, keys: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of these keys no valid block has. What has one and was lost meanwhile gives it up: its users find a miss."""
        d = self.group.directory
        twins = d.find(list(keys))
        free = ~d.is_valid(twins)
        for twin in dict.fromkeys(twins[free & (twins >= 0)].tolist()):
            d.unbind(twin)
        first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
        free &= np.fromiter((first[key] == i for i, key in enumerate(keys)), bool, len(keys))
        return free

    def _name(self, block: int, key: bytes, parent: bytes | None, tokens: int, owner: int) -> None:
        group, d = self.group, self.group.directory
        d.owner[block] = owner
        d.bind(block, key, parent, tokens)
        before = None if parent is None else d.by_key.get(parent)
        d.depth[block] = 0 if before is None else d.depth[before] + 1
        if before is not None and tokens == group.layout.block_size:
            d.note_child(before, key)

    def _end_reservations_of(
        self, blocks: IntArray, *, hold: bool, is_private: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """The reservation's reference becomes a hold, where that is wanted and there is room; returns where."""
        room = max(0, self.hold_limit - len(self.held)) if hold else 0
        held, rest = blocks[:room].tolist(), blocks[room:]
        self.held.update(held)
        self._num_committed += 1
        self._unflushed.update(dict.fromkeys(held, self._num_committed))
        self._private.update(blocks[:room][is_private[:room]].tolist())
        for block in rest[is_private[room:]].tolist():
            self.group.directory.unbind(block)
        self.group.unref(rest)
        is_held: npt.NDArray[np.bool_] = np.arange(len(blocks)) < room
        return is_held

    def unflushed(self) -> dict[int, int]:
        """Held blocks that no flush has made durable so far; also those that one is at work on."""
        return dict(self._unflushed)

    def flushed(self, blocks: dict[int, int]) -> None:
        """These are durable, as `unflushed` gave them: an id may be another block's by now."""
        for block, number in blocks.items():
            if self._unflushed.get(block) == number:
                del self._unflushed[block]

    # ------------------------------------------------------------------ holds
    def hold(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Refer to these blocks, each at most once per client. False where the client's limit is reached."""
        wanted = blocks.tolist()
        new = list(dict.fromkeys(block for block in wanted if block not in self.held))
        new = new[: max(0, self.hold_limit - len(self.held))]
        if new:
            self.held.update(new)
            self.group.ref(np.array(new, np.int64))
        return np.fromiter((block in self.held for block in wanted), bool, len(wanted))

    def is_alone_with(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether nobody but this client refers to each block."""
        mine = np.fromiter((block in self.held for block in blocks.tolist()), np.int64, len(blocks))
        alone: npt.NDArray[np.bool_] = self.group.directory.refs[blocks] <= mine
        return alone

    # ------------------------------------------------------------------ pins for a time
    def pin(self, blocks: IntArray, until_s: float) -> None:
        """Until then, or until this client goes, whatever becomes of its holds."""
        if not len(blocks):
            return
        now_s, serial = self.group.clock(), self.group.directory.serial
        self._pins = {block: pin for block, pin in self._pins.items() if pin[1] > now_s}
        for block in blocks.tolist():
            earlier = self._pins.get(block, (0, 0.0))
            own_s = earlier[1] if earlier[0] == serial[block] else 0.0
            self._pins[block] = int(serial[block]), max(until_s, own_s)
        hints.pin(self.group, blocks, until_s)

    def pinned(self) -> IntArray:
        """Blocks that it has pinned."""
        serial = self.group.directory.serial
        return np.array([block for block, pin in self._pins.items() if serial[block] == pin[0]], np.int64)

    def pinned_until(self, blocks: IntArray) -> npt.NDArray[np.float64]:
        """Per block how long by this client, 0 where not at all."""
        serial, none = self.group.directory.serial, (-1, 0.0)
        pins = ((block, self._pins.get(block, none)) for block in blocks.tolist())
        return np.array([until_s if serial[block] == at else 0.0 for block, (at, until_s) in pins], np.float64)

    def unhold_keys(self, keys: list[bytes]) -> None:
        """A held block that was lost has no name any more: then what is left of it, the tag of its key, finds it."""
        d = self.group.directory
        blocks = d.find(keys)
        is_known = np.fromiter((block in self.held for block in blocks.tolist()), bool, len(keys))
        self.unhold(blocks[is_known])
        if not is_known.all() and self.held:
            held = np.fromiter(self.held, np.int64, len(self.held))
            held = held[~d.is_named[held] & ~d.is_valid(held)]
            self.unhold(held[np.isin(d.tag[held], tags_of([keys[i] for i in np.flatnonzero(~is_known).tolist()]))])

    def unhold(self, blocks: IntArray) -> None:
        gone = [block for block in dict.fromkeys(blocks.tolist()) if block in self.held]
        if not gone:
            return
        self.held.difference_update(gone)
        for block in gone:
            self._unflushed.pop(block, None)
        for block in self._private.intersection(gone):  # nobody can ask for it again
            self.group.directory.unbind(block)
        self._private.difference_update(gone)
        self.group.unref(np.array(gone, np.int64))

    # ------------------------------------------------------------------ the end
    def end(self) -> None:
        """The process is gone, or said that no copy of its runs any more."""
        leased = np.flatnonzero(self.leased)
        if len(leased):
            self._end_leases(leased, self.leased[leased].copy())
        reserved = np.flatnonzero(self.reserved)
        if len(reserved):
            self._end_reservations(reserved)
        self.unhold(np.fromiter(self.held, np.int64, len(self.held)))

    def check(self) -> bool:
        """Whether reserved slots are STAGING and leased ones VALID and held."""
        host = self.group.host
        return bool(
            (host.state[self.reserved] == SlotState.STAGING).all()
            and (host.state[self.leased > 0] == SlotState.VALID).all()
            and (self.leased >= 0).all()
            and (host.holds >= self.leased).all()
        )


def _earlier_mentions(slots: IntArray) -> IntArray:
    """Of each place in a message, how many places before it name the same slot."""
    order = np.argsort(slots, kind="stable")
    _, counts = np.unique(slots, return_counts=True)
    found = np.empty(len(slots), np.int64)
    found[order] = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
    return found
