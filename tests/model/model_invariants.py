"""What holds in every state of the model, whatever came before."""

from __future__ import annotations

from model_state import IS_READABLE, REFERENCED, State, Violation

from kvtier.pager.states import PageState, SlotState


def check(state: State) -> None:
    """What holds in every state. Raises Violation."""
    _check_pages(state)
    _check_slots(state)
    for number, block in enumerate(state.blocks):
        if block.life == REFERENCED:
            above = any(p.block == number and IS_READABLE[p.state] for p in state.pages)
            hosted = any(s.block == number and s.state == SlotState.VALID for s in state.slots)
            if not (above or hosted or block.below is not None):
                raise Violation(f"block {number} is lost: no tier holds it")
    if not state.ops and not state.moves and state.lease is None:
        _check_bytes(state)


def _check_pages(state: State) -> None:
    for i, page in enumerate(state.pages):
        copies = [move for move in state.moves if move.page == i]
        if page.copies != len(copies):
            raise Violation(f"page {i} counts {page.copies} copies in flight, {len(copies)} are")
        if page.pins != (state.lease is not None and state.lease[0] == i):
            raise Violation(f"page {i} has {page.pins} pins, and {state.lease} is leased")
        if page.state == PageState.FREE and copies:
            raise Violation(f"page {i} is FREE with a copy in flight")
        if page.state in (PageState.FILLING, PageState.WRITING_BACK) and not copies:
            raise Violation(f"page {i} stays {page.state.name} for ever: nothing moves it")
        if page.state == PageState.RESIDENT:
            hosted = any(s.block == page.block and s.state == SlotState.VALID for s in state.slots)
            if not hosted and state.blocks[page.block].below is None:
                raise Violation(f"page {i} is RESIDENT without a copy below")
    held = [page.block for page in state.pages if page.state != PageState.FREE]
    if len(held) != len(set(held)):
        raise Violation(f"a block is in two pages: {held}")


def _check_slots(state: State) -> None:
    holders = [m.slot for m in state.moves if m.kind in ("copy in", "sink")]
    holders += [op.slot for op in state.ops if op.kind == "stage"]
    if state.client is not None:
        holders.append(state.client.slot)
    for i, slot in enumerate(state.slots):
        is_early = state.client is not None and not state.client.is_connected
        if slot.holds != holders.count(i) and not (is_early and slot.holds == holders.count(i) - 1):
            raise Violation(f"slot {i} has {slot.holds} holds, {holders.count(i)} read it")
        if slot.state == SlotState.STAGING and not any(move.slot == i for move in state.moves):
            raise Violation(f"slot {i} stays STAGING for ever: nothing moves it")
        if slot.state == SlotState.VALID and any(op.kind in ("copy out", "fetch") and op.slot == i for op in state.ops):
            raise Violation(f"slot {i} is VALID before its copy has arrived")
    held = [slot.block for slot in state.slots if slot.state != SlotState.NONE]
    if len(held) != len(set(held)):
        raise Violation(f"a block is in two host slots: {held}")


def _check_bytes(state: State) -> None:
    """Nothing is in flight: every copy that counts is of its block's newest version."""
    for where, parts in (("page", state.pages), ("slot", state.slots)):
        for i, part in enumerate(parts):
            is_valid = IS_READABLE[part.state] if where == "page" else part.state == SlotState.VALID
            if is_valid and part.content != (part.block, state.blocks[part.block].version):
                raise Violation(f"{where} {i} holds {part.content} as block {part.block}")
    for number, block in enumerate(state.blocks):
        if block.below is not None and block.below != (number, block.version):
            raise Violation(f"nvme holds {block.below} as block {number} version {block.version}")


def is_quiet(state: State) -> bool:
    """Nothing in flight and nobody waits; from everywhere it must be possible to get to such a state."""
    return not (state.ops or state.moves or state.late or state.lease or state.reader or state.client)
