"""Request: one sequence being generated, and what it is charged for: waiting, computing, and computing again.

A token counts as recomputed when its place had been computed before (by this session, or by someone whose block was
since evicted), and is computed now. So a lost block that is found again elsewhere costs nothing, on the books as in fact.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ..pager.ledger import RequestLedger
from ..pager.prefix import Match
from .sampling import Output, Sampler, SamplingParams, Usage


@dataclass(slots=True)
class Request:
    """One sequence being generated. `twins` share its prompt and get their own sequences at its first token."""

    seq: int
    params: SamplingParams
    sampler: Sampler
    prompt_tokens: int
    known_tokens: int  # the first so many had been computed before this request came
    usage: Usage = field(default_factory=Usage)
    ledger: RequestLedger = field(default_factory=lambda: RequestLedger(time.perf_counter))
    output: Output = field(default_factory=Output)
    twins: list[Request] = field(default_factory=list)
    num_misses: int = 0
    is_done: bool = False

    def found(self, match: Match) -> None:
        """Book what the cache held when the request came."""
        self.usage.cached_tokens = match.tokens
        self.usage.device_tokens, self.usage.host_tokens = match.device_tokens, match.host_tokens
        self.usage.disk_tokens = match.nvme_tokens

    def computed(self, start: int, end: int) -> None:
        """Tokens [start, end) have just been computed."""
        self.usage.recomputed_tokens += max(0, min(end, self.known_tokens) - start)
        self.known_tokens = max(self.known_tokens, end)

    def take(self, token: int) -> None:
        """The next token of the answer."""
        self.output.token_ids.append(token)
        if token in self.params.stop_token_ids:
            self.output.finish_reason, self.is_done = "stop", True

    def end_if_full(self) -> None:
        self.is_done |= len(self.output.token_ids) >= self.params.max_tokens
        if self.is_done:
            self.usage.prompt_tokens, self.usage.completion_tokens = self.prompt_tokens, len(self.output.token_ids)
            self.usage.ttft_s = self.ledger.ttft_s or 0.0
            self.output.usage, self.output.ledger = self.usage, self.ledger.to_dict()


@contextmanager
def phase(requests: Iterable[Request], name: str) -> Iterator[None]:
    """Book the time inside the block to every one of these requests."""
    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(request.ledger.phase(name))
        yield
