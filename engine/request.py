"""Request: one sequence being generated, and what it is charged for: waiting, computing, and computing again.

A token counts as recomputed when its place had been computed before (by this session, or by someone whose block was
since evicted), and is computed now. So a lost block that is found again elsewhere costs nothing, on the books as in fact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..pager.ledger import RequestLedger
from ..pager.prefix import Match
from .sampling import Output, Sampler, SamplingParams, Usage

if TYPE_CHECKING:
    from .beam import BeamGroup
    from .speculative import Drafter

OnToken = Callable[["Request", int], None]
OnEnd = Callable[["Request"], None]
OnPrompt = OnEnd


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. `twins` share its prompt and get their own sequences at its first token.

    Higher `priority` goes first; `deadline_s` and `waiting_since_s` are times of the scheduler's clock. `keeps_sequence`: the
    sequence belongs to somebody else (a session) and outlives the request. `is_last` is a hint for every tier.
    """

    seq: int
    params: SamplingParams
    sampler: Sampler
    prompt_tokens: int
    known_tokens: int = 0  # the first so many had been computed before this request came
    namespace: str = "default"
    name: str = ""  # as its client knows it
    priority: int = 0
    deadline_s: float | None = None
    waiting_since_s: float = 0.0
    waited_s: float = 0.0  # before that, in earlier waits
    keeps_sequence: bool = False
    is_last: bool = False  # of its conversation: nobody goes on from here
    drafter: Drafter | None = None
    on_prompt: OnPrompt | None = None  # the prompt is computed, no token is chosen yet; the sequence may be forked
    on_token: OnToken | None = None
    on_end: OnEnd | None = None
    usage: Usage = field(default_factory=Usage)
    ledger: RequestLedger = field(default_factory=lambda: RequestLedger(time.perf_counter))
    output: Output = field(default_factory=Output)
    twins: list[Request] = field(default_factory=list)
    beams: BeamGroup | None = None  # it is one of these
    draft: list[int] = field(default_factory=list)  # appended to the sequence, not yet proven
    num_misses: int = 0
    num_stalls: int = 0  # leases in vain since its last step
    num_preempted: int = 0
    admitted_s: float | None = None  # when it last became active; None while it waits
    admitted_level: int = 0  # its priority then, with what waiting had added: it holds for the turn
    has_run: bool = False  # a step since it was let in
    tokens_before_turn: int = 0  # of its answer, when it was let in
    is_large: bool = False  # its context alone is more than the device tier holds
    is_matched: bool = False  # the cache was asked for its prompt
    is_cancelled: bool = False
    is_done: bool = False
    error: BaseException | None = None

    @property
    def reads_a_part(self) -> bool:
        """Whether its decodes leave context where it is."""
        return self.params.attention is not None and not self.params.attention.is_exact and self.is_matched

    def found(self, match: Match) -> None:
        """Book what the cache held when the request came."""
        self.is_matched = True
        self.usage.cached_tokens = match.tokens
        self.usage.device_tokens, self.usage.host_tokens = match.device_tokens, match.host_tokens
        self.usage.disk_tokens = match.nvme_tokens

    def adopted(self, num_tokens: int) -> None:
        """Book what somebody else computed while this request waited; it is in the device tier."""
        self.usage.cached_tokens += num_tokens
        self.usage.device_tokens += num_tokens

    def computed(self, start: int, end: int) -> None:
        """Tokens [start, end) have just been computed."""
        self.usage.recomputed_tokens += max(0, min(end, self.known_tokens) - start)
        self.known_tokens = max(self.known_tokens, end)

    def take(self, token: int) -> None:
        """The next token of the answer."""
        self.output.token_ids.append(token)
        if token in self.params.stop_token_ids:
            self.output.finish_reason, self.is_done = "stop", True
        if self.on_token is not None:
            self.on_token(self, token)

    def end_if_full(self) -> None:
        self.is_done |= len(self.output.token_ids) >= self.params.max_tokens
        if self.is_done:
            self._settle()

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """End before the answer is whole."""
        self.output.finish_reason, self.error, self.is_done = reason, error, True
        self._settle()

    def stop(self) -> None:
        """The answer ends with what is there; for whoever reads along and found a stop text."""
        if not self.is_done:
            self.end("stop")

    def _settle(self) -> None:
        self.usage.prompt_tokens, self.usage.completion_tokens = self.prompt_tokens, len(self.output.token_ids)
        self.usage.ttft_s = self.ledger.ttft_s or 0.0
        self.output.usage, self.output.ledger = self.usage, self.ledger.to_dict()


def phase(requests: Iterable[Request], name: str) -> AbstractContextManager[None]:
    """Book the time inside the block to those of these requests that wait for their first token; then nobody asks."""
    waiting = [request for request in requests if request.ledger.ttft_s is None]
    return _booked(waiting, name) if waiting else nullcontext()


@contextmanager
def _booked(requests: list[Request], name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(request.ledger.phase(name))
        yield
