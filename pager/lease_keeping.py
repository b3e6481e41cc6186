"""The life of a lease after it was filled: slices on demand, what its commit makes true, what its release gives back.

Commit names whole blocks, shares a twin's where another sequence was first, and lets go of what left a window; release
unpins, and takes back what was not committed. Guards rules 2 and 3: every page that a step read or wrote carries that
step's event before its pin goes. A block that is lost meanwhile cuts its sequences before it, and is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..tiers.errors import BlockMissError
from . import hints, kept
from .page_table import dropped_from_window
from .prefix import rewind
from .selecting import Picked, SliceSelection
from .states import NOWHERE, IntArray
from .streaming import CorruptSliceError, SliceStream, Staged

if TYPE_CHECKING:
    from .core import Core
    from .group import BlockGroup
    from .lease import Lease, Span
    from .page_table import BlockTable


class LeaseKeeper:
    """Of one pager; takes its lock."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def stream(self, lease: Lease, group: int, stream: SliceStream, layer: int) -> Iterator[Staged]:
        """See Lease.stream."""
        try:
            yield from stream.layer(layer)
        except CorruptSliceError as error:
            self._lose(lease.spans[0].seq, group, error.blocks)

    def pick(
        self, lease: Lease, group: int, selection: SliceSelection, layer: int, blocks: IntArray
    ) -> Iterator[Picked]:
        """See Lease.pick."""
        try:
            yield from selection.fetch(layer, blocks)
        except CorruptSliceError as error:
            holder = next(s for s, ids in zip(lease.spans, selection.spans) if np.isin(error.blocks, ids).any())
            self._lose(holder.seq, group, error.blocks)

    def commit(self, lease: Lease) -> None:
        """See Lease.commit."""
        core = self._core
        if any([one.copy_failed() for held in lease.groups for one in held.copies]):
            core.counters.add("failed_copies", 1, direction="host_to_device", reason="stream")
            only = lease.spans[0]
            raise BlockMissError(
                f"sequence {only.seq}: a copy into the staging ring failed; release the lease and compute again from "
                f"token {only.start}",
                seq=only.seq,
                num_valid=only.start,
            )
        with core.lock:
            event = core.backend.compute.record()
            for group, held in zip(core.groups, lease.groups, strict=True):
                for pages in held.written:
                    group.pages.note_event(group.pages.last_write, pages, event)
            for span in lease.spans:
                seq = core.sequences[span.seq]
                seq.num_computed = span.end
                self._name_full_blocks(span)
                for group, table in zip(core.groups, seq.tables, strict=True):
                    if group.layout.window is None:
                        continue
                    dead = dropped_from_window(group.layout, table.ids, span.end)
                    if len(dead):
                        blocks = table.ids[dead]
                        table.put(dead, NOWHERE)
                        group.unref(blocks)
                        out_of_all = blocks[group.directory.refs[blocks] == 0]  # of every window: first to leave
                        hints.demote(group, out_of_all)
            num_tokens = sum([span.end - span.start for span in lease.spans])
            core.counters.add("stored_tokens" if lease.is_write_only else "computed_tokens", num_tokens)

    def release(self, lease: Lease, *, committed: bool) -> None:
        """See Lease.release."""
        core = self._core
        for held in lease.groups:
            for one in held.copies:
                one.close()
        with core.lock:
            if lease.is_streamed:
                core.is_streaming = False
            event = core.backend.compute.record() if lease.groups else None
            for group, held in zip(core.groups, lease.groups, strict=False):
                for pages in held.pinned:
                    group.pages.pins[pages] -= 1
                    if event is not None:
                        group.pages.note_event(group.pages.last_read, pages, event)
                if not committed:
                    for pages in held.written:  # a copy on write stays, and kernels may have been queued
                        group.pages.note_event(group.pages.last_write, pages, event)
                    self._undo_new_blocks(group, held.new_blocks)
                for pages in held.pinned:
                    blocks = group.pages.block[pages]
                    alone = blocks[group.directory.refs[blocks] == 0]
                    group.discard_dead(alone[alone >= 0])
            if lease.holds_sequences:
                for span in lease.spans:
                    core.sequences[span.seq].num_leases -= 1
                self._rewind_if_lost(lease, committed)
            core.advance()  # here and not in the background: waking a thread at every step makes it wait for the GIL

    # ------------------------------------------------------------------ inside
    def _lose(self, seq_id: int, group: int, blocks: IntArray) -> None:
        with self._core.lock:
            held = self._core.groups[group]
            bad = blocks[held.directory.nvme_valid[blocks]]
            if held.cold is not None:
                held.cold.lose_copies(bad)
            ids = self._core.sequence(seq_id).tables[group].ids
            first = int(np.flatnonzero(np.isin(ids, blocks))[0])
        raise BlockMissError(
            f"sequence {seq_id}: block {first} could not be read back; release the lease and compute again from token "
            f"{first * self._core.block_size}",
            seq=seq_id,
            num_valid=first * self._core.block_size,
        )

    def _name_full_blocks(self, span: Span) -> None:
        core, size = self._core, self._core.block_size
        seq = core.sequences[span.seq]
        first, end = span.start // size, span.end // size
        if first == end:
            return  # most decode steps: hashing would begin with a copy of all token ids
        seq.chain.extend(seq.keys, seq.token_ids[: end * size])
        for group, table in zip(core.groups, seq.tables, strict=True):
            if group.layout.is_tail:
                continue  # what is whole is packed by now: nobody looks for this copy, and it goes with its sequence's window
            for i in range(first, end):  # one or two per decode step, a chunk's worth per prefill step
                block, parent = int(table.ids[i]), seq.keys[i - 1] if i else None
                if i and table.ids[i - 1] >= 0:
                    group.directory.note_child(int(table.ids[i - 1]), seq.keys[i])
                if block >= 0 and group.directory.key[block] is None:
                    if group.directory.bind(block, seq.keys[i], parent, size):
                        core.ghosts.forget(seq.keys[i])
                        group.policy.named(block, seq.keys[i])
                    else:
                        self._use_twin(group, table, i, seq.keys[i])

    def _use_twin(self, group: BlockGroup, table: BlockTable, index: int, key: bytes) -> None:
        """Another sequence computed the same block first: share that one, ours goes when its pins do."""
        twin = np.array([group.directory.by_key[key]])
        if group.directory.is_valid(twin)[0]:
            own = table.ids[index]
            table.put(index, int(twin[0]))
            group.ref(twin)
            group.unref(np.array([own]))

    def _undo_new_blocks(self, group: BlockGroup, new_blocks: list[tuple[int, int, IntArray]]) -> None:
        for seq_id, first, _ in new_blocks:
            group.unref(self._core.sequences[seq_id].tables[group.index].trim(first))

    def _rewind_if_lost(self, lease: Lease, committed: bool) -> None:
        """After a failed step: a table that names a lost block is cut before it."""
        if committed:
            return
        for span in lease.spans:
            seq = self._core.sequences[span.seq]
            for group, table in zip(self._core.groups, seq.tables, strict=True):
                held = np.flatnonzero(table.ids >= 0)
                lost = held[~group.directory.is_valid(table.ids[held]) & (group.directory.page[table.ids[held]] < 0)]
                if group.layout.is_tail:
                    optional = lost < seq.num_computed // self._core.block_size
                    kept.forget(group, table, int(lost[optional].max(initial=-1)) + 1)
                    lost = lost[~optional]
                if len(lost):
                    had = seq.num_computed
                    rewind(self._core, seq, int(lost[0]) * self._core.block_size)
                    self._core.counters.add("lost_tokens", had - seq.num_computed)
