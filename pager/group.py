"""One layer group: its directory, its pools, and every copy of its blocks between tiers.

The pager decides, a group moves. A move is one submission for many blocks; nothing becomes valid when it is submitted,
only when `finish` applies its completion. Guards rules 1 to 9 (see rules.py): each stands at one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..tiers.device import DevicePool
from ..tiers.errors import InvariantError, UnpackableError
from ..tiers.layout import KVLayout
from ..tiers.streams import Backend, Event, ForeignCopy, Stream
from . import fetched, hints
from .accounting import Counters, Ghost, Ghosts
from .admission import Admission
from .below import LowerTier, Slab, Ticket
from .cold import ColdSide
from .directory import Directory
from .host_forms import HostForms
from .inspection.events import KIND, OF_MOVE, TIER, EventRing
from .known_runs import KnownRuns
from .leaving import Leaving
from .node_links import NodeLinks
from .policies.base import Policy
from .pressure import Pressure
from .quota import Quotas
from .rules import Rule, Rules
from .states import (
    APPENDED,
    COPY_IN,
    COPY_OUT,
    NOWHERE,
    HostSlots,
    IntArray,
    Pages,
    PageState,
    PageUse,
    SlotState,
)
from .thrift import Thrift
from .working_set import WorkingSet

MoveKind = Literal["host_to_device", "device_to_host", "nvme_to_host", "host_to_nvme", "nvme_to_nvme"]
MAX_MOVE_BYTES = 32 << 20  # completions come one per move: smaller moves let copies and their followers overlap


@dataclass(slots=True, eq=False)
class Move:
    """Blocks on their way from one tier to another."""

    kind: MoveKind
    blocks: IntArray
    source: IntArray
    target: IntArray
    versions: IntArray
    event: Event
    reason: str
    epoch: int
    started_s: float
    nbytes: int
    ticket: Ticket | None = None


class BlockGroup:
    """Blocks of one layer group in device, host and nvme."""

    def __init__(
        self,
        index: int,
        layout: KVLayout,
        backend: Backend,
        slab: Slab,
        *,
        num_pages: int,
        nvme: LowerTier | None,
        quotas: Quotas,
        admission: Admission,
        policy: Policy,
        counters: Counters,
        ghosts: Ghosts,
        events: EventRing,
        rules: Rules,
        clock: Callable[[], float],
        exports_pool: bool = False,
    ) -> None:
        self.index, self.layout, self.backend, self.quotas = index, layout, backend, quotas
        self.pool = DevicePool(layout, num_pages, backend, wants_export=exports_pool)
        # of whole blocks, into pages and out of them; a daemon may drive these
        self.copies_in: Stream = backend.promote
        self.copies_out: Stream = backend.demote
        self.slab = slab
        self.pages, self.host = Pages(num_pages), HostSlots(slab.num_slots)
        self.forms = HostForms(self)
        self.host.on_drop = self.forms.let_go
        self.host.links = self._links(slab)
        self.directory = Directory(self.pages, self.host)
        self.last_pin_s = 0.0  # when the last of all pins for a time ends
        self.runs = KnownRuns(self.directory)
        self.policy, self.counters, self.ghosts, self.rules, self.clock = policy, counters, ghosts, rules, clock
        self.admission = admission
        self.events, self.thrift = events, Thrift()
        self.tight_s = clock()  # when something last had to leave the device or host tier for something else
        self.moves: list[Move] = []
        self.awaited: list[
            IntArray
        ] = []  # what leases wait for: read from nvme on its way up, it makes room for nobody
        self.working = WorkingSet(layout, index)
        self.leaving = Leaving(self)
        self.pressure = Pressure(num_pages)
        self.epoch = 0
        self._finish: dict[MoveKind, Callable[[Move, bool], None]] = {
            "host_to_device": self._finish_promote,
            "device_to_host": self._finish_demote,
        }
        self.cold = ColdSide(self, nvme, quotas) if nvme is not None else None
        if self.cold is not None:
            self._finish["nvme_to_host"] = self.cold.finish_read
            self._finish["host_to_nvme"] = self.cold.finish_write
            self._finish["nvme_to_nvme"] = self.cold.finish_relocate

    def _links(self, slab: Slab) -> NodeLinks | None:
        """Where it is known on which of several nodes each slot lies."""
        if slab.nodes is None:
            return None
        return NodeLinks(slab.nodes, slab.node_rates, self._slots_in_flight)

    def _slots_in_flight(self) -> IntArray:
        """Host slots that copies read or write now."""
        writes = ("device_to_host", "nvme_to_host")
        moves = [move.target if move.kind in writes else move.source for move in self.moves if "host" in move.kind]
        return np.concatenate([np.empty(0, np.int64), *moves])

    # ------------------------------------------------------------------ references and recency
    def touch(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.directory.used_s[blocks] = self.clock()
        hints.used(self.directory, blocks)
        fetched.used(self, blocks)
        self.policy.on_access(blocks, distance_tokens)

    def touch_chain(self, blocks: IntArray, depth: IntArray) -> None:
        """Blocks found again by key: used now, at this depth of their chain."""
        self.directory.depth[blocks] = depth
        self.directory.is_reused[blocks] = True
        self.directory.used_s[blocks] = self.clock()
        hints.used(self.directory, blocks)
        fetched.used(self, blocks)
        self.policy.depth[blocks] = depth
        self.policy.on_hit(blocks)

    def note_new(self, blocks: IntArray) -> None:
        self.policy.grow(len(self.directory.depth))
        d = self.directory
        self.policy.on_insert(blocks, d.depth[blocks])
        for tier, place in (("device", d.page), ("host", d.host_slot), ("nvme", d.nvme_slot)):
            there = blocks[place[blocks] >= 0]
            if len(there):
                self.policy.entered(tier, there)

    def ref(self, blocks: IntArray) -> None:
        np.add.at(self.directory.refs, blocks, 1)

    def unref(self, blocks: IntArray, *, released: bool = False) -> None:
        """Drop one reference of each. Unnamed blocks without a reference go at once, named ones stay as cache."""
        if not len(blocks):
            return
        d = self.directory
        np.subtract.at(d.refs, blocks, 1)
        if int(d.refs[blocks].min()) < 0:
            raise InvariantError(f"group {self.index}: a block has fewer than zero references")
        alone = blocks[d.refs[blocks] == 0]
        if released:
            own = hints.own_end(d, blocks)
            hints.release(self, own[d.refs[own] == 0])
        self.discard_dead(alone)

    def discard_dead(self, blocks: IntArray) -> None:
        """Remove blocks that nobody refers to and nothing names; those in flight or pinned follow when they settle."""
        if not len(blocks):
            return
        d = self.directory
        dead = blocks[d.is_live[blocks] & (d.refs[blocks] == 0) & ~d.is_named[blocks]]
        if not len(dead):
            return
        self._discard(np.unique(dead))

    def _discard(self, dead: IntArray) -> None:
        dead = dead[self._settled(dead)]
        if not len(dead):
            return
        self._leave_device(dead)
        self.leave_host(dead)
        if self.cold is not None:
            self.cold.leave(dead)
        self.directory.forget(dead)
        self.policy.on_forget(dead)

    def _settled(self, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether no copy of these blocks is in flight or pinned."""
        d = self.directory
        pages, slots = np.maximum(d.page[blocks], 0), np.maximum(d.host_slot[blocks], 0)
        paged, hosted = d.page[blocks] >= 0, d.host_slot[blocks] >= 0
        copying = paged & ((self.pages.copies[pages] > 0) | (self.pages.pins[pages] > 0))
        if not self.rules.holds(Rule.COPY_IN_FLIGHT_IS_NOT_FREE):
            self._tear_out(blocks[copying & (self.pages.pins[pages] == 0)])  # a test took rule 5 out
        held = np.zeros(len(blocks), bool)
        if len(self.host):
            held = hosted & ((self.host.holds[slots] > 0) | (self.host.state[slots] == SlotState.STAGING))
        below = (d.nvme_holds[blocks] > 0) | ((d.nvme_slot[blocks] >= 0) & ~d.nvme_valid[blocks])
        return ~copying & ~held & ~below

    def _tear_out(self, blocks: IntArray) -> None:
        pages = self.directory.page[blocks]
        self.pages.state[pages] = PageState.FREE
        self.pages.block[pages] = NOWHERE
        self.pages.copies[pages] = 0
        self.pages.num_free += len(pages)
        self.directory.page[blocks] = NOWHERE

    def _leave_device(self, blocks: IntArray) -> None:
        paged = blocks[self.directory.page[blocks] >= 0]
        pages = self.directory.page[paged]
        self.pages.step(pages[self.pages.state[pages] == PageState.RESIDENT], PageState.EVICTING)
        self.pages.step(pages, PageState.FREE)
        self.directory.page[paged] = NOWHERE

    def leave_host(self, blocks: IntArray) -> None:
        hosted = blocks[self.directory.host_slot[blocks] >= 0]
        if len(hosted):
            self.host.drop(self.directory.host_slot[hosted])
            self.directory.host_slot[hosted] = NOWHERE
            self.policy.left("host", hosted, evicted=False)

    # ------------------------------------------------------------------ device pages
    def take_pages(self, n: int) -> IntArray | None:
        """n FREE pages, evicting clean blocks where needed; None when fewer could be had (nothing is evicted then)."""
        short = n - self.pages.num_free
        if short > 0:
            victims = self.leaving.first_pages(short)
            if len(victims) < short:
                return None
            self.evict(victims, "pressure")
        return self.pages.take_free(n)

    def unpinned_by_ttl(self, blocks: IntArray) -> IntArray:
        return blocks[self.directory.pinned_until[blocks] <= self.clock()]

    def evict(self, blocks: IntArray, reason: str) -> None:
        """Drop the device copies of clean, idle blocks."""
        d = self.directory
        pages = d.page[blocks]
        if self.rules.holds(Rule.NO_EVICTION_OF_PINNED_OR_DIRTY):
            self.pages.step(pages, PageState.EVICTING)
            self.pages.step(pages, PageState.FREE)
        else:  # a test took rule 6 out
            self.pages.state[pages] = PageState.FREE
            self.pages.num_free += len(pages)
        d.page[blocks] = NOWHERE
        self.count_eviction("device", blocks, reason)

    def drop_unreferenced_dirty(self, n: int) -> int:
        """Last resort where no tier below has room: forget up to n cached blocks that only the device holds."""
        d = self.directory
        blocks = self.pages.block[(self.pages.state == PageState.DIRTY) & self.pages.idle()]
        blocks = self.unpinned_by_ttl(blocks[d.refs[blocks] == 0])
        victims = self.policy.of("device").victims(n, blocks)
        self._drop_dirty(victims, "no_room_below")
        return len(victims)

    def drop_given_up(self, n: int) -> int:
        """Forget up to n released blocks that only the device holds: they are not worth a copy. Returns how many."""
        victims = hints.dirty_and_given_up(self)[:n]
        if len(victims):
            self._drop_dirty(victims, "released")
        return len(victims)

    def _drop_dirty(self, victims: IntArray, reason: str) -> None:
        self.note("dropped", "device", victims, reason, self.policy.name)
        self.count_eviction("device", victims, reason)
        for block in victims.tolist():
            self._remember_ghost(block, "device", reason)
            self.directory.unbind(block)
        self.discard_dead(victims)

    def adopt_page(self, blocks: IntArray, pages: IntArray) -> None:
        """Give new blocks FREE pages: FREE -> DIRTY, the engine will write there."""
        self.pages.step(pages, PageState.DIRTY)
        self.pages.block[pages] = blocks
        self.directory.page[blocks] = pages
        self.directory.used_s[blocks] = self.clock()
        self.note_new(blocks)
        self.note("computed", "device", blocks, "")

    def mark_written(self, block: int) -> None:
        """The engine is about to append to a private block: whatever lies below is stale from now on."""
        d = self.directory
        d.version[block] += 1
        page = np.array([int(d.page[block])])
        state = PageState(self.pages.state[page[0]])
        if state == PageState.WRITING_BACK:
            return  # finish() compares versions (rule 4)
        slot = int(d.host_slot[block])
        if slot >= 0 and self.host.holds[slot] == 0:
            self.leave_host(np.array([block]))
        if self.cold is not None and d.nvme_valid[block]:
            self.cold.leave(np.array([block]))
        if APPENDED[state] != state:
            self.pages.step(page, APPENDED[state])

    # ------------------------------------------------------------------ host slots and nvme slots
    def take_host_slots(self, n: int, *, keep_clean: bool = False, asker: int | None = None) -> IntArray | None:
        """n free host slots, dropping copies that exist elsewhere, then unreferenced cache; None when short.

        `keep_clean`: not those that make a page clean which could be evicted; with them gone it would have to go down.
        `asker`: the namespace (owner tag) that they are for; its quota holds, and those of others protect them from it.
        """
        room = self.quotas.room(self, "host", asker)
        if room is not None and not self._drop_victims(n - room, keep_clean, asker, asker):
            return None
        if not self._drop_victims(n - self.host.num_free, keep_clean, asker):
            return None
        return self.host.take_free(n)

    def _drop_victims(self, n: int, keep_clean: bool, asker: int | None, of: int | None = None) -> bool:
        """Drop n host copies; False, and none dropped, where there are fewer that may go."""
        victims = self.leaving.first_host_copies(n, keep_clean, asker, of) if n > 0 else np.empty(0, np.int64)
        victims, freed = self.forms.giving(victims, n)
        if freed < n:
            return False
        if len(victims):
            self.drop_host_copies(victims, "pressure")
        return True

    def drop_host_copies(self, blocks: IntArray, reason: str) -> None:
        """Evict: these copies may go, as `Leaving` finds."""
        d = self.directory
        slots = d.host_slot[blocks]
        if self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            self.host.drop(slots)
        else:  # a test took rule 7 out
            self.host.state[slots] = SlotState.NONE
            self.host.generation[slots] += np.uint64(1)
            self.host.num_free += len(slots)
        d.host_slot[blocks] = NOWHERE
        alone_above = blocks[d.in_device(blocks) & ~d.nvme_valid[blocks]]
        pages = d.page[alone_above]
        self.pages.step(pages[self.pages.state[pages] == PageState.RESIDENT], PageState.DIRTY)
        self.count_eviction("host", blocks, reason)
        self.forget_lost(blocks, "host")

    @property
    def can_write_nvme(self) -> bool:
        return self.cold is not None and self.cold.takes_writes

    @property
    def cold_bytes(self) -> int:
        """Of disk, for one block."""
        return self.cold.block_bytes if self.cold is not None else self.layout.block_bytes

    def tier_bytes(self, tier: str) -> int:
        """Of a whole block in that tier, in the form that it has there."""
        if tier == "host":
            return self.forms.slot_bytes
        return (
            self.cold_bytes
            if tier == "nvme" and self.cold is not None and self.cold.is_lossy
            else self.layout.block_bytes
        )

    def nvme_room(self, asker: int | None = None, reason: str = "") -> int:
        return self.cold.room(asker, reason) if self.cold is not None else 0

    def dirty_if_alone(self, blocks: IntArray) -> None:
        d = self.directory
        alone = blocks[d.in_device(blocks) & ~d.in_host(blocks) & ~d.nvme_valid[blocks]]
        pages = d.page[alone]
        self.pages.step(pages[self.pages.state[pages] == PageState.RESIDENT], PageState.DIRTY)

    # ------------------------------------------------------------------ moves: submit
    def promote(self, blocks: IntArray, pages: IntArray, reason: str) -> None:
        """Host -> device for blocks VALID in the host tier, into FREE pages."""
        d, stream = self.directory, self.copies_in
        slots = d.host_slot[blocks]
        if len(slots) and int(slots.min()) < 0:
            raise InvariantError(f"group {self.index}: a block is promoted from a host slot that it has no more")
        self.pages.step(pages, COPY_IN.begins)
        self.pages.block[pages] = blocks
        d.page[blocks] = pages
        self.pages.copies[pages] += 1
        self.host.holds[slots] += 1  # rule 7
        self.policy.entered("device", blocks)
        self.order(stream, COPY_IN, pages)  # rule 2
        self.forms.get(stream, pages, slots)
        self.submit("host_to_device", blocks, slots, pages, stream.record(), reason)

    def may_demote(self, blocks: IntArray) -> IntArray:
        """Those of these dirty blocks that have no older copy in a host slot, which somebody still reads from."""
        return blocks[self.directory.host_slot[blocks] == NOWHERE]

    def demote(self, blocks: IntArray, slots: IntArray, reason: str) -> None:
        """Device -> host for DIRTY, idle blocks, into free host slots, as many as they take (forms.slots_of)."""
        d, stream = self.directory, self.copies_out
        pages = d.page[blocks]
        self.pages.step(pages, COPY_OUT.begins)
        self.pages.copies[pages] += 1
        slots = self.forms.stage(blocks, slots)
        self.slab.begin_write(slots)
        d.host_slot[blocks] = slots
        self.policy.entered("host", blocks)
        self.order(stream, COPY_OUT, pages)  # rule 3
        self.forms.put(stream, slots, pages)
        event = stream.record()
        read = event.source_over if isinstance(event, ForeignCopy) else event
        self.pages.note_event(self.pages.copy_out, pages, read)
        if not self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            self.host.publish(slots)  # a test took rule 7 out: valid before its copy-out event
        self.submit("device_to_host", blocks, pages, slots, event, reason)

    def order(self, stream: Stream, use: PageUse, pages: IntArray) -> None:
        """Make later work on a stream wait for what this use of these pages has to wait for (rules 2, 3, 4)."""
        if self.rules.holds(use.rule):
            for event in self.pages.awaited(use, pages):
                stream.wait(event)

    def relocations(self) -> list[Move]:
        """Within nvme, under way."""
        return [move for move in self.moves if move.kind == "nvme_to_nvme"]

    def submit(
        self,
        kind: MoveKind,
        blocks: IntArray,
        source: IntArray,
        target: IntArray,
        event: Event,
        reason: str,
        ticket: Ticket | None = None,
    ) -> None:
        versions = self.directory.version[blocks].copy()
        nbytes = self.forms.moved_bytes(kind, blocks, source, target)
        self.moves.append(
            Move(kind, blocks, source, target, versions, event, reason, self.epoch, self.clock(), nbytes, ticket)
        )

    # ------------------------------------------------------------------ moves: completion
    def poll(self) -> int:
        """Apply every finished move. Returns how many."""
        done = [move for move in self.moves if move.event.is_done()]
        if not self.rules.holds(Rule.PUBLISH_AFTER_COPY_IN):
            done += [m for m in self.moves if m.kind == "host_to_device" and m not in done]  # a test took rule 1 out
        if done:
            self.moves = [move for move in self.moves if move not in done]
            for move in done:
                self.finish(move)
        return len(done)

    def finish(self, move: Move) -> None:
        """Apply one completion, unless it belongs to an epoch that is over (rule 9)."""
        if move.epoch != self.epoch and self.rules.holds(Rule.OLD_EPOCH_CHANGES_NOTHING):
            return
        failed = move.event.error is not None
        self._finish[move.kind](move, failed)
        reason = "error" if failed else move.reason
        self.counters.add("moved_bytes", move.nbytes, direction=move.kind, reason=reason)
        self.counters.add("moved_blocks", len(move.blocks), direction=move.kind, reason=reason)
        self.counters.add("move_seconds", self.clock() - move.started_s, direction=move.kind, reason=reason)
        self.counters.add("moves", 1, direction=move.kind, reason=reason)
        kind, tier = OF_MOVE[move.kind]
        self.events.note(
            KIND["failed"] if failed else kind,
            tier,
            self.index,
            self.directory,
            move.blocks,
            move.reason,
            started_s=move.started_s,
            nbytes=move.nbytes,
        )
        self.discard_dead(move.blocks[self.directory.refs[move.blocks] == 0])

    def _finish_promote(self, move: Move, failed: bool) -> None:
        self.pages.copies[move.target] -= 1
        self.host.holds[move.source] -= 1
        d, intact = self.directory, self.slab.intact(move.source)
        if not self.rules.holds(Rule.READER_CHECKS_GENERATION):
            intact[:] = True
        good = intact & (not failed)
        self.pages.step(move.target[good], COPY_IN.ends)
        self.pages.step(move.target[~good], COPY_IN.fails)
        d.page[move.blocks[~good]] = NOWHERE  # rule 8: never published
        self.policy.left("device", move.blocks[~good], evicted=False)
        self.forms.rounded(move.blocks[good], move.source[good])
        self._drop_changed(move.blocks[~intact])
        blocks, pages = move.blocks[good], move.target[good]
        stale = ~(d.in_host(blocks) | d.nvme_valid[blocks])
        self.pages.step(pages[stale], PageState.DIRTY)

    def _drop_changed(self, blocks: IntArray) -> None:
        """Host slots of these blocks hold something else by now (rule 11): read again, or a miss."""
        if not len(blocks):
            return
        self.counters.add("changed_slots", len(blocks))
        slots = self.directory.host_slot[blocks]
        self.leave_host(blocks[(slots >= 0) & (self.host.holds[np.maximum(slots, 0)] == 0)])
        self.forget_lost(blocks, "host")
        self.unname_lost(blocks)

    def _finish_demote(self, move: Move, failed: bool) -> None:
        d = self.directory
        self.pages.copies[move.source] -= 1
        whole = d.version[move.blocks] == move.versions
        if not self.rules.holds(Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY):
            whole[:] = True
        if failed:
            whole[:] = False
        self.pages.step(move.source[whole], COPY_OUT.ends)
        self.pages.step(move.source[~whole], COPY_OUT.fails if failed else COPY_OUT.changed)  # rule 4
        staged = self.host.state[move.target] == SlotState.STAGING
        self.host.publish(move.target[whole & staged])
        self.host.drop(move.target[~whole])
        d.host_slot[move.blocks[~whole]] = NOWHERE
        self.policy.left("host", move.blocks[~whole], evicted=False)
        if isinstance(error := move.event.error, UnpackableError):
            self.forms.keep_whole(move.blocks[np.isin(move.source, error.rows)])

    def unname_lost(self, blocks: IntArray) -> None:
        """A block that no tier holds must not be found by its key: it can be stored again."""
        lost = blocks[~self.directory.is_valid(blocks)]
        for block in lost.tolist():
            if self.directory.page[block] < 0:
                self._remember_ghost(block, "nvme", "corrupt")
                self.directory.unbind(block)

    def abandon(self, drained: bool) -> None:
        """The mover is gone: half-done copies count as never begun (rule 8), late completions as nothing (rule 9)."""
        if not drained:
            raise InvariantError("abandon: copies may still be writing; drain the streams first")
        d = self.directory
        self.epoch += 1
        moves, self.moves = self.moves, []
        if not self.rules.holds(Rule.DROP_HALF_DONE):
            return
        for move in moves:
            if move.kind == "host_to_device":
                self.pages.copies[move.target] -= 1
                self.host.holds[move.source] -= 1
                self.pages.step(move.target, COPY_IN.fails)
                d.page[move.blocks] = NOWHERE
            elif move.kind == "device_to_host":
                self.pages.copies[move.source] -= 1
                self.pages.step(move.source, COPY_OUT.fails)
                self.host.drop(move.target)
                d.host_slot[move.blocks] = NOWHERE
            elif self.cold is not None:
                self.cold.abandon(move)
            self.discard_dead(move.blocks[d.refs[move.blocks] == 0])

    # ------------------------------------------------------------------ counting
    def forget_lost(self, blocks: IntArray, tier: str) -> None:
        """Cached blocks whose last copy left become ghosts."""
        d = self.directory
        lost = blocks[(d.refs[blocks] == 0) & ~d.is_valid(blocks) & (d.page[blocks] < 0)]
        self.note("dropped", tier, lost, "no copy left", self.policy.name)
        if not len(lost):
            return
        ids = list(dict.fromkeys(lost.tolist()))  # once each, in order: their ids are reused in that order
        for block in ids:
            self._remember_ghost(block, tier, "pressure")
            d.unbind(block)
        self._discard(np.array(ids, np.int64))

    def _remember_ghost(self, block: int, tier: str, reason: str) -> None:
        key = self.directory.key[block]
        if key is not None:
            self.policy.gone(block, key)
            self.ghosts.remember(key, Ghost(tier, self.clock(), reason, int(self.directory.owner[block])))

    def count_eviction(self, tier: str, blocks: IntArray, reason: str) -> None:
        self.note("evicted", tier, blocks, reason, self.policy.name)
        fetched.left(self, blocks, tier)
        self.policy.left(tier, blocks)
        if reason == "pressure" and tier != "nvme" and not self.directory.is_released[blocks].all():
            self.tight_s = self.clock()
        self.counters.add("evicted_blocks", len(blocks), tier=tier, reason=reason)

    def note(self, what: str, tier: str, blocks: IntArray, reason: str, policy: str = "") -> None:
        """A decision, for whoever asks later why a block is where it is."""
        self.events.note(KIND[what], TIER[tier], self.index, self.directory, blocks, reason, policy=policy)

    def batches(self, blocks: IntArray) -> list[IntArray]:
        """Cut blocks into moves of at most MAX_MOVE_BYTES."""
        per_move = max(1, MAX_MOVE_BYTES // self.layout.block_bytes)
        return [blocks[i : i + per_move] for i in range(0, len(blocks), per_move)]
