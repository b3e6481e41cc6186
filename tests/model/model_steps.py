"""What happens to a state of the model, action by action, as the real pager does it under its lock.

Legal steps, outcomes of copies and what they wait for come from pager/states.py, rules from pager/rules.py: nothing of
the protocol is written down a second time. Methods are named after what they stand for in pager/group.py, leasing.py
and cold.py. Whether an action may be taken is model_actions.py's business.
"""

from __future__ import annotations

from model_state import (
    ENDED,
    IS_READABLE,
    REFERENCED,
    STREAM_OF,
    TWO_STEPS,
    UNBORN,
    Block,
    Client,
    Content,
    Move,
    Op,
    Reader,
    State,
    Violation,
)

from kvtier.pager.rules import Rule, Rules
from kvtier.pager.states import (
    APPEND,
    APPENDED,
    COPY_IN,
    COPY_OUT,
    PageCopy,
    PageState,
    PageUse,
    SlotState,
    page_may_step,
    slot_may_step,
)


class Draft:
    """One state being changed into its successor."""

    def __init__(self, state: State, rules: Rules) -> None:
        self.rules = rules
        self.pages, self.slots, self.blocks = list(state.pages), list(state.slots), list(state.blocks)
        self.ops, self.moves, self.late = list(state.ops), list(state.moves), list(state.late)
        self.lease, self.reader, self.client, self.ring = state.lease, state.reader, state.client, state.ring
        self.failures, self.abandons = state.failures, state.abandons

    def freeze(self) -> State:
        return State(
            tuple(self.pages),
            tuple(self.slots),
            tuple(self.blocks),
            tuple(self.ops),
            tuple(self.moves),
            tuple(self.late),
            self.lease,
            self.reader,
            self.client,
            self.ring,
            self.failures,
            self.abandons,
        )

    # ------------------------------------------------------------------ single steps, all by the shared tables
    def step_page(self, page: int, to: PageState) -> None:
        p = self.pages[page]
        if not page_may_step(p.state, to, is_idle=not (p.pins or p.copies)):
            raise Violation(f"page {page}: {p.state.name} -> {to.name} with {p.pins} pins, {p.copies} copies in flight")
        self.pages[page] = p._replace(state=to, block=-1 if to == PageState.FREE else p.block)

    def step_slot(self, slot: int, to: SlotState, block: int = -1) -> None:
        s = self.slots[slot]
        if not slot_may_step(s.state, to, is_held=s.holds > 0):
            raise Violation(f"slot {slot}: {s.state.name} -> {to.name} with {s.holds} holds")
        self._set_slot(slot, to, block)

    def _set_slot(self, slot: int, to: SlotState, block: int = -1) -> None:
        owner = {SlotState.NONE: -1, SlotState.STAGING: block, SlotState.VALID: self.slots[slot].block}[to]
        self.slots[slot] = self.slots[slot]._replace(state=to, block=owner)
        if to == SlotState.NONE and self.reader is not None and self.reader.slot == slot:
            self.reader = self.reader._replace(is_changed=True)

    def hold(self, slot: int, by: int) -> None:
        self.slots[slot] = self.slots[slot]._replace(holds=self.slots[slot].holds + by)

    def copying(self, page: int, by: int) -> None:
        self.pages[page] = self.pages[page]._replace(copies=self.pages[page].copies + by)

    def page_of(self, block: int) -> int:
        return next((i for i, p in enumerate(self.pages) if p.block == block and p.state != PageState.FREE), -1)

    def slot_of(self, block: int, state: SlotState | None = None) -> int:
        wanted = (state,) if state is not None else (SlotState.STAGING, SlotState.VALID)
        return next((i for i, s in enumerate(self.slots) if s.block == block and s.state in wanted), -1)

    def is_readable(self, block: int) -> bool:
        page = self.page_of(block)
        return page >= 0 and IS_READABLE[self.pages[page].state]

    def waits(self, use: PageUse, page: int) -> frozenset[int]:
        """Operations that this use of the page has to wait for, unless a test took its rule out."""
        if not self.rules.holds(use.rule):
            return frozenset()
        return frozenset(op for name in use.waits_for if (op := getattr(self.pages[page], name)) >= 0)

    def queue(self, kind: str, page: int, slot: int, block: int, waits: frozenset[int] = frozenset()) -> int:
        used = {op.id for op in self.ops}
        number = next(i for i in range(len(used) + 1) if i not in used)
        self.ops.append(Op(number, kind, page, slot, block, self.blocks[block].version, waits))
        return number

    def last_compute(self) -> int:
        """What an event recorded on the compute stream now waits for."""
        return next((op.id for op in reversed(self.ops) if STREAM_OF[op.kind] == "compute"), -1)

    # ------------------------------------------------------------------ the engine
    def read(self, page: int) -> None:
        self._pin(page, writes=False)
        self.queue("read", page, -1, self.pages[page].block)

    def append(self, page: int) -> None:
        """LeaseFiller._append_in_place and BlockGroup.mark_written."""
        p = self.pages[page]
        waits = self.waits(APPEND, page)
        self.blocks[p.block] = self.blocks[p.block]._replace(version=self.blocks[p.block].version + 1)
        self._pin(page, writes=True)
        self.queue("write", page, -1, p.block, waits)
        if p.state == PageState.WRITING_BACK:
            return
        slot = self.slot_of(p.block)
        if slot >= 0 and self.slots[slot].holds == 0:
            self.step_slot(slot, SlotState.NONE)
        self.blocks[p.block] = self.blocks[p.block]._replace(below=None)
        if APPENDED[p.state] != p.state:
            self.step_page(page, APPENDED[p.state])

    def write_new(self, page: int, block: int) -> None:
        self.step_page(page, PageState.DIRTY)
        self.pages[page] = self.pages[page]._replace(block=block)
        self.blocks[block] = Block(REFERENCED, self.blocks[block].version + 1)
        self._pin(page, writes=True)
        self.queue("write new", page, -1, block)

    def _pin(self, page: int, *, writes: bool) -> None:
        self.pages[page] = self.pages[page]._replace(pins=self.pages[page].pins + 1)
        self.lease = (page, self.pages[page].block, writes)

    def release(self) -> None:
        assert self.lease is not None
        page, block, writes = self.lease
        event, p = self.last_compute(), self.pages[page]
        self.pages[page] = p._replace(pins=p.pins - 1, last_read=event, last_write=event if writes else p.last_write)
        self.lease = None
        self.settle(block)

    def stream(self, slot: int) -> None:
        """A slice goes through the staging row and is computed on; the slot is held until it has arrived."""
        block, (content, reader) = self.slots[slot].block, self.ring
        self.hold(slot, 1)
        keeps = self.rules.holds(Rule.STAGING_RING_HAS_EVENTS) and reader >= 0
        staged = self.queue("stage", -1, slot, block, frozenset({reader} if keeps else ()))
        self.ring = (content, self.queue("ring read", -1, -1, block, frozenset({staged})))

    def end(self, block: int) -> None:
        self.blocks[block] = self.blocks[block]._replace(life=ENDED)
        self.settle(block)

    def settle(self, block: int) -> None:
        """BlockGroup.discard_dead: a block that nobody refers to leaves every tier once nothing of it is in flight."""
        if self.blocks[block].life != ENDED:
            return
        page, slot = self.page_of(block), self.slot_of(block)
        if page >= 0 and (self.pages[page].copies or self.pages[page].pins):
            if self.rules.holds(Rule.COPY_IN_FLIGHT_IS_NOT_FREE) or self.pages[page].pins:
                return
            self.pages[page] = self.pages[page]._replace(state=PageState.FREE, block=-1, copies=0)
            page = -1
        if slot >= 0 and (self.slots[slot].holds or self.slots[slot].state == SlotState.STAGING):
            return
        if any(move.kind == "sink" and move.block == block for move in self.moves):
            return
        if page >= 0:
            if self.pages[page].state == PageState.RESIDENT:
                self.step_page(page, PageState.EVICTING)
            self.step_page(page, PageState.FREE)
        if slot >= 0:
            self.step_slot(slot, SlotState.NONE)
        self.blocks[block] = Block(UNBORN, self.blocks[block].version)

    # ------------------------------------------------------------------ the mover
    def promote(self, block: int, page: int) -> None:
        slot = self.slot_of(block, SlotState.VALID)
        waits = self.waits(COPY_IN, page)
        self.step_page(page, COPY_IN.begins)
        self.pages[page] = self.pages[page]._replace(block=block)
        self.copying(page, 1)
        self.hold(slot, 1)
        self._move("copy in", page, slot, block, waits)

    def demote(self, page: int, slot: int) -> None:
        waits, block = self.waits(COPY_OUT, page), self.pages[page].block
        self.step_page(page, COPY_OUT.begins)
        self.copying(page, 1)
        self.step_slot(slot, SlotState.STAGING, block)
        op = self._move("copy out", page, slot, block, waits)
        self.pages[page] = self.pages[page]._replace(copy_out=op)
        if not self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            self.step_slot(slot, SlotState.VALID)

    def sink(self, slot: int) -> None:
        self.hold(slot, 1)
        self._move("sink", -1, slot, self.slots[slot].block)

    def fetch(self, block: int, slot: int) -> None:
        self.step_slot(slot, SlotState.STAGING, block)
        self._move("fetch", -1, slot, block)

    def _move(self, kind: str, page: int, slot: int, block: int, waits: frozenset[int] = frozenset()) -> int:
        op = self.queue(kind, page, slot, block, waits)
        self.moves.append(Move(kind, page, slot, block, self.blocks[block].version, op))
        return op

    def take_and_finish(self, move: Move) -> None:
        self.moves.remove(move)
        self.finish(move)

    def deliver_late(self, move: Move) -> None:
        """A completion of an epoch that is over (rule 9)."""
        self.late.remove(move)
        if not self.rules.holds(Rule.OLD_EPOCH_CHANGES_NOTHING):
            self.finish(move)

    def finish(self, move: Move) -> None:
        """BlockGroup.finish and ColdSide.finish_*."""
        {"copy in": self._end_in, "copy out": self._end_out, "sink": self._end_sink, "fetch": self._end_fetch}[
            move.kind
        ](move)
        self.settle(move.block)

    def _end_in(self, move: Move) -> None:
        self.copying(move.page, -1)
        self.hold(move.slot, -1)
        self.step_page(move.page, COPY_IN.fails if move.has_failed else COPY_IN.ends)
        if not move.has_failed and not self._has_copy_below(move.block):
            self.step_page(move.page, PageState.DIRTY)

    def _end_out(self, move: Move) -> None:
        self.copying(move.page, -1)
        is_changed = self.blocks[move.block].version != move.version
        is_changed &= self.rules.holds(Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY)
        self.step_page(move.page, outcome(COPY_OUT, is_changed, move.has_failed))
        if is_changed or move.has_failed:
            self.step_slot(move.slot, SlotState.NONE)
        elif self.slots[move.slot].state == SlotState.STAGING:
            self.step_slot(move.slot, SlotState.VALID)

    def _end_sink(self, move: Move) -> None:
        self.hold(move.slot, -1)
        block = self.blocks[move.block]
        if block.version == move.version and not move.has_failed:
            self.blocks[move.block] = block._replace(below=move.result)
        self._drop_stale(move)

    def _drop_stale(self, move: Move) -> None:
        """ColdSide._drop_stale."""
        slot = self.slot_of(move.block, SlotState.VALID)
        if self.blocks[move.block].version != move.version and slot >= 0 and self.slots[slot].holds == 0:
            self.step_slot(slot, SlotState.NONE)

    def _end_fetch(self, move: Move) -> None:
        self.step_slot(move.slot, SlotState.NONE if move.has_failed else SlotState.VALID)

    def _has_copy_below(self, block: int) -> bool:
        return self.slot_of(block, SlotState.VALID) >= 0 or self.blocks[block].below is not None

    def abandon(self) -> None:
        """BlockGroup.abandon, after the streams were drained: the epoch is over."""
        self.abandons -= 1
        moves, self.moves = self.moves, []
        self.late += moves
        if not self.rules.holds(Rule.DROP_HALF_DONE):
            return
        for move in moves:
            if move.kind in ("copy in", "copy out"):
                self.copying(move.page, -1)
            if move.kind == "copy in":
                self.hold(move.slot, -1)
                self.step_page(move.page, COPY_IN.fails)
            elif move.kind == "copy out":
                self.step_page(move.page, COPY_OUT.fails)
                self.step_slot(move.slot, SlotState.NONE)
            elif move.kind == "sink":
                self.hold(move.slot, -1)
                self._drop_stale(move)
            else:
                self.step_slot(move.slot, SlotState.NONE)
            self.settle(move.block)

    # ------------------------------------------------------------------ the evictor
    def evict(self, page: int) -> None:
        block = self.pages[page].block
        if self.rules.holds(Rule.NO_EVICTION_OF_PINNED_OR_DIRTY):
            self.step_page(page, PageState.EVICTING)
            self.step_page(page, PageState.FREE)
        else:
            self.pages[page] = self.pages[page]._replace(state=PageState.FREE, block=-1)
        self.settle(block)

    def drop_host(self, slot: int) -> None:
        block = self.slots[slot].block
        if self.rules.holds(Rule.HOST_SLOT_HELD_WHILE_READ):
            self.step_slot(slot, SlotState.NONE)
        else:
            self._set_slot(slot, SlotState.NONE)
        page = self.page_of(block)
        if page >= 0 and self.pages[page].state == PageState.RESIDENT and self.blocks[block].below is None:
            self.step_page(page, PageState.DIRTY)

    # ------------------------------------------------------------------ queued work
    def run(self, op: Op, *, fails: bool = False) -> None:
        """The next step of the operation at the head of its stream."""
        if fails:
            self.failures -= 1
        elif op.kind in TWO_STEPS and not op.is_begun:
            self._put(op, None)
            self.ops[self.ops.index(op)] = op._replace(is_begun=True)
            return
        elif STREAM_OF[op.kind] == "compute":
            self._compute(op)
        elif op.kind != "sink":
            self._put(op, self._source(op))
        self._done(op, None if fails else self._source(op), fails)

    def _compute(self, op: Op) -> None:
        have = self.ring[0] if op.kind == "ring read" else self.pages[op.page].content
        if op.kind.startswith("write"):
            is_whole = op.kind == "write new" or have == (op.block, op.version - 1)
            self.pages[op.page] = self.pages[op.page]._replace(content=(op.block, op.version) if is_whole else None)
        elif have != (op.block, op.version):
            raise Violation(f"{op.kind} of block {op.block} version {op.version} in page {op.page} meets {have}")

    def _source(self, op: Op) -> Content:
        if op.kind in ("copy in", "stage", "sink"):
            return self.slots[op.slot].content
        return self.pages[op.page].content if op.kind == "copy out" else self.blocks[op.block].below

    def _put(self, op: Op, content: Content) -> None:
        if op.kind == "copy in":
            self.pages[op.page] = self.pages[op.page]._replace(content=content)
        elif op.kind == "stage":
            self.ring = (content, self.ring[1])
        else:
            self.slots[op.slot] = self.slots[op.slot]._replace(content=content)

    def _done(self, op: Op, result: Content, fails: bool) -> None:
        self.ops = [
            other._replace(waits=other.waits - {op.id}) if op.id in other.waits else other
            for other in self.ops
            if other.id != op.id
        ]
        for i, page in enumerate(self.pages):
            stale = {name: -1 for name in ("last_read", "last_write", "copy_out") if getattr(page, name) == op.id}
            if stale:
                self.pages[i] = page._replace(**stale)
        if self.ring[1] == op.id:
            self.ring = (self.ring[0], -1)
        self.moves = [m._replace(op=-1, has_failed=fails, result=result) if m.op == op.id else m for m in self.moves]
        if op.kind == "stage":
            self.hold(op.slot, -1)
            self.settle(op.block)

    # ------------------------------------------------------------------ readers and clients
    def reader_begins(self, slot: int) -> None:
        block = self.slots[slot].block
        self.reader = Reader(slot, block, self.blocks[block].version)

    def reader_reads(self) -> None:
        assert self.reader is not None
        self.reader = self.reader._replace(has_read=True, content=self.slots[self.reader.slot].content)

    def reader_ends(self) -> None:
        reader = self.reader
        assert reader is not None
        is_same = not reader.is_changed or not self.rules.holds(Rule.READER_CHECKS_GENERATION)
        if is_same and reader.content != (reader.block, reader.version):
            raise Violation(f"a reader takes {reader.content} for block {reader.block} version {reader.version}")
        self.reader = None

    def client_begins(self, slot: int) -> None:
        block = self.slots[slot].block
        self.client = Client(slot, block, self.blocks[block].version)
        self.hold(slot, 1)

    def client_copies(self) -> None:
        assert self.client is not None
        have = self.slots[self.client.slot].content
        if have != (self.client.block, self.client.version):
            raise Violation(f"a client's copy of block {self.client.block} meets {have}: its slot was given away")

    def client_disconnects(self) -> None:
        assert self.client is not None
        self.client = self.client._replace(is_connected=False)
        if not self.rules.holds(Rule.PINS_DIE_WITH_THE_PROCESS):
            self.hold(self.client.slot, -1)
            self.settle(self.client.block)

    def client_is_gone(self) -> None:
        client = self.client
        assert client is not None
        self.client = None
        if client.is_connected or self.rules.holds(Rule.PINS_DIE_WITH_THE_PROCESS):
            self.hold(client.slot, -1)
            self.settle(client.block)


def outcome(copy: PageCopy, is_changed: bool, has_failed: bool) -> PageState:
    return copy.fails if has_failed else copy.changed if is_changed else copy.ends
