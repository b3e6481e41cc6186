"""Beam search over forks: beams share the blocks of what they have in common, and part where they differ.

Same choices as transformers' beam search (early_stopping False or True, length penalty, several stop tokens): the best
continuations of all beams together go on; those that stop are set aside with their score per length. A beam is a request
of the scheduler; one whose logits have come waits, with nothing left to compute, until those of all others have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .request import Request
from .sampling import Sampler

if TYPE_CHECKING:
    from .stepping import Stepper


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam: its tokens, and its sum of natural log probabilities per length ** length_penalty."""

    score: float
    tokens: list[int]
    reason: str


class BeamGroup:
    """The beams of one request. The first n of them are the request and its twins, which report the results."""

    def __init__(self, first: Request) -> None:
        params = self._params = first.params
        spare = range(params.num_beams - params.n)
        extra = [
            Request(
                -1, params, Sampler(params), first.prompt_tokens, namespace=first.namespace, priority=first.priority
            )
            for _ in spare
        ]
        self._requests = [first, *first.twins, *extra]  # of one priority, or some wait for others that are never let in
        for request in self._requests:
            request.beams = self
        self._running = [first]
        self._scores, self._tokens = [0.0], [list[int]()]
        self._finished: list[Hypothesis] = []
        self._offered: dict[int, Tensor] = {}  # by place among the running

    @property
    def requests(self) -> list[Request]:
        return self._requests

    def offer(self, stepper: Stepper, request: Request, logits: Tensor) -> None:
        """Logits [vocab] of one beam's next token; with those of the last beam, all of them take a step.

        A beam that was preempted while it waited for the others is computed again and offers a second time. Where the
        others have taken their step by then it has a new token: what it offers belongs to the step before.
        """
        if request.is_done or stepper.pager.num_computed(request.seq) < stepper.pager.num_tokens(request.seq):
            return
        self._offered[self._running.index(request)] = logits.float().log_softmax(-1)
        if len(self._offered) == len(self._running):
            scores = torch.stack([self._offered[i] + self._scores[i] for i in range(len(self._running))])
            self._offered.clear()
            self._advance(stepper, scores)

    def has_offered(self, request: Request) -> bool:
        """Whether this beam has nothing to do until the others have offered theirs."""
        return request in self._running and self._running.index(request) in self._offered

    def give_up(self, ended: Request) -> None:
        """One beam ended before the search did: all of them do."""
        for request in self._running:
            if not request.is_done:
                request.end(ended.output.finish_reason, ended.error)

    def _advance(self, stepper: Stepper, scores: Tensor) -> None:
        """One token further. scores: accumulated log probabilities [beams, vocab]."""
        params, vocab = self._params, scores.shape[1]
        keep = min(max(2, 1 + len(params.stop_token_ids)) * params.num_beams, scores.numel())
        best = scores.flatten().topk(keep)
        going: list[tuple[float, int, int]] = []
        length = len(self._tokens[0]) + 1
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            parent, token = divmod(index, vocab)
            is_stop = token in params.stop_token_ids
            if is_stop or length >= params.max_tokens:
                if rank < params.num_beams:
                    reason = "stop" if is_stop else "length"
                    tokens = [*self._tokens[parent], token]
                    self._finished.append(Hypothesis(score / length**params.length_penalty, tokens, reason))
            elif len(going) < params.num_beams:
                going.append((score, parent, token))
        self._finished.sort(key=lambda found: -found.score)
        del self._finished[params.num_beams :]
        if not going or self._is_over(going[0][0], length):
            self._end(stepper)
        else:
            self._go_on(stepper, going)

    def _is_over(self, best_score: float, length: int) -> bool:
        """Whether no running beam can still be among the best."""
        if len(self._finished) < self._params.num_beams:
            return False
        best_possible = best_score / length**self._params.length_penalty
        return self._params.early_stopping or best_possible <= self._finished[-1].score

    def _go_on(self, stepper: Stepper, going: list[tuple[float, int, int]]) -> None:
        """Every parent's first child takes over its sequence, the others fork it; who has no child ends."""
        pager, parents = stepper.pager, [request.seq for request in self._running]
        forked = [parent in [p for _, p, _ in going[:i]] for i, (_, parent, _) in enumerate(going)]
        seqs = [
            pager.fork(parents[parent]) if is_fork else parents[parent]
            for (_, parent, _), is_fork in zip(going, forked, strict=True)
        ]
        for seq in set(parents) - set(seqs):
            pager.release(seq)
        for request, seq, (_, _, token) in zip(self._requests, seqs, going, strict=False):
            if request not in self._running:
                request.known_tokens = self._requests[0].known_tokens
                stepper.scheduler.add_twin(self._requests[0], request)
            request.seq = seq
            pager.append(seq, [token])
        self._tokens = [[*self._tokens[parent], token] for _, parent, token in going]
        self._scores = [score for score, _, _ in going]
        self._running = self._requests[: len(going)]

    def _end(self, stepper: Stepper) -> None:
        for request in self._requests:
            if request not in self._running:
                stepper.scheduler.add_twin(self._requests[0], request)
        for request, found in zip(self._requests[: self._params.n], self._finished, strict=False):
            request.output.score = found.score
            request.output.token_ids = list(found.tokens)
            if request.on_token is not None:
                for token in found.tokens:
                    request.on_token(request, token)
            request.end(found.reason)
        for request in self._requests[self._params.n :]:
            request.end("length")
