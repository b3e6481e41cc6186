"""Stepper: what a scheduler planned, run: lease, forward, commit, and the tokens that come out of it.

Where the device tier cannot hold a step after all, the step shrinks; where it cannot hold one sequence, that sequence
streams alone; where no tier has room, somebody waits. A lost block costs computing it again and never an answer. Who is
let in and who gives back what is the scheduler's and the engine's. Invariant: a token is chosen only from logits of a
step that was committed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..pager.lease import Span
from ..pager.pager import Pager
from ..tiers.errors import BlockMissError, Busy, KvTierError, TierFullError, TierUnavailableError, UnpackableError
from .attending import Attention
from .modes import Modes
from .request import Request, phase
from .runner import ModelRunner
from .scheduler import Scheduler, Work
from .speculative import Drafters

_LOG = logging.getLogger("kvtier.engine")
MAX_STALLS = 4  # leases in a row that a request waits for in vain
SPARE_MISSES = 16  # lost blocks per request beyond two for each of its blocks, before the disk is given up on


@dataclass(frozen=True, slots=True)
class Stepper:
    """Of one engine."""

    pager: Pager
    scheduler: Scheduler
    runner: ModelRunner
    modes: Modes
    drafters: Drafters

    def run(self, work: Work) -> None:
        """One step; requests that attend in different ways take theirs one kind after the other."""
        for kind, part in self.modes.split(work):
            self._run_shrinking(part, kind)

    def _run_shrinking(self, work: Work, kind: Attention) -> None:
        """Run one step over as much of the work as the device tier can hold."""
        while True:
            try:
                self._run(work, kind)
                return
            except BlockMissError as error:
                self._undraft(work)
                self._count_miss(next(r for r, _ in work if r.seq == error.seq), error)
                return  # the pager has cut the sequence; the next plan computes what is missing
            except UnpackableError as error:  # the values of somebody's block fit no format: the others go on
                work = self._undraft(work)
                for one in work if len(work) > 1 else ():
                    self._run_shrinking([one], kind)
                if len(work) == 1:
                    work[0][0].end("error", error)
                return
            except Busy as error:
                if any(request.draft for request, _ in work):
                    work = self._undraft(work)
                elif len(work) > 1:
                    work = work[: len(work) // 2]
                elif not isinstance(error, TierFullError):
                    self._count_stall(work[0][0], error)
                    return  # copies were too slow; the next plan asks for them again
                elif work[0][1] > 1:
                    work = [(work[0][0], work[0][1] // 2)]
                elif not self.scheduler.relieve(work[0][0]):
                    work[0][0].end("error", error)
                    return

    def _undraft(self, work: Work) -> Work:
        """Take unproven tokens back; returns the work without them."""
        left = [(request, count - len(request.draft)) for request, count in work]
        for request, _ in work:
            self.scheduler.undraft(request)
        return left

    def _count_stall(self, request: Request, error: Busy) -> None:
        """The others go on whatever becomes of it."""
        request.num_stalls += 1
        if request.num_stalls >= MAX_STALLS:
            request.end("error", error)

    def _count_miss(self, request: Request, error: BlockMissError) -> None:
        request.num_misses += 1
        limit = SPARE_MISSES + 2 * self.pager.num_tokens(request.seq) // self.pager.block_size
        if request.num_misses > limit:
            lost = TierUnavailableError(
                f"sequence {request.seq} lost a block {request.num_misses} times; the store keeps losing what is "
                "written to it: check the disk under nvme_path"
            )
            lost.__cause__ = error
            request.end("error", lost)

    def _run(self, work: Work, kind: Attention) -> None:
        starts = [self.pager.num_computed(request.seq) for request, _ in work]
        spans = [Span(r.seq, start, start + count) for (r, count), start in zip(work, starts, strict=True)]
        reads = [
            (i, 1 + len(request.draft))
            for i, ((request, _), span) in enumerate(zip(work, spans, strict=True))
            if span.end == self.pager.num_tokens(span.seq)
        ]
        requests = [request for request, _ in work]
        with phase(requests, "wait_for_blocks"):
            lease = self.pager.lease(self.modes.spans(kind, spans), selected=kind.kind == "select")
        started_s = time.perf_counter()
        with phase(requests, "decode" if all(count == 1 for _, count in work) else "prefill"), lease:
            logits = self.runner.forward(lease, spans, reads, self.modes.begin(kind, lease, work, reads))
            lease.commit()
            self.modes.done()
        self.scheduler.ran(work, time.perf_counter() - started_s)
        with phase(requests, "sample"):
            for request, span in zip(requests, spans, strict=True):
                request.computed(span.start, span.end)
                request.num_stalls = 0
            row, rows = 0, logits.unbind(0) if reads else ()
            for index, count in reads:
                self._sample(requests[index], rows[row : row + count])
                row += count

    # ------------------------------------------------------------------ tokens
    def _sample(self, request: Request, logits: Sequence[Tensor]) -> None:
        """What one request's values or its reader break ends that one: its K/V is computed, and so is the others'."""
        try:
            self._take_tokens(request, logits)
        except KvTierError:
            raise
        except Exception as error:
            _LOG.exception("event=sampling_failed")
            known = {id(one) for one in self.scheduler.requests()}  # twins that are not are ended with the first
            for one in [request, *request.twins] if request.beams is None else request.beams.requests:
                if id(one) in known and not one.is_done and (one is request or self._goes_nowhere(one)):
                    one.end("error", error)

    def _goes_nowhere(self, request: Request) -> bool:
        """A twin or beam that was to get its next token from the step that failed."""
        pager = self.pager
        return request.beams is not None or pager.num_computed(request.seq) >= pager.num_tokens(request.seq)

    def _take_tokens(self, request: Request, logits: Sequence[Tensor]) -> None:
        """Sample for the request from 1 + drafted rows of logits [vocab], and at its first token for its twins."""
        if request.on_prompt is not None and request.ledger.ttft_s is None:
            request.on_prompt(request)
        request.ledger.first_token()
        if request.beams is not None:
            request.beams.offer(self, request, logits[0])
            return
        for twin in request.twins:
            if twin.seq < 0 and not twin.is_done:  # one that has ended has none any more
                self._begin_twin(request, twin, logits[0])
        if request.params.max_tokens == 0:
            request.end_if_full()
            return
        draft, request.draft = request.draft, []
        known, num_right = self.pager.num_tokens(request.seq) - len(draft), 0
        for place, row in enumerate(logits):
            token = self._choose(request, row)
            is_right = place < len(draft) and draft[place] == token
            num_right += is_right
            if request.is_done or not is_right:
                break
        if draft:
            self.pager.truncate(request.seq, known + num_right)
            request.usage.drafted_tokens += len(draft)
            request.usage.accepted_tokens += num_right
        if not is_right:
            self.pager.append(request.seq, [token])

    def _choose(self, request: Request, logits: Tensor) -> int:
        token = request.sampler.choose(logits)
        request.output.note(request.params, logits, token)
        request.take(token)
        request.end_if_full()
        return token

    def _begin_twin(self, first: Request, twin: Request, logits: Tensor) -> None:
        twin.seq, twin.known_tokens = self.pager.fork(first.seq), first.known_tokens
        twin.drafter = self.drafters.make(twin.params, twin.namespace)
        twin.on_token, twin.deadline_s = twin.on_token or first.on_token, first.deadline_s
        self.scheduler.add_twin(first, twin)
        twin.ledger.first_token()
        if twin.params.max_tokens > 0:
            self.pager.append(twin.seq, [self._choose(twin, logits)])
        else:
            twin.end_if_full()
