"""One layer group: its directory, its pools, and every copy of its blocks between tiers.

The pager decides, a group moves. A move is one submission for many blocks; nothing becomes valid when it is submitted,
only when `finish` applies its completion. Guards rules 1 to 9 (see rules.py): each stands at one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..tiers.device import DevicePool
from ..tiers.errors import InvariantError, KvTierError
from ..tiers.host import HostSlab
from ..tiers.layout import KVLayout
from ..tiers.streams import Backend, Event
from .accounting import Counters, Ghost, Ghosts
from .directory import Directory
from .policy import LruPolicy
from .rules import Rule, Rules
from .states import NOWHERE, HostSlots, IntArray, Pages, PageState, SlotState

if TYPE_CHECKING:
    from ..tiers.nvme.store import IoTicket, NvmeTier

MoveKind = Literal["host_to_device", "device_to_host", "nvme_to_host", "host_to_nvme"]
MAX_MOVE_BYTES = 32 << 20  # completions come one per move: smaller moves let copies and their followers overlap
MAX_WRITE_ERRORS = 3  # in a row; then the nvme tier takes no more writes and the pager goes on without it


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
    ticket: IoTicket | None = None


class BlockGroup:
    """Blocks of one layer group in device, host and nvme."""

    def __init__(
        self,
        index: int,
        layout: KVLayout,
        backend: Backend,
        *,
        num_pages: int,
        num_host_slots: int,
        nvme: NvmeTier | None,
        policy: LruPolicy,
        counters: Counters,
        ghosts: Ghosts,
        rules: Rules,
        clock: Callable[[], float],
    ) -> None:
        self.index, self.layout, self.backend, self.nvme = index, layout, backend, nvme
        self.pool = DevicePool(layout, num_pages, backend)
        self.slab = HostSlab(layout, num_host_slots, backend)
        self.pages, self.host = Pages(num_pages), HostSlots(num_host_slots)
        self.directory = Directory(self.pages, self.host)
        self.policy, self.counters, self.ghosts, self.rules, self.clock = policy, counters, ghosts, rules, clock
        self.moves: list[Move] = []
        self.epoch = 0
        self.tick = 1
        self._write_errors = 0

    # ------------------------------------------------------------------ references and recency
    def touch(self, blocks: IntArray, distance_tokens: IntArray | None = None) -> None:
        self.tick += 1
        self.policy.on_access(blocks, self.tick, distance_tokens)

    def touch_chain(self, blocks: IntArray, depth: IntArray) -> None:
        """Blocks found again by key: used now, at this depth of their chain."""
        self.tick += 1
        self.directory.depth[blocks] = depth
        self.policy.on_insert(blocks, self.tick, depth)

    def ref(self, blocks: IntArray) -> None:
        np.add.at(self.directory.refs, blocks, 1)

    def unref(self, blocks: IntArray, *, released: bool = False) -> None:
        """Drop one reference of each. Unnamed blocks without a reference go at once, named ones stay as cache."""
        d = self.directory
        np.subtract.at(d.refs, blocks, 1)
        if len(blocks) and int(d.refs[blocks].min()) < 0:
            raise InvariantError(f"group {self.index}: a block has fewer than zero references")
        alone = blocks[d.refs[blocks] == 0]
        if released:
            self.policy.on_release(alone)
        self.discard_dead(alone)

    def discard_dead(self, blocks: IntArray) -> None:
        """Remove blocks that nobody refers to and nothing names; those in flight or pinned follow when they settle."""
        d = self.directory
        dead = np.unique(blocks[d.is_live[blocks] & (d.refs[blocks] == 0) & ~d.is_named[blocks]])
        dead = dead[self._settled(dead)]
        if not len(dead):
            return
        self._leave_device(dead)
        self._leave_host(dead)
        self._leave_nvme(dead)
        d.forget(dead)

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
        return ~copying & ~held & ~((d.nvme_slot[blocks] >= 0) & ~d.nvme_valid[blocks])

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

    def _leave_host(self, blocks: IntArray) -> None:
        hosted = blocks[self.directory.host_slot[blocks] >= 0]
        if len(hosted):
            self.host.drop(self.directory.host_slot[hosted])
            self.directory.host_slot[hosted] = NOWHERE

    def _leave_nvme(self, blocks: IntArray) -> None:
        stored = blocks[self.directory.nvme_slot[blocks] >= 0]
        if len(stored) and self.nvme is not None:
            self.nvme.free(self.index, self.directory.nvme_slot[stored])
            self.directory.nvme_slot[stored] = NOWHERE
            self.directory.nvme_valid[stored] = False

    # ------------------------------------------------------------------ device pages
    def take_pages(self, n: int) -> IntArray | None:
        """n FREE pages, evicting clean blocks where needed; None when fewer could be had (nothing is evicted then)."""
        short = n - self.pages.num_free
        if short > 0:
            victims = self._clean_victims(short)
            if len(victims) < short:
                return None
            self.evict(victims, "pressure")
        return self.pages.take_free(n)

    def clean_pages(self) -> int:
        """Pages that could be freed without any copy."""
        return int(self._evictable().sum())

    def _evictable(self) -> npt.NDArray[np.bool_]:
        if not self.rules.holds(Rule.NO_EVICTION_OF_PINNED_OR_DIRTY):
            return (self.pages.state != PageState.FREE) & (self.pages.state != PageState.FILLING)
        return (self.pages.state == PageState.RESIDENT) & self.pages.idle()  # rule 6

    def _clean_victims(self, n: int) -> IntArray:
        return self.policy.victims(n, self._unpinned_by_ttl(self.pages.block[self._evictable()]))

    def _unpinned_by_ttl(self, blocks: IntArray) -> IntArray:
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
        self._count_eviction("device", blocks, reason)

    def drop_unreferenced_dirty(self, n: int) -> int:
        """Last resort where no tier below has room: forget up to n cached blocks that only the device holds."""
        d = self.directory
        blocks = self.pages.block[(self.pages.state == PageState.DIRTY) & self.pages.idle()]
        blocks = self._unpinned_by_ttl(blocks[d.refs[blocks] == 0])
        victims = self.policy.victims(n, blocks)
        for block in victims.tolist():
            self._remember_ghost(block, "device", "no_room_below")
            d.unbind(block)
        self._count_eviction("device", victims, "no_room_below")
        self.discard_dead(victims)
        return len(victims)

    def adopt_page(self, blocks: IntArray, pages: IntArray) -> None:
        """Give new blocks FREE pages: FREE -> DIRTY, the engine will write there."""
        self.pages.step(pages, PageState.DIRTY)
        self.pages.block[pages] = blocks
        self.directory.page[blocks] = pages
        self.tick += 1
        self.policy.on_insert(blocks, self.tick, self.directory.depth[blocks])

    def mark_written(self, block: int) -> None:
        """The engine is about to append to a private block: whatever lies below is stale from now on."""
        d = self.directory
        d.version[block] += 1
        page = np.array([int(d.page[block])])
        if self.pages.state[page[0]] == PageState.WRITING_BACK:
            return  # finish() compares versions (rule 4)
        slot = int(d.host_slot[block])
        if slot >= 0 and self.host.holds[slot] == 0:
            self._leave_host(np.array([block]))
        if d.nvme_valid[block]:
            self._leave_nvme(np.array([block]))
        if self.pages.state[page[0]] == PageState.RESIDENT:
            self.pages.step(page, PageState.DIRTY)

    # ------------------------------------------------------------------ host slots and nvme slots
    def take_host_slots(self, n: int) -> IntArray | None:
        """n free host slots, dropping copies that exist elsewhere, then unreferenced cache; None when short."""
        short = n - self.host.num_free
        if short > 0:
            victims = self._host_victims(short)
            if len(victims) < short:
                return None
            self._drop_host_copies(victims)
        return self.host.take_free(n)

    def host_room(self) -> int:
        """Host slots that could be taken without any copy."""
        return self.host.num_free + len(self._host_victims(len(self.host)))

    def _host_victims(self, n: int) -> IntArray:
        d = self.directory
        held = self.host.holds > 0
        if not self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            held = np.zeros(len(held), bool)
        blocks = self._unpinned_by_ttl(self.host.block[(self.host.state == SlotState.VALID) & ~held])
        below, above = d.nvme_valid[blocks], d.in_device(blocks) & (d.page[blocks] >= 0)
        busy = above & (self.pages.state[np.maximum(d.page[blocks], 0)] == PageState.WRITING_BACK)
        cache_only = ~below & ~above & (d.refs[blocks] == 0)
        chosen = self.policy.victims(n, blocks[below & ~busy])
        if len(chosen) < n and not self._nvme_takes_more():
            chosen = np.concatenate([chosen, self.policy.victims(n - len(chosen), blocks[cache_only])])
        if len(chosen) < n:
            chosen = np.concatenate([chosen, self.policy.victims(n - len(chosen), blocks[above & ~below & ~busy])])
        return chosen

    def _nvme_takes_more(self) -> bool:
        return self.can_write_nvme and (self.nvme_room() > 0)

    def _drop_host_copies(self, blocks: IntArray) -> None:
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
        self._count_eviction("host", blocks, "pressure")
        self._forget_lost(blocks, "host")

    @property
    def can_write_nvme(self) -> bool:
        return self.nvme is not None and self._write_errors < MAX_WRITE_ERRORS

    def nvme_room(self) -> int:
        if self.nvme is None:
            return 0
        return self.nvme.free_slots(self.index) + len(self._nvme_victims(1 << 30))

    def _nvme_victims(self, n: int) -> IntArray:
        d = self.directory
        blocks = np.flatnonzero(d.nvme_valid & (d.refs == 0) & (d.nvme_holds == 0))
        return self.policy.victims(n, self._unpinned_by_ttl(blocks))

    def _take_nvme_slots(self, n: int) -> IntArray | None:
        assert self.nvme is not None
        short = n - self.nvme.free_slots(self.index)
        if short > 0:
            victims = self._nvme_victims(short)
            if len(victims) < short:
                return None
            self.nvme.free(self.index, self.directory.nvme_slot[victims])
            self.directory.nvme_slot[victims] = NOWHERE
            self.directory.nvme_valid[victims] = False
            self._count_eviction("nvme", victims, "pressure")
            self._dirty_if_alone(victims)
            self._forget_lost(victims, "nvme")
        try:
            return self.nvme.allocate(self.index, n)
        except KvTierError:
            return None

    def _dirty_if_alone(self, blocks: IntArray) -> None:
        d = self.directory
        alone = blocks[d.in_device(blocks) & ~d.in_host(blocks) & ~d.nvme_valid[blocks]]
        pages = d.page[alone]
        self.pages.step(pages[self.pages.state[pages] == PageState.RESIDENT], PageState.DIRTY)

    # ------------------------------------------------------------------ moves: submit
    def promote(self, blocks: IntArray, pages: IntArray, reason: str) -> None:
        """Host -> device for blocks VALID in the host tier, into FREE pages."""
        d, stream = self.directory, self.backend.promote
        slots = d.host_slot[blocks]
        self.pages.step(pages, PageState.FILLING)
        self.pages.block[pages] = blocks
        d.page[blocks] = pages
        self.pages.copies[pages] += 1
        self.host.holds[slots] += 1  # rule 7
        if self.rules.holds(Rule.COPY_IN_WAITS_READERS):
            for event in (
                *self.pages.pending(self.pages.last_read, pages),
                *self.pages.pending(self.pages.last_write, pages),
            ):
                stream.wait(event)  # rule 2
        stream.copy_rows(self.pool.rows, pages, self.slab.rows, slots)
        self._submit("host_to_device", blocks, slots, pages, stream.record(), reason)

    def demote(self, blocks: IntArray, slots: IntArray, reason: str) -> None:
        """Device -> host for DIRTY, idle blocks, into free host slots."""
        d, stream = self.directory, self.backend.demote
        pages = d.page[blocks]
        self.pages.step(pages, PageState.WRITING_BACK)
        self.pages.copies[pages] += 1
        self.host.stage(slots, blocks)
        d.host_slot[blocks] = slots
        if self.rules.holds(Rule.COPY_OUT_WAITS_WRITER):
            for event in self.pages.pending(self.pages.last_write, pages):
                stream.wait(event)  # rule 3
        stream.copy_rows(self.slab.rows, slots, self.pool.rows, pages)
        event = stream.record()
        self.pages.note_event(self.pages.copy_out, pages, event)
        if not self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            self.host.publish(slots)  # a test took rule 7 out: valid before its copy-out event
        self._submit("device_to_host", blocks, pages, slots, event, reason)

    def read_nvme(self, blocks: IntArray, slots: IntArray, reason: str) -> None:
        """Nvme -> host, into free host slots; checked against what the manifest says."""
        assert self.nvme is not None
        d = self.directory
        source = d.nvme_slot[blocks]
        self.host.stage(slots, blocks)
        d.host_slot[blocks] = slots
        d.nvme_holds[blocks] += 1
        ticket = self.nvme.read(self.index, source, self.slab.rows, slots, self.nvme.stamps(self.index, source))
        self._submit("nvme_to_host", blocks, source, slots, ticket.event, reason, ticket)

    def write_nvme(self, blocks: IntArray, reason: str) -> int:
        """Host -> nvme for blocks VALID in the host tier. Returns how many were submitted (0: no room below)."""
        assert self.nvme is not None
        d = self.directory
        targets = self._take_nvme_slots(len(blocks))
        if targets is None:
            return 0
        slots = d.host_slot[blocks]
        self.host.holds[slots] += 1  # rule 7
        d.nvme_slot[blocks] = targets
        d.nvme_holds[blocks] += 1
        stamps, parents = self._stamps_for(blocks)
        ticket = self.nvme.write(self.index, targets, self.slab.rows, slots, stamps, parents)
        self._submit("host_to_nvme", blocks, slots, targets, ticket.event, reason, ticket)
        return len(blocks)

    def _stamps_for(self, blocks: IntArray) -> tuple[npt.NDArray[Any], list[bytes]]:
        from ..tiers.nvme.store import STAMP

        d = self.directory
        stamps = np.zeros(len(blocks), STAMP)
        parents = []
        for i, block in enumerate(blocks.tolist()):
            key = d.key[block]
            stamps[i]["key"] = key if key is not None else _private_key(block, int(d.version[block]))
            stamps[i]["tokens"] = d.tokens[block] if key is not None else 0  # 0: means nothing after a restart
            parents.append(d.parent[block] or b"")
        return stamps, parents

    def _submit(
        self,
        kind: MoveKind,
        blocks: IntArray,
        source: IntArray,
        target: IntArray,
        event: Event,
        reason: str,
        ticket: IoTicket | None = None,
    ) -> None:
        versions = self.directory.version[blocks].copy()
        self.moves.append(Move(kind, blocks, source, target, versions, event, reason, self.epoch, self.clock(), ticket))

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
        apply = {
            "host_to_device": self._finish_promote,
            "device_to_host": self._finish_demote,
            "nvme_to_host": self._finish_read,
            "host_to_nvme": self._finish_write,
        }[move.kind]
        apply(move, failed)
        reason = "error" if failed else move.reason
        nbytes = len(move.blocks) * self.layout.block_bytes
        self.counters.add("moved_bytes", nbytes, direction=move.kind, reason=reason)
        self.counters.add("moved_blocks", len(move.blocks), direction=move.kind, reason=reason)
        self.counters.add("move_seconds", self.clock() - move.started_s, direction=move.kind, reason=reason)
        self.discard_dead(move.blocks[self.directory.refs[move.blocks] == 0])

    def _finish_promote(self, move: Move, failed: bool) -> None:
        self.pages.copies[move.target] -= 1
        self.host.holds[move.source] -= 1
        self.pages.step(move.target, PageState.FREE if failed else PageState.RESIDENT)
        if failed:
            self.directory.page[move.blocks] = NOWHERE  # rule 8: never published
            return
        d = self.directory
        stale = ~(d.in_host(move.blocks) | d.nvme_valid[move.blocks])
        self.pages.step(move.target[stale], PageState.DIRTY)

    def _finish_demote(self, move: Move, failed: bool) -> None:
        d = self.directory
        self.pages.copies[move.source] -= 1
        whole = d.version[move.blocks] == move.versions
        if not self.rules.holds(Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY):
            whole[:] = True
        if failed:
            whole[:] = False
        self.pages.step(move.source[whole], PageState.RESIDENT)
        self.pages.step(move.source[~whole], PageState.DIRTY)  # rule 4
        staged = self.host.state[move.target] == SlotState.STAGING
        self.host.publish(move.target[whole & staged])
        self.host.drop(move.target[~whole])
        d.host_slot[move.blocks[~whole]] = NOWHERE

    def _finish_read(self, move: Move, failed: bool) -> None:
        assert move.ticket is not None and self.nvme is not None
        d = self.directory
        d.nvme_holds[move.blocks] -= 1
        good = move.ticket.ok & (not failed)
        self.host.publish(move.target[good])
        self.host.drop(move.target[~good])
        bad = move.blocks[~good]
        d.host_slot[bad] = NOWHERE
        if len(bad):
            self.lose_nvme_copies(bad)

    def _finish_write(self, move: Move, failed: bool) -> None:
        assert self.nvme is not None
        d = self.directory
        self.host.holds[move.source] -= 1
        d.nvme_holds[move.blocks] -= 1
        current = d.version[move.blocks] == move.versions
        good = np.full(len(move.blocks), not failed) & current
        if move.ticket is not None and not failed:
            good &= move.ticket.ok
        d.nvme_valid[move.blocks[good]] = True
        bad = ~good
        if bad.any():
            self.nvme.free(self.index, move.target[bad])
            d.nvme_slot[move.blocks[bad]] = NOWHERE
        self._write_errors = self._write_errors + 1 if failed else 0
        if failed:
            self.counters.add("nvme_write_errors", 1)
        stale = move.blocks[~current]
        for block in stale[d.in_host(stale)].tolist():
            if self.host.holds[d.host_slot[block]] == 0:
                self._leave_host(np.array([block]))

    def lose_nvme_copies(self, blocks: IntArray) -> None:
        """A checksum, key or generation did not match: the copy is gone, counted, and never served."""
        assert self.nvme is not None
        d = self.directory
        self.counters.add("corrupt_blocks", len(blocks), tier="nvme")
        self.nvme.quarantine(self.index, d.nvme_slot[blocks])
        d.nvme_slot[blocks] = NOWHERE
        d.nvme_valid[blocks] = False
        self._dirty_if_alone(blocks)
        self._unname_lost(blocks)

    def _unname_lost(self, blocks: IntArray) -> None:
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
                self.pages.step(move.target, PageState.FREE)
                d.page[move.blocks] = NOWHERE
            elif move.kind == "device_to_host":
                self.pages.copies[move.source] -= 1
                self.pages.step(move.source, PageState.DIRTY)
                self.host.drop(move.target)
                d.host_slot[move.blocks] = NOWHERE
            elif move.kind == "nvme_to_host":
                d.nvme_holds[move.blocks] -= 1
                self.host.drop(move.target)
                d.host_slot[move.blocks] = NOWHERE
            else:
                self.host.holds[move.source] -= 1
                d.nvme_holds[move.blocks] -= 1
                d.nvme_slot[move.blocks] = NOWHERE
            self.discard_dead(move.blocks[d.refs[move.blocks] == 0])

    # ------------------------------------------------------------------ counting
    def _forget_lost(self, blocks: IntArray, tier: str) -> None:
        """Cached blocks whose last copy left become ghosts."""
        d = self.directory
        for block in blocks[(d.refs[blocks] == 0) & ~d.is_valid(blocks) & (d.page[blocks] < 0)].tolist():
            self._remember_ghost(block, tier, "pressure")
            d.unbind(block)
            self.discard_dead(np.array([block]))

    def _remember_ghost(self, block: int, tier: str, reason: str) -> None:
        key = self.directory.key[block]
        if key is not None:
            self.ghosts.remember(key, Ghost(tier, self.clock(), reason))

    def _count_eviction(self, tier: str, blocks: IntArray, reason: str) -> None:
        self.policy.on_evict(blocks)
        self.counters.add("evicted_blocks", len(blocks), tier=tier, reason=reason)

    def batches(self, blocks: IntArray) -> list[IntArray]:
        """Cut blocks into moves of at most MAX_MOVE_BYTES."""
        per_move = max(1, MAX_MOVE_BYTES // self.layout.block_bytes)
        return [blocks[i : i + per_move] for i in range(0, len(blocks), per_move)]


def _private_key(block: int, version: int) -> bytes:
    """A name for an unnamed block while it is on disk; tokens=0 in its stamp tells that it means nothing later."""
    return b"private" + block.to_bytes(12, "little") + version.to_bytes(13, "little")
