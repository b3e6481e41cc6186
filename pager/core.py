"""The pager's shared state and its heartbeat: groups, sequences, and `advance`, which applies completions and keeps
every tier between its watermarks.

One lock guards all of it. Nothing here waits for a copy while holding the lock: waiting is `wait_until`, which lets go
between looks. Guards the order of care: a demand copy is submitted before any write-back of the same step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np

from ..tiers.errors import Busy, ConfigError, TierUnavailableError
from ..tiers.host import HostMemory
from ..tiers.layout import KVLayout
from ..tiers.packed_slab import make_slab
from ..tiers.streams import Backend
from . import hints
from .accounting import Counters, Ghosts
from .admission import Admission
from .below import LowerTier, Slab
from .config import PagerConfig, check_namespace
from .costs import Costs
from .group import BlockGroup
from .inspection.observer import Observer
from .integrity import Fact, check_group, facts
from .keys import KeyChain, unsalted
from .page_table import BlockTable, Sequence, num_blocks_of
from .policies.registry import Setting, make_policy_of_tiers
from .quota import Quotas
from .reclaim import Reclaimer
from .remembered import Remembered
from .rules import Rules
from .selecting import SliceCache
from .sessions import SessionEntry
from .sizing import Sizes, summary_bytes
from .states import NOWHERE, IntArray, PageState, SlotState
from .streaming import StagingRing
from .tier_formats import host_formats

_MAX_CHAINS = 4096  # remembered; clients choose salts, and a chain is made again from its name
_LOOK_S = 0.05  # longest wait between two looks at the completions


class Holder(Protocol):
    """Who refers to blocks, or has slots reserved, beside sequences and sessions."""

    def references(self, group: int) -> Iterable[IntArray]:
        """Block ids, once per reference."""

    def reserved(self, group: int) -> IntArray:
        """Host slots that are STAGING without a move of ours."""

    def shares(self) -> Iterable[tuple[str, list[IntArray]]]:
        """Everybody who refers to blocks, by a name for people, and the blocks by layer group."""


class Core:
    """Everything that the parts of the pager share."""

    def __init__(
        self,
        layouts: tuple[KVLayout, ...],
        config: PagerConfig,
        sizes: Sizes,
        backend: Backend,
        nvme: LowerTier | None,
        model_fingerprint: str,
        rules: Rules,
        clock: Callable[[], float],
        slabs: SequenceOf[Slab] | None = None,
        *,
        exports_pools: bool = False,
    ) -> None:
        """`slabs`: the host tier where it is not memory of ours. `exports_pools`: another process shall copy pages."""
        self.layouts, self.config, self.backend, self.nvme = layouts, config, backend, nvme
        self.rules, self.clock = rules, clock
        self.block_size = layouts[0].block_size
        self.model_fingerprint = model_fingerprint
        self.fingerprint = "|".join([model_fingerprint, *(layout.fingerprint for layout in layouts)])
        self.counters, self.ghosts = Counters(), Ghosts()
        self.lock = threading.RLock()
        self.observer = Observer(self.block_size, self.ghosts, clock)
        quotas = self.quotas = Quotas(config.quotas(), clock)
        self.costs = Costs(self.counters, self.block_size)
        admission = Admission(config.nvme_write_size, config.nvme_day_size, clock, self.costs)
        self.memory = HostMemory(backend, numa=config.host_numa, huge_pages=config.host_huge_pages)
        formats = host_formats(config, layouts)
        self.groups = [
            BlockGroup(
                i,
                layout,
                backend,
                slabs[i] if slabs is not None else make_slab(formats[i], sizes.host_slots[i], self.memory, backend),
                num_pages=sizes.pages[i],
                nvme=nvme,
                quotas=quotas,
                admission=admission,
                policy=make_policy_of_tiers(
                    # of a windowed group a step reads no whole chains, and what it does not read is soon dropped
                    "lru" if config.policy == "auto" and layout.window is not None else config.policy,
                    Setting(sizes.pages[i] + sizes.host_slots[i], self.block_size, config.window, config.sinks, clock),
                    {
                        "device": (sizes.pages[i], partial(self.costs.load_cost, i, "device")),
                        "host": (sizes.host_slots[i], partial(self.costs.load_cost, i, "host")),
                        "nvme": (0 if nvme is None else nvme.num_slots(i), partial(self.costs.load_cost, i, "nvme")),
                    },
                ),
                counters=self.counters,
                ghosts=self.ghosts,
                events=self.observer.events,
                rules=rules,
                clock=clock,
                exports_pool=exports_pools,
            )
            for i, layout in enumerate(layouts)
        ]
        quotas.watch(self.groups)
        self.costs.groups = self.groups
        self._reclaimers = [Reclaimer(g.cold) for g in self.groups if g.cold is not None and g.cold.ring is not None]
        self.rings = [
            StagingRing(group, self.memory, sizes.staging_bytes[i], sizes.bounce_bytes[i])
            if sizes.staging_bytes[i]
            else None
            for i, group in enumerate(self.groups)
        ]
        self.slice_caches = [
            SliceCache(group, sizes.slices[i]) if sizes.slices[i] and self.rings[i] is not None else None
            for i, group in enumerate(self.groups)
        ]
        self.summary_rows = [
            backend.alloc_device(sizes.summaries[i], summary_bytes(layout)) for i, layout in enumerate(layouts)
        ]
        self.sequences: dict[int, Sequence] = {}
        self.sessions: dict[str, SessionEntry] = {}
        self.holders: list[Holder] = []
        self.is_streaming = False
        self.is_ending = False  # nobody waits any more
        self.on_advance: Callable[[], None] = lambda: None
        self._next_seq = 1
        self._chains: dict[str, KeyChain] = {}
        self.remembered = Remembered()

    # ------------------------------------------------------------------ sequences
    def chain(self, namespace: str) -> KeyChain:
        if namespace not in self._chains:
            owner = unsalted(check_namespace(namespace))
            if self.nvme is not None and self.nvme.is_encrypted:
                self.config.check_sealable(owner)
            secret = self.config.secret(owner)
            if len(self._chains) >= _MAX_CHAINS:
                self._chains.clear()
            self._chains[namespace] = KeyChain(self.fingerprint, namespace, secret, self.block_size, self.remembered)
        return self._chains[namespace]

    def begin(self, namespace: str) -> Sequence:
        seq = Sequence(self._next_seq, namespace, self.chain(namespace), [BlockTable() for _ in self.groups])
        self._next_seq += 1
        self.sequences[seq.id] = seq
        return seq

    def sequence(self, seq_id: int) -> Sequence:
        try:
            return self.sequences[seq_id]
        except KeyError:
            raise ConfigError(f"sequence {seq_id} is unknown: it was released, parked, or never begun") from None

    def idle_sequence(self, seq_id: int, verb: str) -> Sequence:
        seq = self.sequence(seq_id)
        if seq.num_leases:
            raise Busy(f"sequence {seq_id} is leased: release its lease before {verb}", retry_after_s=0.01)
        return seq

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Cut tables to num_tokens; token ids stay."""
        for group, table in zip(self.groups, seq.tables, strict=True):
            group.unref(table.trim(num_blocks_of(num_tokens, self.block_size)))
        seq.num_computed = min(seq.num_computed, num_tokens)

    def drop_tables(self, seq: Sequence, *, released: bool) -> None:
        for group, table in zip(self.groups, seq.tables, strict=True):
            group.unref(table.trim(0), released=released)
        seq.num_computed = 0

    # ------------------------------------------------------------------ heartbeat
    def advance(self) -> None:
        """Apply what has finished; then keep the watermarks."""
        for group in self.groups:
            group.poll()
        for group in self.groups:
            self._balance_device(group)
            self._balance_host(group)
        for reclaimer in self._reclaimers:
            reclaimer.keep_clean()
        self.on_advance()

    def wait_until(
        self,
        ready: Callable[[], bool],
        timeout_s: float,
        *,
        may_wait_for_pins: bool = False,
        while_ending: bool = False,
    ) -> bool:
        """Advance until ready() or the timeout; lets go of the lock between looks. False on timeout.

        Gives up early when no copy is in flight and no namespace waits for its rate; with `may_wait_for_pins` only once
        nobody holds a page or slot either. Raises TierUnavailableError once the core `is_ending`, but to who ends it.
        """
        deadline_s = self.clock() + timeout_s
        while True:
            with self.lock:
                if self.is_ending and not while_ending:
                    raise TierUnavailableError("shutting down: nothing is waited for any more")
                was_throttled = self.quotas.is_throttled()  # asked first: time alone may end it while ready() looks
                self.advance()
                if ready():
                    return True
                may_change = self.in_flight() or was_throttled
                stuck = not may_change and not (may_wait_for_pins and self._is_anything_held())
            left_s = deadline_s - self.clock()
            if left_s <= 0 or stuck:
                return False
            self.backend.wait_any(min(left_s, _LOOK_S))

    def in_flight(self) -> bool:
        return any(group.moves or group.slab.is_asking for group in self.groups)

    def _is_anything_held(self) -> bool:
        return any((g.pages.pins > 0).any() or (g.host.holds > 0).any() for g in self.groups)

    def _balance_device(self, group: BlockGroup) -> None:
        """Below the low mark of free or clean pages, or below what the next steps will take, write back."""
        total, foreseen = len(group.pages), group.pressure.foreseen()
        low = max(1, int(total * self.config.low_watermark))
        if group.pages.num_free >= max(low, foreseen):
            return
        ready = group.pages.num_free + group.leaving.clean_pages()
        ready += int((group.pages.state == PageState.WRITING_BACK).sum())
        short = max(1, int(total * self.config.high_watermark)) - ready if ready < low else 0
        if foreseen - ready > short:  # a guess: it may cost a copy, not what others have in the host tier
            short = max(short, min(foreseen - ready, group.leaving.idle_host_slots()))
        self.write_back(group, short, "writeback")

    def write_back(self, group: BlockGroup, n: int, reason: str) -> int:
        """Start copies of up to n dirty, idle blocks to the host tier; those given up are dropped. Returns how many of both."""
        if n <= 0 or not len(group.host):
            return 0
        dropped = group.drop_given_up(n)
        dirty = group.may_demote(group.pages.block[(group.pages.state == PageState.DIRTY) & group.pages.idle()])
        victims = group.leaving.first_to_go_down(n - dropped, dirty)
        return dropped + self.write_back_blocks(group, victims, reason, keep_clean=True)

    def write_back_blocks(self, group: BlockGroup, blocks: IntArray, reason: str, *, keep_clean: bool = False) -> int:
        """Demote these dirty, idle blocks as far as host slots can be had now."""
        started = 0
        for own in self.quotas.by_owner(group, group.may_demote(blocks)):
            for batch in group.batches(own):
                asker = int(group.directory.owner[batch[0]])
                room, wanted = group.leaving.host_room(keep_clean=keep_clean, asker=asker), group.forms.slots_of(batch)
                if room < wanted and self.quotas.room(group, "host", asker) is not None:
                    self.make_host_room(group, wanted, asker)  # at its ceiling: its own go down first
                batch, count = group.forms.fitting(batch, group.slab.room_to_write(min(wanted, room)))
                slots = group.take_host_slots(count, keep_clean=keep_clean, asker=asker) if count else None
                if slots is None:
                    break
                group.demote(batch, slots, reason)
                started += len(batch)
        return started

    def _balance_host(self, group: BlockGroup) -> None:
        """Keep a share of host slots free or also on nvme, so that write-back from the device never waits."""
        if not group.can_write_nvme or not len(group.host):
            return
        d, host = group.directory, group.host
        valid = host.state == SlotState.VALID
        blocks = host.block[valid]
        ready = host.num_free + int((d.nvme_valid[blocks] | hints.given_up(group, blocks)).sum())
        underway = int(((d.nvme_slot[blocks] >= 0) & ~d.nvme_valid[blocks]).sum())
        if ready + underway >= max(1, int(len(host) * self.config.low_watermark)):
            return
        self.sink(group, max(1, int(len(host) * self.config.high_watermark)) - ready - underway, "writeback")

    def sink(self, group: BlockGroup, n: int, reason: str, of: int | None = None) -> int:
        """Start writes of up to n host-only blocks (of one namespace) to nvme, coldest first. Returns how many started."""
        d, host = group.directory, group.host
        blocks = host.block[host.state == SlotState.VALID]
        blocks = blocks[(d.nvme_slot[blocks] == NOWHERE) & ~hints.given_up(group, blocks)]
        if of is not None:
            blocks = blocks[d.owner[blocks] == of]
        if group.cold is not None:
            blocks = blocks[group.cold.may_sink(blocks)]
        return self.sink_blocks(group, group.policy.of("host").victims(n, blocks), reason)

    def sink_blocks(self, group: BlockGroup, blocks: IntArray, reason: str) -> int:
        started = 0
        if group.cold is None or not group.cold.takes_writes:
            return 0
        for own in self.quotas.by_owner(group, group.admission.choose(group, blocks, reason)):
            for batch in group.batches(own):
                batch = group.cold.admit(batch[: group.nvme_room(int(group.directory.owner[batch[0]]), reason)])
                if len(batch):
                    started += group.cold.write(batch, reason)
        return started

    def make_room(self, group: BlockGroup, n: int) -> bool:
        """Whether n pages can be taken now; if not, start what will make it so."""
        short = n - group.pages.num_free - group.leaving.clean_pages()
        if short <= 0:
            return True
        short -= int((group.pages.state == PageState.WRITING_BACK).sum())
        if short > 0 and self.write_back(group, short, "pressure") < short:
            self.make_host_room(group, short)
            if not group.moves:
                group.drop_unreferenced_dirty(short)
        return n - group.pages.num_free - group.leaving.clean_pages() <= 0

    def make_host_room(self, group: BlockGroup, n: int, asker: int | None = None) -> bool:
        """Whether n host slots can be taken now for that namespace; if not, start writes to nvme that will make it so.

        Where a block may take several slots, room for one such block is made in any case.
        """
        short = max(n, min(group.forms.most_slots, len(group.host)) if n > 0 else 0) - group.leaving.host_room(
            asker=asker
        )
        if short <= 0:
            return True
        d = group.directory
        room = self.quotas.room(group, "host", asker)
        of = asker if room is not None and room < n else None  # at its ceiling only its own blocks make room
        blocks = group.host.block[group.host.state == SlotState.VALID]
        blocks = blocks if of is None else blocks[d.owner[blocks] == of]
        underway = int(((d.nvme_slot[blocks] >= 0) & ~d.nvme_valid[blocks]).sum())
        if group.can_write_nvme and short > underway:
            self.sink(group, short - underway, "pressure", of)
        return False

    # ------------------------------------------------------------------ integrity
    def check_integrity(self) -> None:
        """Walk everything. Raises InvariantError at the first contradiction. Cost: O(blocks + pages + slots)."""
        with self.lock:
            for index, group in enumerate(self.groups):
                check_group(group, self.references(index), self._reserved(index), self._tables(index))

    def facts(self) -> Iterator[tuple[str, Fact]]:
        """All that is checked there, by layer group, whether it holds or not; the lock is held."""
        for index, group in enumerate(self.groups):
            for fact in facts(group, self.references(index), self._reserved(index), self._tables(index)):
                yield group.layout.name, fact

    def _tables(self, index: int) -> Iterator[BlockTable]:
        return (seq.tables[index] for seq in self.sequences.values())

    def _reserved(self, index: int) -> IntArray:
        return np.concatenate([np.empty(0, np.int64), *(holder.reserved(index) for holder in self.holders)])

    def references(self, index: int) -> Iterator[IntArray]:
        """Block ids of one layer group, once per reference."""
        for seq in self.sequences.values():
            yield seq.tables[index].ids
        for entry in self.sessions.values():
            if entry.tables is not None:
                yield entry.tables[index].ids
        for holder in self.holders:
            yield from holder.references(index)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The lock, with completions applied first."""
        with self.lock:
            for group in self.groups:
                group.poll()
            yield
