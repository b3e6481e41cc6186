"""Filling a lease: promote what is needed, make new pages, copy on write, decide what is streamed, pin all of it.

Works in rounds under the lock: look, start copies, let go, wait, look again. Whatever fails, the half-filled lease is
released and the sequence is as it was. Guards the residency rule: a table names only pages that are readable and pinned
(rule 1), and an append waits for a copy-out of its page (rule 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..tiers.errors import Busy, ConfigError, TierFullError
from ..tiers.formats import tail_of
from .core import Core
from .group import BlockGroup
from .lease import GroupLease, Lease, Span
from .lease_in_place import fill_in_place
from .page_table import Sequence, num_blocks_of, seen_blocks
from .prefix import lose
from .rules import Rule
from .selecting import SliceSelection
from .siblings import read_along
from .states import APPEND, IntArray, PageState
from .streaming import SliceStream, StagingRing

# Of a sequence that goes on: the one it copies, and the next; a longer step shrinks to the room there is.
TAIL_BLOCKS = 2
_MAX_ROUND_WAIT_S = 0.05


@dataclass(slots=True)
class _Need:
    """One span in one group: logical blocks it reads, in order, and how many new ones it writes."""

    seq: Sequence
    context: IntArray  # logical indices of blocks that exist
    context_ids: IntArray
    resident: npt.NDArray[np.bool_]  # which of these are readable in the device tier
    writes_tail: bool  # the last context block is partly filled and will be appended to
    num_kept: int  # of the newest whole ones, read in the tail and not here
    num_new: int
    first_new: int


class LeaseFiller:
    """Fills one lease after another; the pager owns it."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def fill(self, lease: Lease, timeout_s: float, allow_streaming: bool) -> None:
        """Raises: TierFullError, BlockMissError, ConfigError, Busy; see Pager.lease."""
        core = self._core
        started_s = core.clock()
        deadline_s = started_s + timeout_s
        with core.locked():
            self._check_spans(lease.spans)
            for span in lease.spans:
                core.sequences[span.seq].num_leases += 1
            lease.holds_sequences = True
            for group in core.groups:
                if (in_place := fill_in_place(core, lease, group, started_s)) is None:
                    break
                lease.groups.append(in_place)
        for group in core.groups[len(lease.groups) :]:
            held = GroupLease(np.empty((0, 0), np.int32), np.empty(0, np.int32), np.empty(0, np.int64))
            lease.groups.append(held)
            self._fill_group(lease, held, group, deadline_s, allow_streaming)
        for group in core.groups:
            group.pressure.step()
        lease.wait_s = core.clock() - started_s
        core.counters.add("lease_wait_seconds", lease.wait_s)

    def bring_up(self, seq: Sequence) -> int:
        """Start copies for what the sequence's next tokens read. Returns blocks that are not readable yet.

        Cost: next to nothing while the last lease was filled in place and no block has left the device tier since.
        """
        missing = 0
        for group in self._core.groups:
            if seq.tables[group.index].known_row(group.pages.num_left) is not None:
                continue
            table = seq.tables[group.index].ids
            context = table[seen_blocks(group.layout, table, seq.num_computed, seq.num_computed)]
            resident = group.directory.in_device(context)
            if not resident.all():
                waiting = context[~resident]
                group.touch(context)
                self._start_promotions(group, waiting)
                missing += len(waiting)
        return missing

    def pages_needed(self, work: list[tuple[Sequence, int]]) -> list[tuple[int, int]]:
        """Per group: pages that these sequences need, resident together, with so many new tokens; and pages they can have."""
        found, size = [], self._core.block_size
        for group in self._core.groups:
            context, new = [np.empty(0, np.int64)], 0
            for seq, num_new in work:
                table = seq.tables[group.index].ids
                context.append(table[seen_blocks(group.layout, table, seq.num_computed, seq.num_computed)])
                num_existing = num_blocks_of(seq.num_computed, size)
                blocks = num_blocks_of(seq.num_computed + num_new, size) - num_existing + (seq.num_computed % size > 0)
                new += min(blocks, TAIL_BLOCKS) if group.layout.is_tail else blocks
            blocks_read = np.unique(np.concatenate(context))
            found.append((len(blocks_read) + new, len(group.pages) - group.leaving.pages_kept_from(blocks_read)))
        return found

    def _check_spans(self, spans: list[Span]) -> None:
        if not spans:
            raise ConfigError("lease: no spans; give at least one Span(seq, start, end)")
        if len({span.seq for span in spans}) != len(spans):
            raise ConfigError("lease: a sequence appears twice; one span per sequence and step")
        for span in spans:
            seq = self._core.idle_sequence(span.seq, "leasing it again")
            if span.start != seq.num_computed:
                raise ConfigError(
                    f"lease: span starts at {span.start}, sequence {span.seq} has {seq.num_computed} computed"
                )
            if not span.start < span.end <= len(seq.token_ids):
                raise ConfigError(
                    f"lease: span [{span.start}, {span.end}) of sequence {span.seq} is empty or passes its "
                    f"{len(seq.token_ids)} known tokens; append the token ids first"
                )

    # ------------------------------------------------------------------ one group
    def _fill_group(
        self, lease: Lease, held: GroupLease, group: BlockGroup, deadline_s: float, allow_streaming: bool
    ) -> None:
        core = self._core
        with core.locked():
            needs = [self._need(group, span, lease.is_write_only) for span in lease.spans]
            context = needs[0].context_ids  # of one sequence: each block once
            if len(needs) > 1:
                context = np.unique(np.concatenate([n.context_ids for n in needs]))
            is_selected = lease.is_selected and self._core.slice_caches[group.index] is not None
            may_stream = is_selected or (len(lease.spans) == 1 and allow_streaming and lease.spans[0].window is None)
            is_ring_taken = self._core.is_streaming and not lease.is_streamed
            streamed = self._choose_streamed(
                group, needs, context, may_stream, is_selected=is_selected, is_ring_taken=is_ring_taken
            )
            resident = np.setdiff1d(context, streamed) if len(streamed) else context
            for need in needs:
                distance = (num_blocks_of(need.seq.num_computed, core.block_size) - 1 - need.context) * core.block_size
                group.touch(need.context_ids, distance)
            if group.index == 0:
                self._count_reads(group, needs)
        self._bring_in(lease, held, group, resident, deadline_s)
        for need in needs:
            self._add_writable(held, group, need, deadline_s)
        if len(streamed) or is_selected:
            self._open_stream(lease, held, group, streamed, deadline_s)
        with core.locked():
            self._write_tables(lease, held, group, streamed)

    def _need(self, group: BlockGroup, span: Span, is_write_only: bool) -> _Need:
        core, seq = self._core, self._core.sequences[span.seq]
        table, size = seq.tables[group.index].ids, core.block_size
        num_existing = num_blocks_of(span.start, size)
        context = _listed(group, table, replace(span, end=span.start), is_write_only)
        ids = table[context]
        resident = group.directory.in_device(ids)
        if not resident.all():
            valid = group.directory.is_valid(ids)
            if not valid.all():
                lose(self._core, seq, int(context[np.flatnonzero(~valid)[-1 if group.layout.is_tail else 0]]), group)
        num_new = num_blocks_of(span.end, size) - num_existing
        kept = self._num_kept(group, seq, span.start) if group.layout.is_packed and not is_write_only else 0
        return _Need(seq, context, ids, resident, span.start % size != 0, kept, num_new, num_existing)

    def _num_kept(self, group: BlockGroup, seq: Sequence, start: int) -> int:
        """Whole blocks before this token that the tail of a packed group holds: they need not be read from its pages."""
        groups = self._core.groups
        tail = tail_of([other.layout for other in groups], group.index)
        first = seen_blocks(groups[tail].layout, seq.tables[tail].ids, start, start + 1)[0]
        return start // self._core.block_size - int(first)

    def _count_reads(self, group: BlockGroup, needs: list[_Need]) -> None:
        """Context that this step reads, in blocks, by the tier that holds it now (of the first layer group)."""
        count = self._core.counters.add
        for need in needs:
            below = need.context_ids[~need.resident]
            count("read_blocks", len(need.context_ids) - len(below), tier="device")
            if len(below):
                num_host = int(group.directory.in_host(below).sum())
                count("read_blocks", num_host, tier="host")
                count("read_blocks", len(below) - num_host, tier="nvme")

    # ------------------------------------------------------------------ what fits
    def _choose_streamed(
        self,
        group: BlockGroup,
        needs: list[_Need],
        context: IntArray,
        may_stream: bool,
        *,
        is_selected: bool,
        is_ring_taken: bool,
    ) -> IntArray:
        """Ids of context blocks that stay below and are streamed, or of which slices are picked: none when everything
        fits; of a selected lease all that are not resident anyway."""
        pages = group.pages
        new = sum(n.num_new + self._copies_tail(group, n) for n in needs)
        if not is_selected and len(context) + new <= len(pages) - np.count_nonzero(pages.pins):
            return context[:0]  # whoever holds the pinned pages
        foreign = int((pages.pins > 0).sum()) - int(
            (pages.pins[np.maximum(group.directory.page[context], 0)] > 0).sum()
        )
        room = len(pages) - max(foreign, 0) - new
        if len(context) <= room and not is_selected:
            return context[:0]
        ring = self._core.rings[group.index]
        keep = sum(n.writes_tail + n.num_kept for n in needs)
        if not may_stream or ring is None or room < keep:
            raise TierFullError(
                f"device tier: {len(context) + new} pages of layer group {group.layout.name!r} are needed at once, "
                f"{max(room + new, 0)} of {len(pages)} can be had; run fewer sequences or a smaller chunk per step, "
                "or raise device_bytes",
                retry_after_s=0.01,
            )
        if is_ring_taken:
            raise TierFullError("device tier: another streamed step holds the staging ring", retry_after_s=0.01)
        whole = [n.context_ids[: len(n.context_ids) - n.writes_tail - n.num_kept] for n in needs]
        full = whole[0] if len(whole) == 1 else np.unique(np.concatenate(whole))
        budget = room - keep
        inside = group.directory.in_device(full)
        chosen = np.concatenate([full[inside], full[~inside][: 0 if is_selected else None]])[:budget]
        return np.setdiff1d(full, chosen)

    def _copies_tail(self, group: BlockGroup, need: _Need) -> int:
        if not need.writes_tail:
            return 0
        block = int(need.context_ids[-1])
        return int(group.directory.key[block] is not None or group.directory.refs[block] > 1)

    # ------------------------------------------------------------------ promotion
    def _bring_in(self, lease: Lease, held: GroupLease, group: BlockGroup, blocks: IntArray, deadline_s: float) -> None:
        """Make all these blocks readable in the device tier and pin them, as they come."""
        with self._core.lock:
            group.awaited.append(blocks)
        try:
            self._await(lease, held, group, blocks, deadline_s)
        finally:
            with self._core.lock:
                group.awaited = [other for other in group.awaited if other is not blocks]

    def _await(self, lease: Lease, held: GroupLease, group: BlockGroup, waiting: IntArray, deadline_s: float) -> None:
        core = self._core
        while True:
            with core.locked():
                ready = group.directory.in_device(waiting)
                if not core.rules.holds(Rule.PUBLISH_AFTER_COPY_IN):
                    ready |= group.directory.page[waiting] >= 0  # a test took rule 1 out
                self._pin(held, group, group.directory.page[waiting[ready]])
                waiting = waiting[~ready]
                if not len(waiting):
                    return
                self._raise_if_lost(lease, group, waiting)
                started = self._start_promotions(group, waiting)
                self._require_progress(group, started, deadline_s, len(waiting))
            core.backend.wait_any(_MAX_ROUND_WAIT_S)

    def _pin(self, held: GroupLease, group: BlockGroup, pages: IntArray) -> None:
        group.pages.pins[pages] += 1
        held.pinned.append(pages)

    def _raise_if_lost(self, lease: Lease, group: BlockGroup, blocks: IntArray) -> None:
        d = group.directory
        gone = blocks[~d.is_valid(blocks) & (d.page[blocks] < 0) & (d.host_slot[blocks] < 0)]
        if not len(gone):
            return
        for span in lease.spans:
            seq = self._core.sequences[span.seq]
            hit = np.flatnonzero(np.isin(seq.tables[group.index].ids, gone))
            if len(hit):
                lose(self._core, seq, int(hit[0]), group)

    def _start_promotions(self, group: BlockGroup, blocks: IntArray) -> int:
        """Start demand copies for blocks that are nowhere on their way yet. Returns how many copies started.

        Reads from nvme leave host slots for the dirty pages that have to go down before the blocks can come up.
        """
        d, core, started = group.directory, self._core, 0
        still = blocks[d.page[blocks] < 0]
        from_host = still[d.in_host(still)]
        from_nvme = still[(d.host_slot[still] < 0) & d.nvme_valid[still]]
        if len(from_host) or len(from_nvme):
            core.make_room(group, len(from_host) + len(from_nvme))
            from_host = from_host[d.in_host(from_host)]  # unless a lease awaits them, room may be made with them
        if len(from_host):
            fit = min(len(from_host), group.pages.num_free + group.leaving.clean_pages())
            for batch in group.batches(from_host[:fit]):
                pages = group.take_pages(len(batch))
                if pages is None:
                    break
                group.promote(batch, pages, "demand")
                started += len(batch)
        if group.cold is not None and len(from_nvme):
            for own in core.quotas.by_owner(group, from_nvme):
                started += self._start_reads(group, own, len(still) - started, is_first=not started)
        return started

    def _start_reads(self, group: BlockGroup, blocks: IntArray, num_waiting: int, *, is_first: bool) -> int:
        """Start reads of these blocks, of one namespace where there are quotas, as far as there are host slots."""
        core, asker, started = self._core, int(group.directory.owner[blocks[0]]), 0
        core.make_host_room(group, group.forms.slots_of(blocks, below=True), asker)
        room, ready = (
            group.leaving.host_room(keep_clean=True, asker=asker),
            group.pages.num_free + group.leaving.clean_pages(),
        )
        must_sink = max(0, num_waiting - ready - int((group.pages.state == PageState.WRITING_BACK).sum()))
        count = max(min(ready, room), room - must_sink, 0)
        fit, _ = group.forms.fitting(blocks, count, below=True)
        is_stuck = not len(fit) and is_first and not core.in_flight()
        if is_stuck:  # one page of two may get dirty again, and a block comes up in the other
            least = group.forms.slots_of(blocks[:1], below=True)
            fit, _ = group.forms.fitting(
                blocks, min(group.leaving.host_room(asker=asker), max(least, ready // 2)), below=True
            )
        assert group.cold is not None
        for batch in group.batches(fit):
            wanted = group.forms.slots_of(batch, below=True)
            slots = group.take_host_slots(wanted, keep_clean=not is_stuck, asker=asker)
            if slots is None:
                break
            read_along(group, batch, slots, asker)
            started += len(batch)
        return started

    def _require_progress(self, group: BlockGroup, started: int, deadline_s: float, waiting: int) -> None:
        core = self._core
        if core.clock() > deadline_s:
            raise Busy(f"lease: still waiting for {waiting} blocks of group {group.layout.name!r}", retry_after_s=0.1)
        if not started and not core.in_flight():
            raise TierFullError(
                f"device tier: no page of layer group {group.layout.name!r} can be freed for {waiting} more blocks: "
                f"{int((group.pages.pins > 0).sum())} of {len(group.pages)} are pinned and the tiers below have no room; "
                "raise host_bytes or nvme_bytes, or release sequences",
                retry_after_s=0.05,
            )

    # ------------------------------------------------------------------ pages to write to
    def _add_writable(self, held: GroupLease, group: BlockGroup, need: _Need, deadline_s: float) -> None:
        core = self._core
        copies = self._copies_tail(group, need)
        count = need.num_new + copies
        while count:
            with core.locked():
                core.make_room(group, count)
                pages = group.take_pages(count)
                if pages is not None:
                    group.pressure.took(count)
                    self._take_new(held, group, need, pages, copies)
                    break
                self._require_progress(group, 0, deadline_s, count)
            core.backend.wait_any(_MAX_ROUND_WAIT_S)
        if need.writes_tail and not copies:
            with core.locked():
                self._append_in_place(held, group, int(need.context_ids[-1]))

    def _take_new(self, held: GroupLease, group: BlockGroup, need: _Need, pages: IntArray, copies: int) -> None:
        d, table = group.directory, need.seq.tables[group.index]
        if copies:
            source = int(need.context_ids[-1])
            block = d.create(np.array([need.first_new - 1]), need.seq.chain.owner)
            group.adopt_page(block, pages[:1])
            group.ref(block)
            rows = group.pool.rows
            self._core.backend.compute.copy_rows(rows, pages[:1], rows, d.page[[source]])
            table.put(need.first_new - 1, int(block[0]))
            need.context_ids = np.concatenate([need.context_ids[:-1], block])
            group.unref(np.array([source]))
            self._core.counters.add("copy_on_write_blocks", 1)
            self._pin(held, group, pages[:1])
            held.written.append(pages[:1])
        if need.num_new:
            new_pages = pages[copies:]
            blocks = d.create(np.arange(need.first_new, need.first_new + need.num_new), need.seq.chain.owner)
            group.adopt_page(blocks, new_pages)
            group.ref(blocks)
            table.extend(blocks)
            held.new_blocks.append((need.seq.id, need.first_new, blocks))
            self._pin(held, group, new_pages)
            held.written.append(new_pages)

    def _append_in_place(self, held: GroupLease, group: BlockGroup, block: int) -> None:
        page = group.directory.page[[block]]
        group.order(self._core.backend.compute, APPEND, page)  # rule 4: an append waits for the copy-out
        group.mark_written(block)
        held.written.append(page)

    # ------------------------------------------------------------------ tables
    def _open_stream(
        self, lease: Lease, held: GroupLease, group: BlockGroup, streamed: IntArray, deadline_s: float
    ) -> None:
        """Once every streamed block has a copy below: hold those copies and open the ring over them."""
        core, d, ring = self._core, group.directory, self._core.rings[group.index]
        assert ring is not None
        seq = core.sequences[lease.spans[0].seq]
        while True:
            with core.locked():
                alone = streamed[~(d.in_host(streamed) | d.nvme_valid[streamed])]
                self._raise_if_lost(lease, group, alone)
                if not len(alone):
                    if lease.is_selected:
                        held.selection = self._select(lease, group, ring, streamed)
                    else:
                        ids = seq.tables[group.index].ids
                        held.stream = SliceStream(group, ring, ids[np.isin(ids, streamed)])
                    lease.is_streamed = core.is_streaming = True
                    return
                pages = d.page[alone]
                dirty = alone[(group.pages.state[pages] == PageState.DIRTY) & group.pages.idle()[pages]]
                core.make_host_room(group, group.forms.slots_of(dirty))
                started = core.write_back_blocks(group, dirty, "pressure")
                self._require_progress(group, started, deadline_s, len(alone))
            core.backend.wait_any(_MAX_ROUND_WAIT_S)

    def _select(self, lease: Lease, group: BlockGroup, ring: StagingRing, below: IntArray) -> SliceSelection:
        core, cache = self._core, self._core.slice_caches[group.index]
        assert cache is not None
        spans = []
        for span in lease.spans:
            spans.append(core.sequences[span.seq].tables[group.index].ids[: span.start // core.block_size].copy())
        return SliceSelection(group, cache, ring, spans, below)

    def _write_tables(self, lease: Lease, held: GroupLease, group: BlockGroup, streamed: IntArray) -> None:
        core, size, d = self._core, self._core.block_size, group.directory
        rows, lens, slots = [], [], []
        for span in lease.spans:
            table = core.sequences[span.seq].tables[group.index].ids
            logical = _listed(group, table, span, lease.is_write_only)
            if len(streamed):
                logical = logical[~np.isin(table[logical], streamed)]
            pages = d.page[table[logical]]
            rows.append(pages)
            held.listed.append(logical)
            lens.append(span.end - (num_blocks_of(span.end, size) - len(pages)) * size)
            position = np.arange(span.start, span.end)
            slots.append(d.page[table[position // size]] * size + position % size)
        width = max(len(pages) for pages in rows)
        held.tables = np.full((len(rows), width), -1, np.int32)
        for i, pages in enumerate(rows):
            held.tables[i, : len(pages)] = pages
        held.kv_lens = np.array(lens, np.int32)
        held.slots = np.concatenate(slots)


def _listed(group: BlockGroup, table: IntArray, span: Span, is_write_only: bool) -> IntArray:
    """Logical blocks that a table lists for a span: all that it reads, or only those that it writes."""
    if is_write_only:
        return np.arange(span.start // group.layout.block_size, num_blocks_of(span.end, group.layout.block_size))
    layout = group.layout
    if span.window is not None and layout.window is None:
        layout = replace(layout, window=span.window, sinks=span.sinks)
    return seen_blocks(layout, table, span.start, span.end)
