"""Engine: an unmodified Hugging Face decoder over the pager's pages. Runs what its scheduler plans, step by step.

Where the device tier cannot hold a step after all, the step shrinks; where it cannot hold one sequence, that sequence
streams alone; where no tier has room, somebody waits. A lost block costs computing it again and never an answer.
Invariant: before a forward, a sequence has at least one token that is not computed. One thread runs an engine: its
caller's, or that of an EngineLoop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from torch import Tensor

from ..pager.client.remote import block_size_at
from ..pager.config import PagerConfig
from ..pager.lease import Span
from ..pager.pager import Pager, open_pager, stored_block_size
from ..tiers.errors import BlockMissError, ConfigError, TierFullError, TierUnavailableError
from .beam import BeamGroup
from .hf import ModelSpec, StreamingWindow, describe, discover, fingerprint
from .loading import load_checkpoint
from .request import Request, phase
from .runner import ModelRunner, Progress
from .sampling import Output, Sampler, SamplingParams
from .scheduler import Scheduler, SchedulerLimits, Work
from .session import Session
from .speculative import Drafter, ModelDrafter, NgramDrafter

MAX_BATCH_TOKENS = 2048
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, SMALLEST_BLOCK_SIZE = 256, 64, 16
MIN_PAGES_WANTED = 32  # a smaller device tier gets smaller blocks
SPARE_MISSES = 16  # lost blocks per request beyond two for each of its blocks, before the disk is given up on


class Engine:
    """Open with `Engine.from_model` or `Engine.from_pretrained`."""

    def __init__(
        self,
        model: Any,
        spec: ModelSpec,
        pager: Pager,
        tokenizer: Any,
        max_batch_tokens: int,
        limits: SchedulerLimits | None = None,
        draft: Engine | None = None,
    ) -> None:
        self.model, self.spec, self.pager, self.tokenizer = model, spec, pager, tokenizer
        self.progress: Progress | None = None
        self._sessions: dict[str, Session] = {}
        budget = min(max_batch_tokens, pager.max_span_tokens())
        if budget < 1:
            raise ConfigError("device_bytes: the device tier is too small for a single step; give it more")
        self.scheduler = Scheduler(pager, budget, limits)
        self._draft = draft
        self._runner = ModelRunner(model, spec, pager)
        self._is_closed = False

    @classmethod
    def from_model(
        cls,
        model: Any,
        config: PagerConfig,
        tokenizer: Any = None,
        *,
        block_size: int | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        limits: SchedulerLimits | None = None,
        draft: Engine | None = None,
        streaming: StreamingWindow | None = None,
        pager: str | None = None,
    ) -> Engine:
        """Put a loaded Hugging Face decoder over a new pager.

        `pager` is the address of a daemon (unix:///run/kvtier/pagerd.sock) whose memory is shared with its other clients.

        `block_size` is that of the store at config.nvme_path or of the daemon where there is one, else chosen from device and
        size.
        `draft` is an engine of a smaller model with the same vocabulary, for SamplingParams(speculation="model").
        `streaming` gives full-attention layers a window and sinks, for texts without end.
        Raises: UnsupportedModelError, ConfigError; nothing is written before all checks have passed.
        """
        config.validate()
        spec = discover(model) if streaming is None else discover(model).streamed(streaming)
        named = fingerprint(model)
        stored = stored_block_size(config.nvme_path) if pager is None else block_size_at(pager, named)
        layouts = spec.layouts(block_size or stored or _default_block_size(model, spec, config))
        opened = open_pager(pager, layouts, config, model_fingerprint=named, about=describe(model))
        try:
            return cls(model, spec, opened, tokenizer, max_batch_tokens, limits, draft)
        except BaseException:
            opened.close()
            raise

    @classmethod
    def from_pretrained(
        cls, path: str, config: PagerConfig, *, dtype: str = "auto", device: str | None = None, **options: Any
    ) -> Engine:
        """Load a local checkpoint, and its tokenizer where it has one. `options` are those of from_model.

        Raises: ConfigError when there is no checkpoint at that path or the dtype is unknown; otherwise as from_model.
        """
        config.validate()
        model, tokenizer = load_checkpoint(path, dtype, device)
        return cls.from_model(model, config, tokenizer, **options)

    # ------------------------------------------------------------------ generating
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None, *, namespace: str = "default"
    ) -> list[Output]:
        """Generate for all prompts together; params.n outputs for each, in order. Prefixes are reused from the cache.

        The n outputs of a prompt compute it once: the others are forks of it.
        """
        params = params or SamplingParams()
        firsts: list[Request] = []
        try:
            for prompt in prompts:
                firsts.append(self.request(prompt, params, namespace))
            self.run(firsts)
        finally:
            for request in firsts:
                self.drop(request)
        return [request.output for first in firsts for request in (first, *first.twins)]

    def session(self, session_id: str, namespace: str = "default") -> Session:
        """A conversation by id: the running one, else the parked one resumed, else a new one.

        Raises ConfigError when the id belongs to another namespace.
        """
        known = self.open_session(session_id)
        if known is not None:
            if known.namespace != namespace:
                raise ConfigError(f"session {session_id!r} is open in namespace {known.namespace!r}, not {namespace!r}")
            return known.resume()
        self._sessions[session_id] = session = Session.open(self, session_id, namespace)
        return session

    def has_session(self, session_id: str) -> bool:
        """Whether the id is taken, by an open session or a parked one."""
        return self.open_session(session_id) is not None or session_id in self.pager.sessions()

    def open_session(self, session_id: str) -> Session | None:
        """The session of that id if it is open here, parked or not."""
        known = self._sessions.get(session_id)
        return known if known is not None and known.is_open else None

    def add_session(self, session: Session) -> None:
        """Know a session that was made elsewhere."""
        self._sessions[session.id] = session

    def check_length(self, num_tokens: int) -> None:
        """Raises ConfigError for a context that all tiers together cannot hold."""
        capacity = self.pager.capacity_tokens()
        if num_tokens > capacity:
            raise ConfigError(
                f"a context of {num_tokens} tokens is longer than all tiers together hold ({capacity} tokens); raise "
                "nvme_bytes, host_bytes or device_bytes"
            )
        if num_tokens < 1:
            raise ConfigError("a prompt needs at least one token")

    def request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        namespace: str = "default",
        *,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """A request over a new sequence. `run` it or give it to the scheduler; one that never ran has to be dropped.

        Raises: ConfigError for a prompt that is empty or too long.
        """
        self.check_length(len(prompt) + params.max_tokens)
        drafter = self._drafter(params, namespace)
        seq = self.pager.begin(namespace)
        self.pager.append(seq, list(prompt))
        request = Request(seq, params, Sampler(params), len(prompt), namespace=namespace, drafter=drafter)
        request.priority, request.deadline_s = priority, deadline_s
        request.twins = [
            Request(-1, params, Sampler(params, i), len(prompt), namespace=namespace, priority=priority)
            for i in range(1, params.n)
        ]
        if params.num_beams > 1:
            BeamGroup(request)
        return request

    def drop(self, request: Request) -> None:
        """Give back what a request and its twins hold; their blocks stay as cache. Those that ended need it no more."""
        for one in (request, *request.twins):
            self._free(one)

    def _free(self, request: Request) -> None:
        if request.drafter is not None:
            request.drafter.close()
            request.drafter = None
        if request.seq >= 0 and not request.keeps_sequence:
            self.pager.finish(request.seq)
            request.seq = -1

    def _drafter(self, params: SamplingParams, namespace: str) -> Drafter | None:
        if params.speculation == "ngram":
            return NgramDrafter(self.pager)
        if params.speculation == "model":
            if self._draft is None:
                raise ConfigError("speculation='model' needs an engine with a draft model; open it with draft=...")
            return ModelDrafter(self.pager, self._draft, namespace)
        return None

    def continue_request(
        self, seq: int, num_new: int, params: SamplingParams, rng_state: bytes | None = None
    ) -> Request:
        """A request over a sequence that exists already and has new tokens appended (a session's turn).

        `rng_state` is where an earlier turn's random numbers stopped.
        """
        total = self.pager.num_tokens(seq)
        request = Request(seq, params, Sampler(params, state=rng_state), total, max(0, total - num_new - 1))
        request.keeps_sequence, request.namespace = True, self.pager.namespace(seq)
        request.drafter = self._drafter(params, request.namespace)
        request.found(self.pager.residency(seq))
        return request

    def run(self, requests: Iterable[Request]) -> None:
        """Step until all of these are done. Raises TierUnavailableError when blocks are lost again and again."""
        wanted = [r for r in requests if not r.is_done]
        for request in wanted:
            self.scheduler.add(request)
        try:
            while not all(r.is_done for first in wanted for r in (first, *first.twins)):
                self.step()
                self._report(wanted)
        finally:
            for request in (r for first in wanted for r in (first, *first.twins)):
                request.is_cancelled |= not request.is_done
            self.settle_ended()
        for request in wanted:
            if request.error is not None:
                raise request.error

    def step(self) -> list[Request]:
        """Run one step, if there is anything to run. Returns the requests that ended since the last one."""
        ended = self.settle_ended()
        with phase(list(self.scheduler.requests()), "schedule"):
            work = self.scheduler.plan()
        if work:
            busy = {id(request) for request, _ in work}
            with phase((r for r in self.scheduler.requests() if id(r) not in busy), "queued"):
                self._step_shrinking(work)
        return ended + self.settle_ended()

    def settle_ended(self) -> list[Request]:
        """Give back what requests held that are done, cancelled or late, without running anything. Returns them."""
        ended: list[Request] = []
        while found := self.scheduler.take_ended():  # the end of one beam is that of the others
            for request in found:
                self._settle(request)
            ended += found
        return ended

    def _settle(self, request: Request) -> None:
        """After its last step: give back what it held, end the twins that never began, say so."""
        self._remember(request)
        self._free(request)
        if request.beams is not None:
            request.beams.give_up(request)
        for twin in request.twins:
            if twin.seq < 0 and not twin.is_done:
                twin.end(request.output.finish_reason, request.error)
        if request.on_end is not None:
            request.on_end(request)

    def _remember(self, request: Request) -> None:
        """Where its time to first token went, for whoever asks later."""
        if request.seq >= 0:
            self.pager.note_request(
                request.seq,
                name=request.name,
                age_s=request.ledger.age_s,
                outcome=request.output.finish_reason or "",
                lines_s=request.ledger.to_dict(),
                usage={name: float(value) for name, value in asdict(request.usage).items()}
                | {"prefill_s_per_token": self.scheduler.prefill_s_per_token},
            )

    def extend(self, seq: int, limit: int) -> list[int]:
        """Greedily continue a sequence by at most `limit` tokens, its uncomputed ones first. For drafting."""
        request = self.continue_request(seq, 0, SamplingParams(max_tokens=limit))
        self.run([request])
        return request.output.token_ids

    def _report(self, wanted: list[Request]) -> None:
        if self.progress is not None:
            totals = [self._progress_of(request) for request in wanted]
            self.progress(sum(done for done, _ in totals), sum(total for _, total in totals))

    def _progress_of(self, request: Request) -> tuple[int, int]:
        if request.seq >= 0:
            return self.pager.num_computed(request.seq), self.pager.num_tokens(request.seq)
        total = request.prompt_tokens + len(request.output.token_ids)
        return total, total

    # ------------------------------------------------------------------ one step
    def _step_shrinking(self, work: Work) -> None:
        """Run one step over as much of the work as the device tier can hold."""
        while True:
            try:
                self._step(work)
                return
            except BlockMissError as error:
                self._undraft(work)
                self._count_miss(next(r for r, _ in work if r.seq == error.seq), error)
                return  # the pager has cut the sequence; the next plan computes what is missing
            except TierFullError as error:
                if any(request.draft for request, _ in work):
                    self._undraft(work)
                    work = [(request, 1 if self._is_decode(request) else count) for request, count in work]
                elif len(work) > 1:
                    work = work[: len(work) // 2]
                elif work[0][1] > 1:
                    work = [(work[0][0], work[0][1] // 2)]
                elif not self.scheduler.relieve(work[0][0]):
                    work[0][0].end("error", error)
                    return

    def _is_decode(self, request: Request) -> bool:
        return self.pager.num_tokens(request.seq) - self.pager.num_computed(request.seq) == 1

    def _undraft(self, work: Work) -> None:
        for request, _ in work:
            self.scheduler.undraft(request)

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

    def _step(self, work: Work) -> None:
        starts = [self.pager.num_computed(request.seq) for request, _ in work]
        spans = [Span(r.seq, start, start + count) for (r, count), start in zip(work, starts, strict=True)]
        reads = [
            (i, 1 + len(request.draft))
            for i, ((request, _), span) in enumerate(zip(work, spans, strict=True))
            if span.end == self.pager.num_tokens(span.seq)
        ]
        requests = [request for request, _ in work]
        with phase(requests, "wait_for_blocks"):
            lease = self.pager.lease(spans)
        started_s = time.perf_counter()
        with phase(requests, "decode" if all(count == 1 for _, count in work) else "prefill"), lease:
            logits = self._runner.forward(lease, spans, reads)
            lease.commit()
        self.scheduler.ran(work, time.perf_counter() - started_s)
        with phase(requests, "sample"):
            for request, span in zip(requests, spans, strict=True):
                request.computed(span.start, span.end)
            row = 0
            for index, count in reads:
                self._take_tokens(requests[index], logits[row : row + count])
                row += count

    def _take_tokens(self, request: Request, logits: Tensor) -> None:
        """Sample for the request from logits [1 + drafted tokens, vocab], and at its first token for its twins."""
        if request.on_prompt is not None and request.ledger.ttft_s is None:
            request.on_prompt(request)
        request.ledger.first_token()
        if request.beams is not None:
            request.beams.offer(self, request, logits[0])
            return
        for twin in request.twins:
            if twin.seq < 0:
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
        twin.drafter = self._drafter(twin.params, twin.namespace)
        twin.on_token = twin.on_token or first.on_token
        self.scheduler.add_twin(first, twin)
        twin.ledger.first_token()
        if twin.params.max_tokens > 0:
            self.pager.append(twin.seq, [self._choose(twin, logits)])
        else:
            twin.end_if_full()

    # ------------------------------------------------------------------ prebuilt caches
    def inject(self, seq: int, cache: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write the K/V of the sequence's uncomputed tokens from a prebuilt cache; see ModelRunner.inject."""
        self._runner.inject(seq, cache, self.scheduler.budget, self.progress)

    # ------------------------------------------------------------------ end
    def close(self) -> None:
        """End the pager and give the model its own attention back. Parked sessions stay in the store."""
        if not self._is_closed:
            self._is_closed = True
            self._runner.close()
            self.pager.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _default_block_size(model: Any, spec: ModelSpec, config: PagerConfig) -> int:
    """256 tokens on a CPU, 64 on a GPU; halved while the device tier would hold too few blocks to page well."""
    size = GPU_BLOCK_SIZE if next(model.parameters()).is_cuda else CPU_BLOCK_SIZE
    token_bytes = sum(layout.token_bytes for layout in spec.layouts(SMALLEST_BLOCK_SIZE))
    while size > SMALLEST_BLOCK_SIZE and config.device_size // (token_bytes * size) < MIN_PAGES_WANTED:
        size //= 2
    return size
