"""Sharing: what a client's pager does beyond an embedded one, so that what it has is everybody's and what it needs stays.

    find      before matching a prompt: ask the daemon for its keys, and enter what it has into our directory
    beat      at every heartbeat: offer new blocks, give back slots that nobody reads, hold what our sequences refer to
    lost      the daemon is gone: nothing lies below any more; the device tier and leased slots remain
    attached  another daemon is there: its memory instead of the old one's, and what it still has of what we refer to

Takes the pager's lock for books only; whatever asks the daemon runs without it. Guards: nothing counts as held below that the
daemon has not said it has, and memory changes only while no copy touches it (rules 8, 9).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...tiers.errors import KvTierError
from ...tiers.streams import Backend, IntArray
from ..core import Core
from ..group import BlockGroup
from ..keys import KeyChain
from ..page_table import Sequence as TokenSequence
from ..page_table import num_blocks_of
from ..states import NOWHERE, PageState, SlotState
from ..wire.messages import IN_MEMORY, IS_HELD, KEY_BYTES, STORED
from .attachment import Attachment
from .daemon_copies import DaemonCopies
from .marks import Marks
from .slab import LeasedSlab
from .tier import RemoteTier

FREED_AT_ONCE = 1024  # handles beyond what is short
HOLD_PAUSE_S = 1.0  # after the daemon said that we hold too much
_LOOK_S = 0.05


class Sharing:
    """Of one client pager. `slabs` as in RemoteTier."""

    def __init__(
        self, core: Core, tier: RemoteTier, slabs: Sequence[LeasedSlab] | None, copies: DaemonCopies | None = None
    ) -> None:
        self._core, self._tier, self._slabs, self._copies = core, tier, slabs, copies
        self._is_reconciling = [False] * len(core.groups)
        self._hold_again_s = [0.0] * len(core.groups)
        self.marks = Marks(core, tier)
        core.on_advance = self.beat

    # ------------------------------------------------------------------ finding
    def find(self, chain: KeyChain, keys: list[bytes], first: int = 0) -> None:
        """Enter into the directory what the daemon has of these keys, blocks `first` and on of a chain, and hold it.

        Asks for nothing that every group has already. Without a daemon it does nothing.
        """
        with self._core.lock:
            known = self._known(keys)
        full = np.full(len(keys) - known, self._core.block_size)
        self._ask(chain, keys[known:], first + np.arange(known, len(keys)), full, prefix=True)

    def find_tail(self, chain: KeyChain, keys: list[bytes], token_ids: Sequence[int]) -> None:
        """Every sealed tail that continues the blocks of these keys by tokens of `token_ids`."""
        most = min(self._core.block_size - 1, len(token_ids))
        parent = keys[-1] if keys else None
        counts = np.arange(most, 0, -1)
        tails = [chain.seal(parent, token_ids[:count], len(keys)) for count in counts.tolist()]
        self._ask(chain, tails, np.full(most, len(keys)), counts, prefix=False)

    def find_all(self, chain: KeyChain, keys: list[bytes]) -> None:
        """As `find`, behind gaps too."""
        full = np.full(len(keys), self._core.block_size)
        self._ask(chain, keys, np.arange(len(keys)), full, prefix=False)

    def _known(self, keys: list[bytes]) -> int:
        """How many blocks at the front need no asking: full layer groups have them, windowed ones the last window."""
        known = len(keys)
        for group in self._core.groups:
            if group.layout.window is None:
                has = group.directory.is_valid(group.directory.find(keys[:known]))
                known = known if has.all() else int(np.argmin(has))
        for group in self._core.groups:
            if group.layout.window is not None and not group.layout.is_tail:
                low = max(0, known - num_blocks_of(group.layout.window, self._core.block_size) - 1)
                if not group.directory.is_valid(group.directory.find(keys[low:known])).all():
                    known = low
        return known

    def _ask(self, chain: KeyChain, keys: list[bytes], depth: IntArray, tokens: IntArray, *, prefix: bool) -> None:
        if not keys or not self._tier.takes_writes:
            return
        attachment = self._tier.attachment
        since = [handles.unholds_over for handles in self._tier.handles]
        try:
            found = attachment.lookup(keys, prefix=prefix, hold=True)
        except KvTierError:  # gone, or too busy: then it is a miss
            return
        with self._core.locked():
            if attachment is self._tier.attachment and not attachment.is_lost:
                for group, held in zip(self._core.groups, found, strict=True):
                    index = np.flatnonzero(held & STORED)
                    entries = [keys[i] for i in index.tolist()]
                    self._enter(
                        group, chain.owner, entries, held[index], depth[index], tokens[index], since[group.index]
                    )

    def _enter(
        self,
        group: BlockGroup,
        owner: int,
        keys: list[bytes],
        held: npt.NDArray[np.uint8],
        depth: IntArray,
        tokens: IntArray,
        since: int,
    ) -> None:
        """Blocks that the daemon has: new ones of ours, or copies below of those that we know.

        What it holds for us now is held for a handle, or not for long. `since`: see Handles.note_held."""
        d, table = group.directory, self._tier.handles[group.index]
        known, is_held = d.find(keys), (held & IS_HELD) > 0
        is_here = (known >= 0) & (d.nvme_slot[np.maximum(known, 0)] >= 0)
        table.note_held(d.nvme_slot[known[is_here & is_held]], since)
        index = np.flatnonzero(~is_here)
        self._make_handles_free(group, len(index), known)
        index, left = index[: table.num_free], index[table.num_free :]
        if unkept := [keys[i] for i in left[is_held[left]].tolist()]:
            self._tier.unhold(group.index, b"".join(unkept))
        if not len(index):
            return
        keys, known = [keys[i] for i in index.tolist()], known[index]
        handles = table.allocate(len(index))
        table.stamps["key"][handles] = np.frombuffer(b"".join(keys), "V32")
        table.stamps["tokens"][handles] = tokens[index]
        table.stamps["owner"][handles] = owner
        table.note_held(handles[is_held[index]], since)
        table.is_near[handles] = held[index] & STORED == IN_MEMORY
        new = np.flatnonzero(known < 0)
        blocks = d.create(depth[index[new]], owner)
        d.bind_many(blocks, [keys[i] for i in new.tolist()], tokens[index[new]])
        known[new] = blocks
        d.nvme_slot[known] = handles
        d.nvme_valid[known] = True
        group.note_new(blocks)
        group.policy.entered("nvme", known)

    def _make_handles_free(self, group: BlockGroup, wanted: int, keep: IntArray) -> None:
        """Forget blocks that only the daemon has and nobody here refers to: it does not say what it evicts, so what we know
        of would only ever grow."""
        d, table = group.directory, self._tier.handles[group.index]
        if wanted <= table.num_free or group.cold is None:
            return
        is_idle = d.nvme_valid & (d.refs == 0) & (d.nvme_holds == 0) & (d.page < 0) & (d.host_slot < 0)
        is_idle[keep[keep >= 0]] = False
        blocks = group.unpinned_by_ttl(np.flatnonzero(is_idle))
        more = min(FREED_AT_ONCE, table.limit // 8)  # looking through all of them is not for every question
        victims = group.policy.of("nvme").victims(min(len(blocks), wanted - table.num_free + more), blocks)
        if len(victims):
            group.cold.drop_copies(victims, "pressure")

    # ------------------------------------------------------------------ the heartbeat
    def beat(self) -> None:
        """Under the lock. Submits, waits for nothing."""
        for group in self._core.groups:
            if self._tier.takes_writes:
                self._offer(group)
                self._reconcile(group)
            if self._slabs is not None:
                self._let_go_of_slots(group, self._slabs[group.index])
        if self._tier.takes_writes:
            self.marks.tell()

    def _offer(self, group: BlockGroup) -> None:
        """Named blocks that only we have go to the daemon at once: somebody may be about to compute them."""
        d, pages = group.directory, group.pages
        dirty = pages.block[(pages.state == PageState.DIRTY) & pages.idle()]
        dirty = dirty[d.is_named[dirty]]
        if len(dirty):
            self._core.write_back_blocks(
                group, dirty[np.argsort(d.depth[dirty], kind="stable")], "share", keep_clean=True
            )
        hosted = group.host.block[group.host.state == SlotState.VALID]
        alone = hosted[(d.nvme_slot[hosted] < 0) & d.is_named[hosted]]
        if len(alone):
            self._core.sink_blocks(group, alone, "share")

    def _let_go_of_slots(self, group: BlockGroup, slab: LeasedSlab) -> None:
        """Leases are everybody's memory: none is kept for a block that is resident, or that nobody refers to."""
        d, host = group.directory, group.host
        blocks = host.block[(host.state == SlotState.VALID) & (host.holds == 0)]
        blocks = blocks[d.nvme_valid[blocks] & (d.in_device(blocks) | (d.refs[blocks] == 0))]
        if not self.marks.are_heard:  # else the daemon keeps what is pinned, and leases would only take others' room
            blocks = blocks[d.pinned_until[blocks] <= self._core.clock()]
        if group.awaited and len(blocks):
            blocks = blocks[~np.isin(blocks, np.concatenate(group.awaited)) | d.in_device(blocks)]
        group.leave_host(blocks)
        slab.settle()
        rows = slab.take_releases()
        if not group.moves and not slab.is_asking:
            num_dirty = int((group.pages.state == PageState.DIRTY).sum())
            rows = np.concatenate([rows, slab.take_surplus(num_dirty)])
        if len(rows):
            self._tier.release(group.index, rows)

    def _reconcile(self, group: BlockGroup) -> None:
        """Hold exactly what our sequences and sessions refer to. One exchange at a time per group."""
        if self._is_reconciling[group.index]:
            return
        d, handles = group.directory, self._tier.handles[group.index]
        below = np.flatnonzero(d.nvme_valid)
        if not len(below):
            return
        slots = d.nvme_slot[below]
        wanted = d.refs[below] > 0
        more, less = below[wanted & ~handles.is_surely_held(slots)], slots[~wanted & handles.is_held[slots]]
        if len(less):
            handles.is_held[less] = False
            self._tier.unhold(group.index, handles.keys(less))
        if len(more) and self._core.clock() >= self._hold_again_s[group.index]:
            self._is_reconciling[group.index] = True
            self._hold_later(group, more)

    def _hold_later(self, group: BlockGroup, blocks: IntArray) -> None:
        handles = self._tier.handles[group.index]
        slots = group.directory.nvme_slot[blocks].copy()
        keys, serials = handles.keys(slots), handles.serial[slots]

        def then(attachment: Attachment, flags: npt.NDArray[np.uint8]) -> None:
            try:
                with self._core.lock:
                    if attachment is self._tier.attachment and not attachment.is_lost:
                        self._note_held(group, blocks, slots, serials, keys, flags)
            finally:
                self._is_reconciling[group.index] = False

        self._tier.hold(group.index, keys, then)

    def _note_held(
        self,
        group: BlockGroup,
        blocks: IntArray,
        slots: IntArray,
        serials: IntArray,
        keys: bytes,
        flags: npt.NDArray[np.uint8],
    ) -> None:
        """What is there and over our limit may leave: asked again after a while. What is not there is lost."""
        d, handles = group.directory, self._tier.handles[group.index]
        blocks, slots, serials = blocks[: len(flags)], slots[: len(flags)], serials[: len(flags)]
        same = d.is_live[blocks] & (d.nvme_slot[blocks] == slots) & (handles.serial[slots] == serials)
        handles.note_held(slots[same & (flags == 1)], handles.unholds_begun)  # no UNHOLD of theirs came behind it
        self._undo_holds(
            group, [keys[KEY_BYTES * i : KEY_BYTES * (i + 1)] for i in np.flatnonzero(~same & (flags == 1)).tolist()]
        )
        if (flags == 2).any():
            self._hold_again_s[group.index] = self._core.clock() + HOLD_PAUSE_S
        gone = blocks[same & (flags == 0) & (d.nvme_holds[blocks] == 0)]
        if len(gone) and group.cold is not None:
            group.cold.lose_copies(gone)

    def _undo_holds(self, group: BlockGroup, keys: list[bytes]) -> None:
        """Held for handles that are no more; but some of these blocks may be known again."""
        d, handles = group.directory, self._tier.handles[group.index]
        blocks = d.find(keys)
        is_here = (blocks >= 0) & (d.nvme_slot[np.maximum(blocks, 0)] >= 0)
        handles.note_held(d.nvme_slot[blocks[is_here]], NOWHERE)
        if gone := [keys[i] for i in np.flatnonzero(~is_here).tolist()]:
            self._tier.unhold(group.index, b"".join(gone))

    # ------------------------------------------------------------------ the daemon goes and comes
    def lost(self) -> None:
        """What the daemon had is gone as far as we know. Its memory stays mapped, so leased slots can still be read."""
        with self._core.lock:
            if self._copies is not None:
                self._copies.lost()
            for group in self._core.groups:
                for move in list(group.moves):
                    if move.kind not in ("host_to_device", "device_to_host"):
                        move.event.wait()  # its request has failed already
                group.poll()
                self._forget_below(group)
            self.marks.forget_told()

    def _forget_below(self, group: BlockGroup) -> None:
        d = group.directory
        blocks = np.flatnonzero(d.is_live & (d.nvme_slot >= 0))
        handles = self._tier.handles[group.index]
        handles.is_held[:] = False
        handles.free(d.nvme_slot[blocks])
        d.nvme_slot[blocks] = NOWHERE
        d.nvme_valid[blocks] = False
        group.policy.left("nvme", blocks, evicted=False)
        group.dirty_if_alone(blocks)
        group.forget_lost(blocks, "nvme")
        group.unname_lost(blocks)

    def leave_memory(self, stop: threading.Event) -> bool:
        """Give up every slot of the daemon's memory as soon as no copy touches one. False when told to stop."""
        return self._change(lambda: None, stop)

    def attached(self, attachment: Attachment, stop: threading.Event) -> bool:
        """Change over to another daemon's memory, likewise."""
        orders = self._copies.prepare(attachment) if self._copies is not None else None

        def take() -> None:
            self._tier.attachment = attachment
            if self._copies is not None:
                self._copies.use(orders)
            attach_slabs(self._slabs, attachment, self._core.backend, populate=self._core.config.host_prefault)

        is_taken = self._change(take, stop)
        if orders is not None and not is_taken:
            orders.close()
        return is_taken

    def _change(self, change: Callable[[], None], stop: threading.Event) -> bool:
        while not stop.is_set():
            with self._core.lock:
                if self._is_still():
                    for group in self._core.groups:
                        self._leave_memory(group)
                    change()
                    return True
            stop.wait(_LOOK_S)
        return False

    def _is_still(self) -> bool:
        """Drain the copy streams; whether nobody holds a host slot and nothing moves after that."""
        for stream in (self._core.backend.promote, self._core.backend.demote):
            if not stream.synchronize(5.0):
                return False
        for group in self._core.groups:
            group.poll()
        return not any(
            group.moves or (group.host.holds > 0).any() or group.slab.is_asking for group in self._core.groups
        )

    def _leave_memory(self, group: BlockGroup) -> None:
        """Copies in the old daemon's slots are given up; our own host tier stays."""
        group.epoch += 1  # rule 9
        if self._slabs is None:
            return
        blocks = group.host.block[group.host.state != SlotState.NONE]
        group.leave_host(blocks)
        self._slabs[group.index].leave()
        group.dirty_if_alone(blocks)
        group.forget_lost(blocks, "host")
        group.unname_lost(blocks)

    def find_again(self) -> None:
        """Ask a new daemon for what our sequences refer to."""
        with self._core.lock:
            sequences = list(self._core.sequences.values())
        for seq in sequences:
            self.find_all(seq.chain, list(seq.keys))
            with self._core.locked():
                if seq.id in self._core.sequences:
                    self._rename_lost(seq)

    def _rename_lost(self, seq: TokenSequence) -> None:
        """Where a table names a block that was lost and the same content is here again, name that one."""
        for group, table in zip(self._core.groups, seq.tables, strict=True):
            d, count = group.directory, min(len(table), len(seq.keys))
            ids = table.ids[:count]
            lost = np.flatnonzero((ids >= 0) & ~d.is_valid(ids) & (d.page[np.maximum(ids, 0)] < 0))
            found = d.find([seq.keys[i] for i in lost.tolist()])
            there = d.is_valid(found)
            old, new = ids[lost[there]], found[there]
            table.put(lost[there], new)
            group.ref(new)
            group.unref(old)


def attach_slabs(
    slabs: Sequence[LeasedSlab] | None, attachment: Attachment, backend: Backend, *, populate: bool
) -> None:
    """Let the slabs stand for this attachment's memory, page-locked where the backend can, else mapped page by page."""
    for index, slab in enumerate(slabs or ()):
        if slab.is_pinned:
            backend.unpin(slab.rows)
        slab.is_pinned = backend.pin(attachment.rows[index])
        slab.attach(attachment.rows[index], attachment.generations[index], attachment.epoch)
    if populate and not all(slab.is_pinned for slab in slabs or ()):
        attachment.populate()
