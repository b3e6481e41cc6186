"""Scheduler: which requests run in the next step, who is let in, and who makes room.

A step has one token budget: decodes first, then prompt chunks. Requests are active while the blocks that they read fit
the device tier together; a request larger than that runs alone, streamed. What waits on copies is left out of the step
and joins when its pages are there. Two requests with one prefix compute it once: the second waits for the first's blocks.

Who is next: priority, then the namespace that has been served least, then age. Waiting raises priority, and who has run
for a quantum while others wait makes room, so every wait is bounded. Room is made by parking the request that is cheapest
to bring back, or by forgetting what it computed where computing it again is cheaper by measured rates.
Sources: iteration-level batching (Orca, 2022), chunked prefill (Sarathi, 2023), virtual token counters (Sheng, 2024).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..pager.pager import Pager
from ..tiers.errors import ConfigError
from .request import Request

Work = list[tuple[Request, int]]
LOOK_AHEAD, LOOK_EVERY_S = 4, 0.02  # requests next in the queue whose blocks come up meanwhile
_MAX_SERVED = 4096  # namespaces remembered; clients choose salts, and each is a namespace


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Seconds are of the scheduler's clock."""

    max_active: int = 64  # requests in turns on the device tier
    quantum_s: float = 1.0  # a request may run so long before it makes room for one that waits
    aging_s: float = 30.0  # a wait of this length counts as one step of priority
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
        self._is_short = False  # no tier had room for those that are active; until one ends nobody else is let in

    # ------------------------------------------------------------------ coming and going
    def add(self, request: Request) -> None:
        request.waiting_since_s = self.clock()
        present = {r.namespace for r in self.requests()}
        if present and request.namespace not in present:  # who was away has saved nothing up
            least = min(self._served[name] for name in present)
            self._served[request.namespace] = max(self._served[request.namespace], least)
        if len(self._served) > _MAX_SERVED:
            self._served = defaultdict(float, {name: self._served[name] for name in present})
        self.waiting.append(request)

    def add_twin(self, first: Request, twin: Request) -> None:
        """A fork of an active request shares its blocks and runs beside it."""
        twin.is_matched = True
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
            self._is_short = False
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
            for request in self._queue()[:LOOK_AHEAD]:
                self._pager.prefetch(request.seq)

    def ran(self, work: Work, seconds: float) -> None:
        """These spans were computed in so many seconds."""
        tokens = sum(count for _, count in work)
        for request, count in work:
            self._served[request.namespace] += count
            request.has_run = True
        if tokens > 2 * len(work):
            self._pager.note_computing(tokens, seconds)

    def relieve(self, needed_by: Request) -> bool:
        """No tier has room for another page: somebody else's blocks are forgotten. False when there is nobody."""
        others = [r for r in self.requests() if r is not needed_by and self._pager.num_computed(r.seq) > 0]
        if not others:
            return False
        victim = max(others, key=lambda r: (r.admitted_s is None, -self._importance(r)))
        self._is_short = True  # else they would forget each other's blocks in turns for ever
        self._discard(victim)
        if victim in self.active:
            self._back_to_waiting(victim)
        return True

    # ------------------------------------------------------------------ order
    def _importance(self, request: Request) -> float:
        """Priority, raised by waiting."""
        waited_s = 0.0 if request.admitted_s is not None else self.clock() - request.waiting_since_s
        return request.priority + waited_s / self.limits.aging_s

    def _turn(self, request: Request) -> tuple[bool, float, float]:
        """Order within a step: decodes, then the least served namespace's prompts."""
        is_prefill = self._remaining(request) > 1
        return is_prefill, -request.priority, self._served[request.namespace] if is_prefill else 0.0

    def _queue(self) -> list[Request]:
        """Who is let in next: who ran before, then by importance, service and age."""

        def rank(request: Request) -> tuple[int, bool, float, float]:
            level = -int(self._importance(request))
            return level, request.num_preempted == 0, self._served[request.namespace], request.waiting_since_s

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
        if self._is_short and not all(_waits_for_others(r) for r in self.active):
            return
        for request in self._queue():
            if len(self.active) >= self.limits.max_active or not self._fits(request):
                if self._make_room(request) and self._fits(request):
                    self._activate(request)
                return  # nobody passes who waits for room
            self._activate(request)

    def _shed(self) -> None:
        """Answers grow: who no longer fits beside the others waits."""
        while len(self.active) > 1 and not self._hold([(r.seq, 1) for r in self.active]):
            least = min(r.priority for r in self.active)
            self._preempt_cheapest([r for r in self.active if r.priority == least])

    def _activate(self, request: Request) -> None:
        self.waiting.remove(request)
        if not request.is_matched:
            with request.ledger.phase("match"):
                match = self._pager.adopt(request.seq)
            request.found(match)
            request.known_tokens = match.tokens + match.ghost_tokens
        self._begin_turn(request, int(self._importance(request)))

    def _begin_turn(self, request: Request, level: int) -> None:
        request.admitted_level, request.admitted_s = level, self.clock()
        request.has_run, request.tokens_before_turn = False, len(request.output.token_ids)
        self.active.append(request)

    def _fits(self, request: Request) -> bool:
        request.is_large = not self._hold([(request.seq, self._growth(request))])
        if request.is_large or any(r.is_large for r in self.active):
            return not self.active
        return self._hold([(r.seq, self._growth(r)) for r in (*self.active, request)])

    def _hold(self, work: list[tuple[int, int]]) -> bool:
        """Whether the device tier holds all that these sequences read and so many new tokens each."""
        return all(need <= there for need, there in self._pager.pages_needed(work))

    def _growth(self, request: Request) -> int:
        """Tokens that are certain to come: the rest of the prompt, and a step's."""
        return max(1, self._remaining(request)) + (request.drafter is not None) * self.limits.draft_tokens

    def _make_room(self, request: Request) -> bool:
        """Send somebody back to wait who had its quantum and is no more important. False when nobody is."""
        now_s, importance = self.clock(), self._importance(request)
        had_enough = [r for r in self.active if r.priority <= importance and self._had_turn(r, now_s)]
        victims = had_enough or [r for r in self.active if r.admitted_level < request.priority]
        if not victims:
            return False
        self._preempt_cheapest(victims)
        return True

    def _had_turn(self, request: Request, now_s: float) -> bool:
        """Whether it ran for a quantum and ten times what bringing it back costs, and keeps something of what it gained.

        Who is parked keeps all of it. Who is to be computed again keeps its tokens alone: without one, requests that each
        forget what they computed would take turns for ever, whatever the rates say.
        """
        if request.admitted_s is None:
            return False
        if _waits_for_others(request):
            return True  # and one of the others may wait for its pages
        ran_s = now_s - request.admitted_s
        if ran_s <= self.limits.quantum_s:
            return False
        park_s, compute_s = self._costs_s(request)
        is_parked = park_s <= compute_s
        has_gained = request.has_run if is_parked else len(request.output.token_ids) > request.tokens_before_turn
        return has_gained and ran_s > 10 * min(park_s, compute_s)

    def _preempt_cheapest(self, requests: list[Request]) -> None:
        """The one of these that is back soonest goes to wait: parked, or forgotten where computing it again is cheaper."""
        costs = [self._costs_s(r) for r in requests]
        request, (park_s, compute_s) = min(zip(requests, costs), key=lambda one: min(one[1]))
        if compute_s < park_s:
            self._discard(request)
        else:
            self._pager.demote(request.seq)
        self._back_to_waiting(request)

    def _discard(self, request: Request) -> None:
        self._pager.discard(request.seq)
        self.num_discarded += 1

    def _back_to_waiting(self, request: Request) -> None:
        self.active.remove(request)
        self.waiting.append(request)
        request.num_preempted += 1
        request.admitted_s, request.waiting_since_s = None, self.clock()
        self.num_preempted += 1

    def _costs_s(self, request: Request) -> tuple[float, float]:
        """Seconds to bring the request back from where it would be parked, and to compute it again."""
        tokens = self._pager.num_computed(request.seq)
        computing = tokens * self.prefill_s_per_token or float("inf")  # nothing was measured yet
        return self._pager.seconds_to_bring_back(request.seq), computing


def _waits_for_others(request: Request) -> bool:
    """A beam that the rest of its search has to catch up with: pages are of no use to it now."""
    return request.beams is not None and request.beams.has_offered(request)
