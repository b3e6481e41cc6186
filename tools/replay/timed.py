"""A trace in time: when each request's turn comes, how long it then waits for its blocks, and what prefetch makes of that.

Three inclusive tiers, each ruled by its own policy as in `simulate`; links between them; one server that computes prompts
in order of arrival. A request's blocks are looked up when it arrives. Without prefetch their copies start when its turn
has come, with `queue` when it arrives, behind those before it. With `next_turn` the pager's own foresight names idle
sessions that will go on soon; their blocks come up into room that is free or holds released blocks, and are the first to
leave when demand needs it. What is counted is the wait between a request's turn and its last block. All of it is modelled;
nothing is measured.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from ...pager.foresight import Foresight, Session
from ...pager.policies.base import FloatArray, IntArray, Policy
from ...pager.policies.registry import Setting, make_policy
from ...pager.thrift import LEAST_CHANCE, Thrift
from .links import Job, Link
from .model import Machine
from .simulate import first_missing
from .trace import Trace

TIERS = ("device", "host")  # that blocks are prefetched into
_BELOW = {"device": "host", "host": "nvme"}
_ARRIVAL, _START, _PARK = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Mode:
    """Which prefetches run. `park_s`: sessions that have been idle for so long give their device blocks back."""

    queue: bool = False
    next_turn: bool = False
    park_s: float | None = None


@dataclass(slots=True)
class Waits:
    """Per request seconds between its turn and its last block; and what became of prefetched bytes, by tier."""

    wait_s: FloatArray
    hit_tokens: int = 0
    prefetched_bytes: int = 0
    demand_bytes: int = 0
    thrift: dict[str, Thrift] = field(default_factory=dict)

    @property
    def wasted_share(self) -> float:
        """Of all prefetched bytes; what was never read by the end of the trace counts as wasted."""
        wasted = sum(one.wasted_bytes for one in self.thrift.values())
        return wasted / self.prefetched_bytes if self.prefetched_bytes else 0.0

    @property
    def prefetched_share(self) -> float:
        """Of all bytes that came up a tier."""
        return self.prefetched_bytes / max(1, self.prefetched_bytes + self.demand_bytes)


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks of one session that were brought, or are on their way, into one tier."""

    who: Hashable
    blocks: IntArray  # those that the tier did not have, root first
    is_there: bool = False
    is_late: bool = False  # somebody came while it was on its way
    job: Job | None = None


class _Tier:
    """What one tier holds: by its policy, and prefetched."""

    def __init__(self, name: str, trace: Trace, policy: Policy, capacity: int) -> None:
        self.name, self.policy, self.capacity = name, policy, capacity
        self.held = np.zeros(trace.num_blocks, bool)
        self.fetched = np.zeros(trace.num_blocks, np.int16)  # pieces that have it here
        self.pieces: OrderedDict[Hashable, _Piece] = OrderedDict()
        self.thrift = Thrift()
        self.released = np.zeros(trace.num_blocks, bool)
        self.lent = self._used = self._num_given_up = 0  # given up: held and released
        self.tight_s = trace.requests[0].now_s if trace.requests else 0.0  # when it last had no room to spare
        policy.grow(trace.num_blocks)

    def has(self, blocks: IntArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.held[blocks] | (self.fetched[blocks] > 0)
        return found

    def use(self, trace: Trace, number: int, chain: IntArray) -> None:
        if not len(chain):
            return
        was_held = self.held[chain]
        self.policy.on_chain(chain, was_held, trace.requests[number])
        self._used += len(chain) - int(np.count_nonzero(was_held))
        self._num_given_up -= int(np.count_nonzero(was_held & self.released[chain]))
        self.held[chain] = True
        self.released[chain] = False
        if self._used + self.lent - self._num_given_up > self.capacity:
            self.tight_s = trace.requests[number].now_s
        self.shrink()

    def release(self, blocks: IntArray) -> None:
        self.policy.on_release(blocks)
        self._num_given_up += int(np.count_nonzero(self.held[blocks] & ~self.released[blocks]))
        self.released[blocks] = True

    def give_up(self, blocks: IntArray) -> None:
        """These leave now."""
        self.policy.on_release(blocks)
        self._leave(self.policy.coldest(len(blocks)))

    def room(self) -> int:
        """Blocks that could come in without anything leaving that may be wanted."""
        return self.capacity - self._used - self.lent + self._num_given_up

    def shrink(self) -> None:
        """The policy's coldest leave, released ones first, until what is held and what is lent fit."""
        excess = self._used + self.lent - self.capacity
        if excess > 0:
            self._leave(self.policy.coldest(excess))

    def _leave(self, blocks: IntArray) -> None:
        self.policy.on_evict(blocks)
        self._num_given_up -= int(np.count_nonzero(self.released[blocks]))
        self.held[blocks] = False
        self._used -= len(blocks)


class TimedReplay:
    """One trace, once."""

    def __init__(
        self,
        trace: Trace,
        policy: str,
        sizes: dict[str, int],
        machine: Machine,
        mode: Mode,
        releases: list[IntArray] | None = None,
    ) -> None:
        self._trace, self._machine, self._mode, self._releases = trace, machine, mode, releases
        self._block_bytes = trace.block_tokens * machine.bytes_per_token
        self._tiers = {
            name: _Tier(name, trace, make_policy(policy, Setting(size, trace.block_tokens)), size)
            for name, size in sizes.items()
        }
        self._up = {"device": Link(machine.host_bytes_per_s), "host": Link(machine.nvme_bytes_per_s)}
        self._foresight, self._chains = Foresight(), dict[Hashable, IntArray]()
        self._events: list[tuple[float, int, int]] = []
        self._server_free_s = 0.0
        self._loads: dict[
            int, tuple[int, int] | float
        ] = {}  # bytes to load once its turn comes, or when they are there
        self._last_use = np.full(trace.num_blocks, -1)
        self._found = Waits(np.zeros(len(trace.chains)))

    def run(self) -> Waits:
        trace = self._trace
        self._events = [(one.now_s, _ARRIVAL, number) for number, one in enumerate(trace.requests)]
        heapq.heapify(self._events)
        while self._events:
            now_s, kind, number = heapq.heappop(self._events)
            if self._mode.next_turn:
                self._prefetch_until(now_s)
            if kind == _ARRIVAL:
                self._arrive(number, now_s)
            elif kind == _START:
                self._start(number, now_s)
            else:
                self._park(number)
        for name in TIERS:
            tier = self._tiers[name]
            for piece in list(tier.pieces.values()):
                self._drop(tier, piece)
            self._found.thrift[name] = tier.thrift
        return self._found

    # ------------------------------------------------------------------ requests
    def _arrive(self, number: int, now_s: float) -> None:
        trace, chain, one = self._trace, self._trace.chains[number], self._trace.requests[number]
        had = first_missing(self._tiers["nvme"].held[chain]) if len(chain) else 0
        hit_tokens = min(had * trace.block_tokens, one.input_tokens)
        self._found.hit_tokens += hit_tokens
        who, session = self._turn_begins(chain[:had], now_s) if self._mode.next_turn else (None, None)
        known, device = chain[:had], self._tiers["device"]
        not_device = ~device.has(known)
        not_host = not_device & ~self._tiers["host"].has(known)
        loads = (int(not_device.sum()) * self._block_bytes, int(not_host.sum()) * self._block_bytes)
        self._found.demand_bytes += sum(loads)
        self._settle(who, known)
        for tier in self._tiers.values():
            self._make_room(tier, chain, now_s)
            tier.use(trace, number, chain)
            if self._releases is not None and len(self._releases[number]):
                tier.release(self._releases[number])
        starts_s = max(now_s, self._server_free_s)
        self._server_free_s = starts_s + (one.input_tokens - hit_tokens) / self._machine.prefill_tokens_per_s
        self._loads[number] = self._load(now_s, loads) if self._mode.queue else loads
        heapq.heappush(self._events, (starts_s, _START, number))
        if self._mode.park_s is not None:
            heapq.heappush(self._events, (self._server_free_s + self._mode.park_s, _PARK, number))
            self._last_use[chain] = number
        if self._mode.next_turn and len(chain):
            self._turn_ends(number, chain, self._server_free_s, session)

    def _start(self, number: int, now_s: float) -> None:
        load = self._loads.pop(number)
        there_s = load if isinstance(load, float) else self._load(now_s, load)
        self._found.wait_s[number] = max(0.0, there_s - now_s)

    def _park(self, number: int) -> None:
        """What no other request has used since leaves the device tier."""
        chain, device = self._trace.chains[number], self._tiers["device"]
        idle = chain[self._last_use[chain] == number]
        device.give_up(idle[device.held[idle]])

    def _load(self, now_s: float, loads: tuple[int, int]) -> float:
        """Both links at once: blocks go on as they come."""
        return max(self._up["device"].demand(now_s, loads[0]), self._up["host"].demand(now_s, loads[1]))

    # ------------------------------------------------------------------ turns
    def _turn_begins(self, known: IntArray, now_s: float) -> tuple[Hashable, Session | None]:
        for block in known[::-1].tolist():
            if block in self._chains:
                del self._chains[block]
                for name in TIERS:
                    self._stop(self._tiers[name], block)
                return block, self._foresight.began(block, now_s)
        return None, None

    def _turn_ends(self, number: int, chain: IntArray, now_s: float, session: Session | None) -> None:
        one = self._trace.requests[number]
        who = int(chain[-2] if one.has_partial_tail and len(chain) > 1 else chain[-1])
        if self._releases is not None and (self._releases[number] == who).any():
            return  # it is said to be over
        self._chains[who] = chain
        self._foresight.ended(who, now_s, session, one)

    # ------------------------------------------------------------------ prefetches
    def _prefetch_until(self, now_s: float) -> None:
        for link in self._up.values():
            link.advance(now_s)
        while self._foresight.next_s() <= now_s:
            at_s = self._foresight.next_s()
            for who, _ in self._foresight.due(at_s, 1.0, 0.0):
                self._consider(who, max(at_s, 0.0), now_s)

    def _consider(self, who: Hashable, at_s: float, now_s: float) -> None:
        """Into every tier that has room for it, and has had room for as long as the session is likely to take."""
        for name in TIERS:
            tier = self._tiers[name]
            chance = self._foresight.chance(who, at_s, now_s - tier.tight_s)
            if chance >= LEAST_CHANCE:
                missing = self._missing(tier, who)
                if len(missing) and tier.thrift.may_start(chance):
                    self._bring(tier, who, missing, now_s)

    def _missing(self, tier: _Tier, who: Hashable) -> IntArray:
        """Of its chain what could come into this tier from the one below."""
        chain, below = self._chains[who], self._tiers[_BELOW[tier.name]]
        known = chain[: first_missing(below.has(chain))]
        return known[:0] if who in tier.pieces else known[~tier.has(known)][: max(0, tier.room())]

    def _bring(self, tier: _Tier, who: Hashable, missing: IntArray, now_s: float) -> None:
        piece = tier.pieces[who] = _Piece(who, missing)
        tier.lent += len(missing)
        tier.shrink()
        nbytes = len(missing) * self._block_bytes
        self._found.prefetched_bytes += nbytes
        tier.thrift.started(nbytes)

        def there(_: float) -> None:
            piece.is_there = True
            tier.fetched[missing] += 1

        piece.job = self._up[tier.name].prefetch(now_s, nbytes, there)

    def _settle(self, who: Hashable, known: IntArray) -> None:
        """Its session has gone on: what was brought for it was read, as far as the chain still needed it."""
        for name in TIERS:
            tier = self._tiers[name]
            piece = tier.pieces.get(who)
            if piece is not None:
                self._take_out(tier, piece)
                read = int(np.isin(piece.blocks, known).sum())
                if read:
                    tier.thrift.useful(read * self._block_bytes, is_late=piece.is_late)
                if read < len(piece.blocks):
                    tier.thrift.wasted((len(piece.blocks) - read) * self._block_bytes)

    def _make_room(self, tier: _Tier, chain: IntArray, now_s: float) -> None:
        """Demand comes first: pieces leave, oldest first, for blocks that are new here."""
        new = len(chain) - int(np.count_nonzero(tier.held[chain]))
        while tier.pieces and tier.room() < new:
            tier.tight_s = now_s
            self._drop(tier, next(iter(tier.pieces.values())))

    def _drop(self, tier: _Tier, piece: _Piece) -> None:
        """It leaves unread."""
        self._take_out(tier, piece)
        tier.thrift.wasted(len(piece.blocks) * self._block_bytes)

    def _take_out(self, tier: _Tier, piece: _Piece) -> None:
        del tier.pieces[piece.who]
        tier.lent -= len(piece.blocks)
        if piece.is_there:
            tier.fetched[piece.blocks] -= 1
        elif piece.job is not None:
            piece.job.is_cancelled = True

    def _stop(self, tier: _Tier, who: Hashable) -> None:
        """Its session goes on: what is there will be read, what is not comes by demand."""
        piece = tier.pieces.get(who)
        if piece is not None and not piece.is_there and piece.job is not None:
            nbytes = len(piece.blocks) * self._block_bytes
            came = int(len(piece.blocks) * (1 - piece.job.left / nbytes))
            piece.job.is_cancelled = True
            tier.lent -= len(piece.blocks) - came
            self._found.prefetched_bytes -= (len(piece.blocks) - came) * self._block_bytes
            tier.thrift.undone((len(piece.blocks) - came) * self._block_bytes)
            piece.blocks, piece.is_there, piece.is_late = piece.blocks[:came], True, True
            tier.fetched[piece.blocks] += 1
