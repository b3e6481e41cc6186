"""Parking and resuming whole sessions: seal the tail, make every block durable, write the record, let the pages go.
Persisting a sequence is the first half of that, for blocks that are found again by their keys alone.

A park returns only when the store could rebuild the session after a crash (with an nvme tier), or raises and leaves the
sequence as it was. Resuming takes the blocks back by key, so a session survives the loss of any of them: what is
missing is a miss and is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..tiers.errors import Busy, ConfigError, TierFullError, TierUnavailableError, UnknownSessionError
from . import kept
from .core import Core
from .group import BlockGroup
from .page_table import BlockTable, Sequence
from .prefix import adopt, residency, seal_key, take_back
from .records import SessionRecords
from .sessions import MAX_SESSION_ID_BYTES, ParkedSession, SessionEntry, check_session_id
from .states import NOWHERE, IntArray, PageState

TRIES = 3  # of making durable what a disk has refused
MOST_UP = 16  # blocks that are brought up at a time, to be written again


class Parking:
    """Sessions of one pager."""

    def __init__(self, core: Core, *, max_id_bytes: int = MAX_SESSION_ID_BYTES) -> None:
        self._core, self._max_id_bytes = core, max_id_bytes
        self._records = SessionRecords(core, core.nvme) if core.nvme is not None else None

    def recover(self) -> int:
        """Take over what the store remembers: blocks first, then the sessions that refer to them."""
        core = self._core
        if core.nvme is None or self._records is None:
            return 0
        for group, (slots, stamps) in zip(core.groups, core.nvme.recovered(), strict=True):
            named = stamps["tokens"] > 0
            if not named.all():
                core.nvme.free(group.index, slots[~named])  # unnamed tails of a process that is gone
                slots, stamps = slots[named], stamps[named]
            _recover_blocks(group, slots, stamps)
        for entry in self._records.read():
            core.sessions[entry.session_id] = entry
            self._hold(entry)
        return len(core.sessions)

    def park(self, session_id: str, seq: Sequence, extra: dict[str, Any], timeout_s: float) -> None:
        core = self._core
        entry = self._record(session_id, seq, extra, timeout_s)
        with core.locked():
            core.observer.ended(seq)
            self._remember(entry)
            entry.tables = seq.tables
            del core.sequences[seq.id]
            for group, table in zip(core.groups, entry.tables, strict=True):
                self._leave_device(group, table.ids[table.ids >= 0])
            kept.let_go(core, entry.tables, seq.num_computed)
            core.counters.add("parked_sessions", 1)

    def checkpoint(self, session_id: str, seq: Sequence, extra: dict[str, Any], timeout_s: float) -> None:
        entry = self._record(session_id, seq, extra, timeout_s)
        entry.active_seq, seq.session_id = seq.id, session_id
        with self._core.locked():
            self._remember(entry)

    def _record(self, session_id: str, seq: Sequence, extra: dict[str, Any], timeout_s: float) -> SessionEntry:
        """Everything that the session needs is durable when this returns, its record last."""
        core = self._core
        check_session_id(session_id, most=self._max_id_bytes)
        other = core.sessions.get(session_id)
        if other is not None and other.active_seq not in (None, seq.id):
            raise ConfigError(f"session {session_id!r} is active in another sequence; park or release that one")
        with core.locked():
            self._seal_tail(seq)
            kept.name(core, seq)
        what = {f"session {session_id!r}": seq}
        self._write_down(seq, timeout_s, *what)
        entry = SessionEntry(session_id, seq.namespace, list(seq.token_ids), seq.num_computed, extra)
        entry.summary, entry.tail_keys, entry.branch = _summary(seq), self._tail_keys(seq), seq.branch
        if core.nvme is not None and self._records is not None:
            self._records.put(entry)
            if core.nvme.is_ring:  # a daemon has made all of it durable already
                self._make_durable(what, timeout_s)
            entry.is_durable = core.nvme.is_durable
        return entry

    def _remember(self, entry: SessionEntry) -> None:
        previous = self._core.sessions.get(entry.session_id)
        if previous is not None:
            self.let_go(previous)
        self._core.sessions[entry.session_id] = entry

    def resume(self, session_id: str, namespace: str) -> tuple[Sequence, ParkedSession]:
        core = self._core
        with core.locked():
            entry = core.sessions.get(session_id)
            if entry is None or entry.namespace != namespace:
                raise UnknownSessionError(f"session {session_id!r} is unknown in namespace {namespace!r}")
            if entry.active_seq is not None and entry.active_seq in core.sequences:
                raise Busy(f"session {session_id!r} is active already", retry_after_s=0.1)
            if entry.tables is None:
                self._hold(entry)
            seq = core.begin(namespace)
            assert entry.tables is not None
            seq.tables, entry.tables = entry.tables, None
            seq.token_ids = list(entry.token_ids)
            if entry.branch is not None:
                seq.branch_at(*entry.branch)
            seq.chain.extend(seq.keys, seq.token_ids[: entry.num_computed])
            seq.num_computed = min(len(seq.tables[0]) * core.block_size, entry.num_computed)
            seq.session_id = session_id
            entry.active_seq = seq.id
            if seq.num_computed == 0 and entry.num_computed >= core.block_size:
                adopt(core, seq, entry.num_computed)
            kept.find(core, seq)
            seq.resumed = residency(core, seq)
            core.counters.add("resumed_sessions", 1)
            return seq, ParkedSession(session_id, list(seq.token_ids), seq.num_computed, dict(entry.extra))

    def persist(self, seqs: list[Sequence], timeout_s: float) -> None:
        """Make every block that resuming at the end of these sequences needs durable; one commit for all of them."""
        core = self._core
        for seq in seqs:
            self.seal(seq)
            with core.locked():
                self._widen_windows(seq)
        self._make_durable({f"sequence {seq.id}": seq for seq in seqs}, timeout_s, may_wait_for_pins=True)

    def seal(self, seq: Sequence) -> None:
        """Give the partial tail block, if there is one, a key of its own content, so that it can be found."""
        with self._core.locked():
            self._seal_tail(seq)

    def forget(self, session_id: str, *, released: bool = False) -> None:
        core = self._core
        with core.locked():
            entry = core.sessions.pop(session_id, None)
            if entry is None:
                raise UnknownSessionError(f"session {session_id!r} is unknown")
            self.let_go(entry, released=released)
            if self._records is not None and core.nvme is not None and (entry.is_durable or not core.nvme.is_durable):
                self._records.drop(entry)

    # ------------------------------------------------------------------ parking, step by step
    def _seal_tail(self, seq: Sequence) -> None:
        core, size = self._core, self._core.block_size
        full, rest = divmod(seq.num_computed, size)
        if not rest:
            return
        seq.chain.extend(seq.keys, seq.token_ids[: full * size])
        parent, key = seq.keys[full - 1] if full else None, seal_key(self._core, seq, seq.num_computed)
        for group, table in zip(core.groups, seq.tables, strict=True):
            block = int(table.ids[full])
            if group.directory.key[block] is None and not group.directory.bind(block, key, parent, rest):
                twin = group.directory.by_key[key]
                if group.directory.is_valid(np.array([twin]))[0]:
                    group.ref(np.array([twin]))
                    table.put(full, twin)
                    group.unref(np.array([block]))

    def _tail_keys(self, seq: Sequence) -> list[bytes]:
        """The keys of tail blocks that had names already and so could not be sealed: more tokens than ours made them."""
        full, rest = divmod(seq.num_computed, self._core.block_size)
        if not rest:
            return []
        sealed = seal_key(self._core, seq, seq.num_computed)
        keys = [g.directory.key[int(t.ids[full])] for g, t in zip(self._core.groups, seq.tables, strict=True)]
        return [] if all(key == sealed for key in keys) else [key or b"" for key in keys]

    def _widen_windows(self, seq: Sequence) -> None:
        """Take back, by key, the block before each window: then every point in the last block can be resumed at."""
        for group, table in zip(self._core.groups, seq.tables, strict=True):
            held = np.flatnonzero(table.ids >= 0)
            if group.layout.window is None or group.layout.is_tail or not len(held) or held[0] == 0:
                continue
            before = int(held[0]) - 1
            block = group.directory.find(seq.keys[before : before + 1])
            if group.directory.is_valid(block).all():
                table.put(before, int(block[0]))
                group.ref(block)

    def _make_durable(self, seqs: dict[str, Sequence], timeout_s: float, *, may_wait_for_pins: bool = False) -> None:
        """By what people call them. Raises as _write_down, and as make_durable."""
        core = self._core
        if core.nvme is None:
            return

        def write_down() -> list[IntArray]:
            for what, seq in seqs.items():
                self._write_down(seq, timeout_s, what, may_wait_for_pins=may_wait_for_pins)
            with core.lock:
                return [_ids(group, seqs.values()) for group in core.groups]

        self.make_durable(write_down, timeout_s, f"{', '.join(seqs)} under {core.config.nvme_path}")

    def make_durable(self, write_down: Callable[[], list[IntArray]], timeout_s: float, what: str) -> None:
        """`write_down` waits until blocks are on nvme and says which, by group; they are durable when this returns.

        Raises: what that raises; TierUnavailableError when the disk refuses again and again.
        """
        core = self._core
        assert core.nvme is not None
        for _ in range(TRIES):
            held = write_down()
            with core.locked():
                below = [group.directory.nvme_slot[ids] for group, ids in zip(core.groups, held, strict=True)]
            core.nvme.flush(timeout_s, [slots[slots >= 0] for slots in below])
            with core.locked():
                if all(self._is_kept(group, ids) for group, ids in zip(core.groups, held, strict=True)):
                    return  # else another's commit was refused, and with it what we had just written
        raise TierUnavailableError(f"the disk refuses to keep {what}")

    def _write_down(self, seq: Sequence, timeout_s: float, what: str, *, may_wait_for_pins: bool = False) -> None:
        """Wait until every block of the sequence is on nvme (or, without one, at least below the device or in it)."""
        core = self._core
        if core.nvme is None:
            return

        missing = 0

        def is_over() -> bool:
            """All down, or no use in trying: what takes no writes will not take these."""
            nonlocal missing
            missing = 0
            for group, table in zip(core.groups, seq.tables, strict=True):
                missing += self._push_down(group, table.ids[table.ids >= 0])
            return missing == 0 or not all(group.can_write_nvme for group in core.groups)

        if core.wait_until(is_over, timeout_s, may_wait_for_pins=may_wait_for_pins) and not missing:
            return
        if not all(group.can_write_nvme for group in core.groups):
            raise TierUnavailableError(f"nvme tier at {core.config.nvme_path} takes no writes; {what} is not stored")
        why = core.quotas.explain(seq.namespace)
        if why:
            raise TierFullError(f"{what} of {seq.num_computed} tokens is not stored: {why}", retry_after_s=1.0)
        raise TierFullError(
            f"{what} of {seq.num_computed} tokens could not be written to {core.config.nvme_path} within {timeout_s} s: "
            f"{[g.nvme_room() for g in core.groups]} blocks of room left; raise nvme_bytes or forget old sessions",
            retry_after_s=1.0,
        )

    def _push_down(self, group: BlockGroup, blocks: IntArray) -> int:
        """Start what brings these blocks of a table one tier lower; returns how many are not on nvme yet."""
        return self._write_again(group, self._misnamed(group, blocks[-1:])) + self.push_down(group, blocks)

    def push_down(self, group: BlockGroup, blocks: IntArray, reason: str = "park") -> int:
        """Likewise, of any blocks."""
        core, d = self._core, group.directory
        num_lost = self._write_again(group, self._unlisted(group, blocks))
        todo = blocks[~d.nvme_valid[blocks]]
        in_host = todo[d.in_host(todo) & (d.nvme_slot[todo] < 0)]
        core.sink_blocks(group, in_host, reason)
        pages = np.maximum(d.page[todo], 0)
        dirty = todo[(d.page[todo] >= 0) & (group.pages.state[pages] == PageState.DIRTY) & group.pages.idle()[pages]]
        if len(dirty):
            core.make_host_room(group, group.forms.slots_of(dirty), int(d.owner[dirty[0]]))
            core.write_back_blocks(group, dirty, reason)
        return len(todo) + num_lost

    def _is_kept(self, group: BlockGroup, blocks: IntArray) -> bool:
        """Whether the tier below has those that live where they would be found again; what is being moved there is."""
        blocks = blocks[group.directory.is_live[blocks]]
        if not group.directory.nvme_valid[blocks].all():
            return False
        moving = [move.blocks for move in group.relocations()]
        return bool(np.isin(self._unlisted(group, blocks), np.concatenate([blocks[:0], *moving])).all())

    def _misnamed(self, group: BlockGroup, tail: IntArray) -> IntArray:
        """A tail that went down before it was sealed lies there under a name that means nothing after a restart."""
        d, cold = group.directory, group.cold
        if cold is None or not len(tail) or not d.nvme_valid[tail].all() or not d.is_named[tail].all():
            return tail[:0]
        is_right = cold.tier.stamps(group.index, d.nvme_slot[tail])["key"][0].tobytes() == d.key[int(tail[0])]
        return tail[:0] if is_right else tail

    def _unlisted(self, group: BlockGroup, blocks: IntArray) -> IntArray:
        """Those that lie below and would not be found again: a sync of what was written there was refused."""
        d, cold = group.directory, group.cold
        if cold is None:
            return blocks[:0]
        there = blocks[d.nvme_valid[blocks]]
        return there[~cold.tier.is_listed(group.index, d.nvme_slot[there])]

    def _write_again(self, group: BlockGroup, blocks: IntArray) -> int:
        """Copies that must not be relied on go where there is one above. Returns how many have to come up first, of which
        some do."""
        if not len(blocks):
            return 0
        d, cold = group.directory, group.cold
        assert cold is not None
        is_free = d.nvme_holds[blocks] == 0
        is_above = d.in_device(blocks) | d.in_host(blocks)
        again = blocks[is_free & is_above]
        if len(again):
            cold.leave(again)
            group.dirty_if_alone(again)
        for block in blocks[is_free & ~is_above & (d.host_slot[blocks] == NOWHERE)][:MOST_UP]:
            one = np.array([block])
            if not self._core.make_host_room(group, 1):
                break
            slots = group.take_host_slots(group.forms.slots_of(one, below=True))
            if slots is None:
                break
            cold.read(one, slots, "park")
        return len(blocks) - len(again)

    def _leave_device(self, group: BlockGroup, blocks: IntArray) -> None:
        """A parked session gives its pages back, except those that it shares with someone who runs."""
        d = group.directory
        pages = np.maximum(d.page[blocks], 0)
        idle = (d.page[blocks] >= 0) & (group.pages.state[pages] == PageState.RESIDENT) & group.pages.idle()[pages]
        group.evict(blocks[idle & (d.refs[blocks] == 1)], "park")

    # ------------------------------------------------------------------ holding and letting go
    def _hold(self, entry: SessionEntry) -> None:
        """Build the tables of a session from its token ids; a missing block ends what can be used."""
        core = self._core
        probe = core.begin(entry.namespace)
        try:
            probe.token_ids = list(entry.token_ids)
            if entry.branch is not None:
                probe.branch_at(*entry.branch)
            if not take_back(core, probe, entry.num_computed, entry.tail_keys):
                adopt(core, probe, entry.num_computed)
            entry.tables, probe.tables = probe.tables, [BlockTable() for _ in core.groups]
        finally:
            del core.sequences[probe.id]

    def let_go(self, entry: SessionEntry, *, released: bool = False) -> None:
        if entry.tables is not None:
            for group, table in zip(self._core.groups, entry.tables, strict=True):
                group.unref(table.trim(0), released=released)
            entry.tables = None


def _summary(seq: Sequence) -> dict[str, Any]:
    """What the store's table of sessions says of one; blocks by the name of their array."""
    return {
        "namespace": seq.namespace,
        "tokens": len(seq.token_ids),
        "computed_tokens": seq.num_computed,
        "blocks": {f"g{i}": int((table.ids >= 0).sum()) for i, table in enumerate(seq.tables)},
        "stored_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ids(group: BlockGroup, seqs: Iterable[Sequence]) -> IntArray:
    """Blocks of these sequences, each once."""
    ids = np.concatenate([np.empty(0, np.int64), *(seq.tables[group.index].ids for seq in seqs)])
    found: IntArray = np.unique(ids[ids >= 0])
    return found


def _recover_blocks(group: BlockGroup, slots: IntArray, stamps: Any) -> None:
    """Make the directory entries of blocks that the store listed at open."""
    d = group.directory
    blocks = d.create(np.zeros(len(slots), np.int64), stamps["owner"])
    d.nvme_slot[blocks] = slots
    d.nvme_valid[blocks] = True
    group.note_new(blocks)
    twice = d.bind_many(blocks, stamps["key"], stamps["tokens"])
    group.discard_dead(twice)
