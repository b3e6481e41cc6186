"""Scheduler: which requests run in the next step, who is let in, and who makes room.

A step has one token budget: decodes first, then prompt chunks. Requests are active while the blocks that they read fit
the device tier together; a request larger than that runs alone, streamed. What waits on copies is left out of the step
and joins when its pages are there. Two requests with one prefix compute it once: the second waits for the first's blocks.

Who is next: priority, then who ran before, then the namespace that has been served least, then age. All the time that a
request has waited raises its priority in steps; who waits takes the room of those that ran for a quantum and were let in at
a lower level. So every wait is bounded, and of equals the first to come is the first to end: taking turns sooner would make
all of them late. Room is made by parking the requests that are cheapest to bring back, or by forgetting what they computed
where computing it again is cheaper by measured rates.
Sources: iteration-level batching (Orca, 2022), chunked prefill (Sarathi, 2023), virtual token counters (Sheng, 2024).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..pager.pager import Pager
from ..tiers.errors import ConfigError
from ..tiers.owners import unsalted
from .request import Request

Work = list[tuple[Request, int]]
BLOCKS_AHEAD = 1  # of each active request: where these do not fit, one of them will have to wait soon
LOOK_AHEAD, LOOK_EVERY_S = 4, 0.02  # requests next in the queue whose blocks come up meanwhile
_MAX_SERVED = 4096  # namespaces remembered


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Seconds are of the scheduler's clock."""

    max_active: int = 64  # requests in turns on the device tier
    quantum_s: float = 1.0  # a request may run so long before it makes room for one that waits
    aging_s: float = 10.0  # waits of this length together count as one step of priority
    draft_tokens: int = 8  # of speculation per step and request

    def __post_init__(self) -> None:
        if self.max_active < 1 or self.draft_tokens < 0:
            raise ConfigError(
                f"max_active={self.max_active}, draft_tokens={self.draft_tokens}: need max_active >= 1, draft_tokens >= 0"
            )
        if not self.quantum_s >= 0 or not self.aging_s > 0:
            raise ConfigError(
                f"quantum_s={self.quantum_s}, aging_s={self.aging_s}: need quantum_s >= 0 (0: a turn ends as soon as it has "
                "gained something) and aging_s > 0"
            )


class Scheduler:
    """Of one engine; not thread-safe: the engine's loop owns it."""

    def __init__(
        self,
        pager: Pager,
        budget: int,
        limits: SchedulerLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.clock = limits or SchedulerLimits(), clock
        self.budget = budget  # tokens per step
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self.num_preempted = self.num_discarded = 0
        self._pager = pager
        self._served: defaultdict[str, float] = defaultdict(float)  # tokens by namespace
        self._looked_s = float("-inf")
        self._short_until_s = float("-inf")  # no tier had room for those that are active: nobody else is let in

    # ------------------------------------------------------------------ coming and going
    def add(self, request: Request) -> None:
        request.waiting_since_s = self.clock()
        name, present = unsalted(request.namespace), {unsalted(r.namespace) for r in self.requests()}
        if present and name not in present:  # who was away has saved nothing up
            self._served[name] = max(self._served[name], min(self._served[one] for one in present))
        if len(self._served) > _MAX_SERVED:
            self._served = defaultdict(float, {name: self._served[name] for name in present})
        self.waiting.append(request)

    def add_twin(self, first: Request, twin: Request) -> None:
        """A fork of an active request shares its blocks and runs beside it."""
        twin.is_matched = True
        twin.waiting_since_s, twin.waited_s = self.clock(), first.waited_s
        self._begin_turn(twin, first.admitted_level)

    def requests(self) -> Iterator[Request]:
        yield from self.active
        yield from self.waiting

    def take_ended(self) -> list[Request]:
        """Requests that are done, cancelled or past their deadline; they are known no longer."""
        now_s = self.clock()
        for request in self.requests():
            if request.is_done:
                continue
            if request.is_cancelled:
                request.end("cancelled")
            elif request.deadline_s is not None and now_s > request.deadline_s:
                request.end("deadline")
        ended = [r for r in self.requests() if r.is_done]
        if ended:
            self._short_until_s = float("-inf")
            self.active = [r for r in self.active if not r.is_done]
            self.waiting = [r for r in self.waiting if not r.is_done]
            self._take_turns()
        return ended

    @property
    def prefill_s_per_token(self) -> float:
        """As measured lately; 0 before anything was."""
        return self._pager.compute_s_per_token

    # ------------------------------------------------------------------ one step
    def plan(self) -> Work:
        """What to run now; empty only when nothing is left that could. Starts copies for what comes after."""
        self._shed()
        self._admit()
        self._take_turns()
        work: Work = []
        late: Work = []
        left = self.budget
        computing: set[bytes] = set()
        for request in sorted(self.active, key=self._turn):
            if left <= 0:
                break
            count = self._count(request, left, computing)
            if count <= 0:
                continue
            if not request.is_large and not request.reads_a_part and self._pager.bring_up(request.seq):
                late.append((request, count - len(request.draft)))
                self.undraft(request)  # it may be preempted, or cut short, before it runs
                continue
            computing.update(self._keys(request, count))
            work.append((request, count))
            left -= count
        self._look_ahead()
        return work or late[:1]  # with nothing else to do, wait for the first

    def _take_turns(self) -> None:
        """What those who share the device tier read leaves it last."""
        self._pager.take_turns([r.seq for r in self.active if not r.is_large and not r.reads_a_part])

    def _look_ahead(self) -> None:
        """Blocks of who is let in next come up meanwhile, in that order."""
        now_s = self.clock()
        if self.waiting and now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            self._pager.prefetch([request.seq for request in self._queue()[:LOOK_AHEAD]])

    def ran(self, work: Work, seconds: float) -> None:
        """These spans were computed in so many seconds."""
        tokens = sum(count for _, count in work)
        for request, count in work:
            self._served[unsalted(request.namespace)] += count  # a salt, which a client chooses, makes nobody new
            request.has_run = True
        if tokens > 2 * len(work):
            self._pager.note_computing(tokens, seconds)

    def relieve(self, needed_by: Request) -> bool:
        """No tier has room for another page: somebody else's blocks are forgotten. False when there is nobody."""
        others = [r for r in self.requests() if r is not needed_by and self._pager.num_computed(r.seq) > 0]
        if not others:
            return False
        victim = max(others, key=lambda r: (r.admitted_s is None, -self._importance(r)))
        again_s = self._pager.num_computed(victim.seq) * self.prefill_s_per_token
        turn_s = max(self.limits.aging_s, 10 * again_s)  # else they would forget each other's blocks in turns for ever
        self._short_until_s = self.clock() + turn_s
        self._discard(victim)
        if victim in self.active:
            self._back_to_waiting(victim)
        return True

    # ------------------------------------------------------------------ order
    def _importance(self, request: Request) -> float:
        """Priority, raised by all its waits."""
        now_s = 0.0 if request.admitted_s is not None else self.clock() - request.waiting_since_s
        return request.priority + (request.waited_s + now_s) / self.limits.aging_s

    def _level(self, request: Request) -> int:
        """Whole steps of importance; priorities below 0 too."""
        return math.floor(self._importance(request))

    def _turn(self, request: Request) -> tuple[bool, float, float]:
        """Order within a step: decodes, then the least served namespace's prompts."""
        is_prefill = self._remaining(request) > 1
        return is_prefill, -request.priority, self._served[unsalted(request.namespace)] if is_prefill else 0.0

    def _queue(self) -> list[Request]:
        """Who is let in next: who ran before, then by importance, service and age."""

        def rank(request: Request) -> tuple[int, bool, float, float]:
            level = -self._level(request)
            served = self._served[unsalted(request.namespace)]
            return level, request.num_preempted == 0, served, request.waiting_since_s - request.waited_s

        return sorted((r for r in self.waiting if not _waits_for_others(r)), key=rank)

    # ------------------------------------------------------------------ how much
    def _remaining(self, request: Request) -> int:
        return self._pager.num_tokens(request.seq) - self._pager.num_computed(request.seq)

    def _count(self, request: Request, left: int, computing: set[bytes]) -> int:
        """Tokens of this request in this step; 0 while somebody else computes what comes next in it."""
        remaining = self._remaining(request)
        if remaining == 0:
            return 0  # a beam that waits for the others
        if remaining == 1:
            return self._with_draft(request, left)
        before = self._pager.num_computed(request.seq)
        count = self._pager.plan_prefill(request.seq, left)
        request.adopted(self._pager.num_computed(request.seq) - before)
        keys = self._keys(request, count)
        return 0 if keys and keys[0] in computing else count

    def _with_draft(self, request: Request, left: int) -> int:
        if request.drafter is None or left < 2:
            return 1
        room = request.params.max_tokens - len(request.output.token_ids) - 1
        limit = min(left - 1, room, self.limits.draft_tokens, self._pager.room_to_draft(request.seq))
        if limit > 0:
            request.draft = request.drafter.propose(request.seq, limit)
            self._pager.append(request.seq, request.draft)
        return 1 + len(request.draft)

    def undraft(self, request: Request) -> None:
        """Take unproven tokens back."""
        if request.draft:
            self._pager.truncate(request.seq, self._pager.num_tokens(request.seq) - len(request.draft))
            request.draft = []

    def _keys(self, request: Request, count: int) -> list[bytes]:
        start = self._pager.num_computed(request.seq)
        if start % self._pager.block_size or count < self._pager.block_size:
            return []
        return self._pager.block_keys(request.seq, start, start + count)

    # ------------------------------------------------------------------ letting in, making room
    def _admit(self) -> None:
        if self.clock() < self._short_until_s and not all(_waits_for_others(r) for r in self.active):
            return
        for request in self._queue():
            if not self._fits(request, self.active):
                if self._make_room(request):
                    self._activate(request)
                return  # nobody passes who waits for room
            self._activate(request)

    def _shed(self) -> None:
        """Answers grow: who no longer fits beside the others waits, and who soon will not is copied down already."""
        while len(self.active) > 1 and not self._hold([(r.seq, 1) for r in self.active]):
            self._preempt(*self._first_to_wait())
        if len(self.active) > 1 and not self._hold(
            [(r.seq, BLOCKS_AHEAD * self._pager.block_size) for r in self.active]
        ):
            self._pager.make_clean(self._first_to_wait()[0].seq)

    def _first_to_wait(self) -> tuple[Request, tuple[float, float]]:
        """Of the active ones, with what having it back would cost."""
        least = min(r.priority for r in self.active)
        among = [r for r in self.active if r.priority == least]
        return min(zip(among, self._costs_s(among), strict=True), key=lambda one: min(one[1]))

    def _activate(self, request: Request) -> None:
        self.waiting.remove(request)
        if not request.is_matched:
            with request.ledger.phase("match"):
                match = self._pager.adopt(request.seq)
            request.found(match)
            request.known_tokens = match.tokens + match.ghost_tokens
        self._begin_turn(request, self._level(request))

    def _begin_turn(self, request: Request, level: int) -> None:
        request.admitted_level, request.admitted_s = level, self.clock()
        request.waited_s += request.admitted_s - request.waiting_since_s
        request.has_run, request.tokens_before_turn = False, len(request.output.token_ids)
        self.active.append(request)

    def _fits(self, request: Request, others: list[Request]) -> bool:
        request.is_large = not self._hold([(request.seq, self._growth(request))])
        if request.is_large or any(r.is_large for r in others):
            return not others
        if len(others) >= self.limits.max_active:
            return False
        return self._hold([(r.seq, self._growth(r)) for r in (*others, request)])

    def _hold(self, work: list[tuple[int, int]]) -> bool:
        """Whether the device tier holds all that these sequences read and so many new tokens each."""
        return all(need <= there for need, there in self._pager.pages_needed(work))

    def _growth(self, request: Request) -> int:
        """Tokens that are certain to come: the rest of the prompt, and a step's."""
        return max(1, self._remaining(request)) + (request.drafter is not None) * self.limits.draft_tokens

    def _make_room(self, request: Request) -> bool:
        """Send those back to wait who had their turn, the cheapest first. False when that is not room enough: all stay."""
        level = self._level(request)
        victims = [r for r in self.active if r.admitted_level < level or (_waits_for_others(r) and r.priority <= level)]
        costs = zip(victims, self._costs_s(victims), strict=True)
        ranked = sorted((one for one in costs if self._may_end_turn(request, *one)), key=lambda one: min(one[1]))
        left = list(self.active)
        for i, (victim, _) in enumerate(ranked):
            left.remove(victim)
            if self._fits(request, left):
                for one in ranked[: i + 1]:
                    if self._fits(request, [*left, one[0]]):
                        left.append(one[0])  # the room of the others is enough
                    else:
                        self._preempt(*one)
                return True
        return False

    def _may_end_turn(self, waiting: Request, request: Request, costs_s: tuple[float, float]) -> bool:
        """Whether it is less important, or ran for a quantum and ten times what bringing it back costs, and keeps a gain.

        Who is parked keeps all of it. Who is to be computed again keeps its tokens alone: without one, requests that each
        forget what they computed would take turns for ever, whatever the rates say.
        """
        if request.admitted_s is None or request.admitted_level < waiting.priority or _waits_for_others(request):
            return True  # of a beam that waits for others, one of these may wait for its pages
        park_s, compute_s = costs_s
        ran_s = self.clock() - request.admitted_s
        num_tokens = len(request.output.token_ids)
        has_gained = request.has_run if park_s <= compute_s else num_tokens > request.tokens_before_turn
        return has_gained and ran_s > max(self.limits.quantum_s, 10 * min(costs_s))

    def _preempt(self, request: Request, costs_s: tuple[float, float]) -> None:
        """It goes to wait: parked, or forgotten where computing it again is cheaper."""
        park_s, compute_s = costs_s
        self._back_to_waiting(request)
        if compute_s < park_s:
            self._discard(request)
        else:
            self._pager.demote(request.seq)

    def _discard(self, request: Request) -> None:
        self._pager.discard(request.seq)
        self.num_discarded += 1

    def _back_to_waiting(self, request: Request) -> None:
        self.active.remove(request)
        self.waiting.append(request)
        request.num_preempted += 1
        request.admitted_s, request.waiting_since_s = None, self.clock()
        self.num_preempted += 1
        self._take_turns()  # what it shares with those who go on stays, and nothing else of it

    def _costs_s(self, requests: list[Request]) -> list[tuple[float, float]]:
        """Seconds to bring each back from where it would be parked, and to compute it again."""
        parked_s = self._pager.seconds_to_bring_back([r.seq for r in requests])
        tokens = (self._pager.num_computed(r.seq) for r in requests)
        computing_s = (count * self.prefill_s_per_token or float("inf") for count in tokens)  # inf: not measured yet
        return list(zip(parked_s, computing_s, strict=True))


def _waits_for_others(request: Request) -> bool:
    """A beam that the rest of its search has to catch up with: pages are of no use to it now."""
    return request.beams is not None and request.beams.has_offered(request)
