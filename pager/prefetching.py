"""Prefetch: bring blocks up before anyone waits for them, and never in the way of somebody who does.

    certain   a request in the queue, or a hint: may take the place of cache that nobody refers to
    likely    a session that foresight expects back: takes free room alone, and what was released; and only within the time
              that there has been such room, for that is how long it can be expected to stay

Wants are served in order, the certain ones first, a few bytes in flight at a time, and not at all while a lease waits for a
copy; so demand queues behind one small batch at most. A request that finds no room is passed by, and asked first when there
is some. A hint or a likely session that finds none is given up, and brings each block up once: foresight names a session again
at its next age, and thrift decides anew. What is taken in by mistake is counted, and the predictor turns itself down
(thrift.py). The pager's lock is held by whoever calls.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from . import fetched, hints
from .core import Core
from .foresight import Foresight, Session
from .group import BlockGroup
from .page_table import Sequence, visible_blocks
from .policies.base import Request
from .states import IntArray, PageState, SlotState
from .thrift import LEAST_CHANCE

IN_FLIGHT_BYTES = 64 << 20  # of prefetches, at once
BATCH_BYTES = 8 << 20  # of one copy: what a demand copy may have to wait for
MAX_WANTS = 1024
MAX_PASSED = 8  # requests without room that others pass in one look: each costs a look-up of its chain
MAX_IDLE = 1 << 14  # sessions waited for
MAX_IDLE_KEYS = 1 << 20  # of their chains, some 80 MiB; who has been idle longest is given up first
_LAST_KEYS = 64  # of a chain, among which the end of an earlier turn is looked for


@dataclass(slots=True)
class _Want:
    """Blocks of a sequence, or of a chain that is known by its keys."""

    seq: Sequence | None
    keys: list[bytes]
    is_certain: bool
    left: float = math.inf  # copies that it may start; without a bound a request waits for them


class Prefetcher:
    """Of one pager."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._wants: dict[Hashable, _Want] = {}
        self.foresight = Foresight(max_idle=MAX_IDLE)
        self._idle: dict[Hashable, _Want] = {}  # of sessions between two turns
        self._idle_keys = 0

    # ------------------------------------------------------------------ what is wanted
    def start(self, seqs: Iterable[Sequence], *, for_anybody: bool = False) -> int:
        """These run soon, in this order, after those named before. Returns how many copies were started now.

        The rest follows as there is room; with `for_anybody` also when the sequences have ended, for it is their prefix
        that is asked for.
        """
        size, named = self._core.block_size, dict[Hashable, _Want]()
        for seq in seqs:
            keys: list[bytes] = []
            if for_anybody or not seq.num_computed:
                count = (seq.num_computed or len(seq.token_ids)) // size
                seq.chain.extend(seq.keys, seq.token_ids[: count * size])
                keys = seq.keys[:count] if for_anybody else seq.keys
            want = _Want(seq, keys, is_certain=True)
            named[seq.id] = self._once(want) if for_anybody else want
        return self._want(named)

    def read(self, group: BlockGroup, blocks: IntArray) -> int:
        """Nvme -> host, for somebody who will ask soon. Returns how many copies were started."""
        return self._read(group, blocks, self._budget(group), is_certain=True)

    def pump(self) -> int:
        """Go on with what is wanted, as far as there is room and nobody waits. Returns how many copies were started."""
        started = passed = 0
        for who, want in sorted(self._wants.items(), key=lambda item: not item[1].is_certain):
            if passed > MAX_PASSED or not any(map(self._budget, self._core.groups)):
                break
            copies, is_over = self._serve(who, want)
            started += copies
            passed += not (copies or is_over)
            if is_over:
                del self._wants[who]
        return started

    def tick(self) -> None:
        """Ask foresight who is due, and go on."""
        now_s = self._core.clock()
        if self._core.config.prefetch and self.foresight.next_s() <= now_s:
            thrift = self._core.groups[0].thrift
            stay_s = now_s - max(group.tight_s for group in self._core.groups)
            for who, chance in self.foresight.due(now_s, stay_s, LEAST_CHANCE):
                if who in self._idle and thrift.may_start(chance):
                    self._want({who: self._once(self._idle[who])})
        if self._wants:
            self.pump()

    def _want(self, named: dict[Hashable, _Want]) -> int:
        """Behind those that are wanted already."""
        for who, want in named.items():
            self._wants.pop(who, None)
            if len(self._wants) < MAX_WANTS:
                self._wants[who] = want
        return self.pump()

    def _once(self, want: _Want) -> _Want:
        """The same, with as many copies left as bring each of its blocks up from where it is now."""
        left = 0
        for group in self._core.groups:
            blocks, d = self._blocks(group, want), group.directory
            below = blocks[~d.in_device(blocks)]
            left += len(below) + int((~d.in_host(below)).sum())
        return replace(want, left=left)

    # ------------------------------------------------------------------ turns of sessions
    def ended(self, who: Hashable, seq: Sequence, *, is_open: bool = False) -> None:
        """A turn of this session is over; with `is_open` its sequence stays."""
        size = self._core.block_size
        count = seq.num_computed // size
        seq.chain.extend(seq.keys, seq.token_ids[: count * size])
        self._drop_idle(who)
        self._idle[who] = _Want(seq if is_open else None, seq.keys[:count], is_certain=False)
        self._idle_keys += len(self._idle[who].keys)
        request = Request(self._core.clock(), len(seq.token_ids), 0)
        self.foresight.ended(who, request.now_s, seq.foreseen, request)
        seq.foreseen = None
        while len(self._idle) > MAX_IDLE or self._idle_keys > MAX_IDLE_KEYS:
            self.forget(next(iter(self._idle)))

    def ended_chain(self, seq: Sequence) -> None:
        """A sequence ends that may be continued by whoever sends its tokens again."""
        size = self._core.block_size
        count = seq.num_computed // size
        if count:
            seq.chain.extend(seq.keys, seq.token_ids[: count * size])
            self.ended(seq.keys[count - 1], seq)

    def began(self, who: Hashable, seq: Sequence) -> None:
        """The next turn of a session begins in this sequence."""
        self._drop_idle(who)
        self._wants.pop(who, None)
        session: Session | None = self.foresight.began(who, self._core.clock())
        if session is not None:
            seq.foreseen = session

    def began_chain(self, seq: Sequence) -> None:
        """A sequence has taken over a cached prefix: perhaps the end of an earlier turn."""
        count = seq.num_computed // self._core.block_size
        for key in reversed(seq.keys[max(0, count - _LAST_KEYS) : count]):
            if key in self._idle:
                self.began(key, seq)
                return

    def forget(self, who: Hashable) -> None:
        self._drop_idle(who)
        self._wants.pop(who, None)
        self.foresight.forget(who)

    def _drop_idle(self, who: Hashable) -> None:
        want = self._idle.pop(who, None)
        if want is not None:
            self._idle_keys -= len(want.keys)

    # ------------------------------------------------------------------ one want
    def _serve(self, who: Hashable, want: _Want) -> tuple[int, bool]:
        """Copies started, and whether it is over: nothing is left to do, or nobody waits for it and it cannot go on."""
        if want.seq is not None and want.seq.id not in self._core.sequences:
            if not want.is_certain or want.left == math.inf:
                return 0, True
            want.seq = None  # its prefix was asked for
        if not want.is_certain and not self.foresight.knows(who):
            return 0, True
        started = missing = coming = 0
        for group in self._core.groups:
            blocks, d = self._blocks(group, want), group.directory
            below = blocks[~d.in_device(blocks)]
            missing += len(below)
            if want.left > started:
                started += self._bring(group, below, want.is_certain)
            coming += int(((d.page[below] >= 0) | (d.host_slot[below] >= 0) & ~d.in_host(below)).sum())
        want.left -= started
        return started, not missing or (want.left < math.inf and not started and not coming)

    def _blocks(self, group: BlockGroup, want: _Want) -> IntArray:
        """What its next token sees, as far as it is anywhere."""
        seq, size = want.seq, self._core.block_size
        if seq is not None and seq.num_computed:
            ids = seq.tables[group.index].ids
            logical = visible_blocks(group.layout, seq.num_computed, seq.num_computed)
            blocks = ids[logical[logical < len(ids)]]
        else:
            logical = visible_blocks(group.layout, len(want.keys) * size, len(want.keys) * size)
            blocks = group.directory.find([want.keys[i] for i in logical.tolist()])
            gaps = np.flatnonzero(~group.directory.is_valid(blocks))
            blocks = blocks[: int(gaps[0])] if len(gaps) and group.layout.window is None else blocks
        blocks = blocks[blocks >= 0]
        return blocks[group.directory.is_valid(blocks) | (group.directory.page[blocks] >= 0)]

    def _bring(self, group: BlockGroup, blocks: IntArray, is_certain: bool) -> int:
        d, budget = group.directory, self._budget(group)
        below = blocks[d.page[blocks] < 0]
        if not len(below) or not budget:
            return 0
        started = self._promote(group, below[d.in_host(below)], budget, is_certain)
        return started + self._read(group, below, budget - started, is_certain)

    def _budget(self, group: BlockGroup) -> int:
        """Blocks that may be set on their way now: none while somebody waits for copies."""
        moves = [move for other in self._core.groups for move in other.moves]
        if any(other.awaited for other in self._core.groups) or any(move.reason == "demand" for move in moves):
            return 0
        flying = sum(
            len(move.blocks) * group.layout.block_bytes for move in moves if move.reason == "prefetch"
        )  # blocks of other groups are as large as these, nearly
        return max(0, IN_FLIGHT_BYTES - flying) // group.layout.block_bytes or int(not flying)

    # ------------------------------------------------------------------ room
    def _promote(self, group: BlockGroup, ready: IntArray, budget: int, is_certain: bool) -> int:
        """Host -> device, beyond the high watermark of free or clean pages: the rest stays for new tokens."""
        pages, keep = group.pages, max(2, int(len(group.pages) * self._core.config.high_watermark))
        if not len(ready):
            return 0
        idle = pages.block[(pages.state == PageState.RESIDENT) & pages.idle()]
        idle = self._may_leave(group, idle, is_certain)
        ready = ready[: max(0, min(budget, pages.num_free + len(idle) - keep))]
        short = len(ready) - pages.num_free
        if short > 0:
            group.evict(group.policy.of("device").victims(short, idle), "prefetch")
        for batch in _batches(group, ready):
            group.promote(batch, pages.take_free(len(batch)), "prefetch")
            fetched.started(group, batch, "device")
        if is_certain:
            group.policy.on_access(ready)  # or they would leave again first
        return len(ready)

    def _read(self, group: BlockGroup, blocks: IntArray, budget: int, is_certain: bool) -> int:
        """Nvme -> host, into half of the free slots and those of clean copies."""
        if group.cold is None or budget <= 0:
            return 0
        d, host = group.directory, group.host
        cold = blocks[(d.host_slot[blocks] < 0) & d.nvme_valid[blocks]]
        if not len(cold):
            return 0
        idle = cold[:0]
        if group.cold.ring is not None:  # a daemon's memory is not ours to clear
            idle = host.block[(host.state == SlotState.VALID) & (host.holds == 0)]
            idle = self._may_leave(group, idle[d.nvme_valid[idle]], is_certain)
        forms = group.forms
        cold, count = forms.fitting(cold[:budget], host.num_free // 2 + forms.slots_held(idle), below=True)
        short = count - host.num_free
        if short > 0:
            victims, _ = forms.giving(group.policy.of("host").victims(short, idle), short)
            group.drop_host_copies(victims, "prefetch")
        cold, _ = forms.fitting(cold, host.num_free, below=True)
        for batch in _batches(group, cold):
            group.cold.read(batch, host.take_free(forms.slots_of(batch, below=True)), "prefetch")
            fetched.started(group, batch, "host")
        return len(cold)

    def _may_leave(self, group: BlockGroup, blocks: IntArray, is_certain: bool) -> IntArray:
        """Cache that nobody refers to, that is no prefetch itself, and where the want is not certain was released."""
        d = group.directory
        may = (d.refs[blocks] == 0) & (d.fetched[blocks] == 0) & (d.pinned_until[blocks] <= group.clock())
        return blocks[may if is_certain else may & hints.given_up(group, blocks)]


def _batches(group: BlockGroup, blocks: IntArray) -> list[IntArray]:
    size = max(1, BATCH_BYTES // group.layout.block_bytes)
    return [blocks[i : i + size] for i in range(0, len(blocks), size)]
