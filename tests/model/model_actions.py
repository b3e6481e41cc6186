"""Which actions may be taken in a state of the model: engine, mover, evictor, readers, clients, queued work.

Actions that the pager chooses (which block to promote, whom to evict, when to poll) are all offered; where it never
chooses (the lowest free page) neither do we.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model_state import (
    IS_READABLE,
    REFERENCED,
    STREAM_OF,
    TWO_STEPS,
    UNBORN,
    Bound,
    Move,
    Op,
    Page,
    Slot,
    State,
    Violation,
)
from model_steps import Draft

from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.states import PageState, SlotState


class PageModel:
    """All that may happen within a bound, under some rules."""

    def __init__(self, bound: Bound, rules: Rules = ALL_RULES) -> None:
        self.bound, self.rules = bound, rules

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for name, arguments in self._actions(state):
            draft = Draft(state, self.rules)
            try:
                getattr(draft, name)(*arguments[0], **arguments[1])
            except Violation as violation:
                raise Violation(f"{_told(name, arguments)}: {violation}") from None
            yield _told(name, arguments), draft.freeze()

    def _actions(self, state: State) -> Iterator[tuple[str, tuple]]:
        for name, *arguments in (
            *self._engine(state),
            *self._mover(state),
            *self._evictor(state),
            *self._others(state),
        ):
            yield name, (tuple(arguments), {})
        for op in self._runnable(state):
            yield "run", ((op,), {})
            if state.failures and op.kind in ("copy in", "copy out", "sink", "fetch") and not op.is_begun:
                yield "run", ((op,), {"fails": True})

    def _engine(self, state: State) -> Iterator[tuple]:
        has_room = len(state.ops) < self.bound.ops
        if state.lease is not None:
            yield ("release",)
        elif has_room:
            for i, page in enumerate(state.pages):
                if IS_READABLE[page.state] and state.blocks[page.block].life == REFERENCED:
                    yield "read", i
                    if state.blocks[page.block].version < self.bound.versions:
                        yield "append", i
            if (free := _first(state.pages, PageState.FREE)) >= 0:
                for block, b in enumerate(state.blocks):
                    if b.life == UNBORN and b.version < self.bound.versions:
                        yield "write_new", free, block
        for block, b in enumerate(state.blocks):
            if b.life == REFERENCED and (state.lease is None or state.lease[1] != block):
                yield "end", block
        if "ring" in self.bound.actors and len(state.ops) + 1 < self.bound.ops:
            for slot, s in enumerate(state.slots):
                if s.state == SlotState.VALID and self._is_full(state, s.block):
                    yield "stream", slot

    def _mover(self, state: State) -> Iterator[tuple]:
        draft = Draft(state, self.rules)
        if len(state.ops) < self.bound.ops:
            free_page, free_slot = _first(state.pages, PageState.FREE), _first(state.slots, SlotState.NONE)
            for block, b in enumerate(state.blocks):
                if b.life == REFERENCED and draft.page_of(block) < 0:
                    if free_page >= 0 and draft.slot_of(block, SlotState.VALID) >= 0:
                        yield "promote", block, free_page
                    elif free_slot >= 0 and b.below is not None and draft.slot_of(block) < 0:
                        yield "fetch", block, free_slot
            for i, page in enumerate(state.pages):
                is_idle = not (page.pins or page.copies)
                # a copy that is still read from is given back first
                if page.state == PageState.DIRTY and is_idle and free_slot >= 0 and draft.slot_of(page.block) < 0:
                    yield "demote", i, free_slot
            if "sink" in self.bound.actors:
                for slot, s in enumerate(state.slots):
                    if (
                        s.state == SlotState.VALID
                        and state.blocks[s.block].below is None
                        and not _sinks(state, s.block)
                    ):
                        yield "sink", slot
        for move in state.moves:
            is_early = move.kind == "copy in" and not self.rules.holds(Rule.PUBLISH_AFTER_COPY_IN)
            if move.op < 0 or is_early:
                yield "take_and_finish", move
        if state.abandons and state.moves and not any(STREAM_OF[op.kind] != "compute" for op in state.ops):
            yield ("abandon",)
        for move in state.late:
            yield "deliver_late", move

    def _evictor(self, state: State) -> Iterator[tuple]:
        holds6, holds7 = (
            self.rules.holds(rule) for rule in (Rule.NO_EVICTION_OF_PINNED_OR_DIRTY, Rule.HOST_SLOT_HELD_WHILE_READ)
        )
        for i, page in enumerate(state.pages):
            is_clean = page.state == PageState.RESIDENT and not (page.pins or page.copies)
            if is_clean or (not holds6 and page.state not in (PageState.FREE, PageState.FILLING)):
                yield "evict", i
        draft = Draft(state, self.rules)
        for i, slot in enumerate(state.slots):
            if slot.state == SlotState.VALID and (slot.holds == 0 or not holds7):
                page = draft.page_of(slot.block)
                is_busy = page >= 0 and state.pages[page].state == PageState.WRITING_BACK
                block = state.blocks[slot.block]
                is_elsewhere = block.below is not None or draft.is_readable(slot.block) or block.life != REFERENCED
                if is_elsewhere and not is_busy:
                    yield "drop_host", i

    def _others(self, state: State) -> Iterator[tuple]:
        if state.reader is not None:
            yield ("reader_reads",) if not state.reader.has_read else ("reader_ends",)
        if state.client is not None:
            yield ("client_copies",)
            yield ("client_is_gone",)
            if state.client.is_connected:
                yield ("client_disconnects",)
        for i, slot in enumerate(state.slots):
            if slot.state == SlotState.VALID and self._is_full(state, slot.block):
                if "reader" in self.bound.actors and state.reader is None:
                    yield "reader_begins", i
                if "client" in self.bound.actors and state.client is None:
                    yield "client_begins", i

    def _is_full(self, state: State, block: int) -> bool:
        """Streams, readers and clients see full blocks alone, and those are never written again."""
        return state.blocks[block].life == REFERENCED and state.blocks[block].version == self.bound.versions

    def _runnable(self, state: State) -> Iterator[Op]:
        heads: set[str] = set()
        for op in state.ops:
            stream = STREAM_OF[op.kind]
            is_head = stream not in heads or stream == "io"  # disk calls run in any order
            heads.add(stream)
            if is_head and not op.waits:
                yield op


def _first(parts: tuple[Page, ...] | tuple[Slot, ...], wanted: PageState | SlotState) -> int:
    return next((i for i, part in enumerate(parts) if part.state == wanted), -1)


def _sinks(state: State, block: int) -> bool:
    return any(move.kind == "sink" and move.block == block for move in state.moves)


def _told(name: str, arguments: tuple) -> str:
    """An action in words, for a trace."""
    values, options = arguments
    shown = [_named(value) for value in values]
    return " ".join([name.replace("_", " "), *shown, *(["and fails"] if options.get("fails") else [])])


def _named(value: Any) -> str:
    if isinstance(value, Op) and value.kind in TWO_STEPS:
        return f"{'the rest' if value.is_begun else 'the first half'} of {value.kind} of block {value.block}"
    return f"{value.kind} of block {value.block}" if isinstance(value, Op | Move) else str(value)
