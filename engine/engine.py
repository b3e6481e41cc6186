"""Engine: an unmodified Hugging Face decoder over the pager's pages. Opening, sessions, requests, and their ends.

The scheduler plans a step and the stepper runs it; here is who comes and who goes. Invariant: a request that ended has
given back what it held, whatever ended it. One thread runs an engine: its caller's, or that of an EngineLoop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from torch import Tensor

from ..kernels.tuning import current
from ..pager.client.remote import block_size_at
from ..pager.config import PagerConfig, with_changes
from ..pager.pager import Match, Pager, open_pager, stored_block_size
from ..pager.tier_formats import device_layouts, split_device
from ..tiers.errors import ConfigError
from .attending import Attention
from .beam import BeamGroup
from .hf import ModelSpec, StreamingWindow, describe, discover, fingerprint
from .loading import load_checkpoint
from .modes import EXACT, Modes
from .request import Request, phase
from .runner import ModelRunner, Progress
from .sampling import Output, Sampler, SamplingParams
from .scheduler import Scheduler, SchedulerLimits
from .session import Session
from .speculative import Drafters
from .stepping import Stepper

MAX_BATCH_TOKENS = 2048
SMALLEST_BLOCK_SIZE = 16
MIN_PAGES_WANTED = 32  # a smaller device tier gets smaller blocks
SELECTION_SHARE = 8  # 1/8 of the device tier for selected attention unless told otherwise


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
        attention: Attention = EXACT,
    ) -> None:
        self.model, self.spec, self.pager, self.tokenizer = model, spec, pager, tokenizer
        self.progress: Progress | None = None
        self._sessions: dict[str, Session] = {}
        budget = min(max_batch_tokens, pager.max_span_tokens())
        if budget < 1:
            raise ConfigError("device_bytes: the device tier is too small for a single step; give it more")
        self.scheduler = Scheduler(pager, budget, limits)
        self._drafters = Drafters(pager, draft)
        self._runner = ModelRunner(model, spec, pager)
        self._modes = Modes(pager, spec, next(model.parameters()).dtype)
        self.attention = attention
        self._modes.check(attention)
        self._stepper = Stepper(pager, self.scheduler, self._runner, self._modes, self._drafters)
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
        attention: Attention | str = "full",
        pager: str | None = None,
    ) -> Engine:
        """Put a loaded Hugging Face decoder over a new pager.

        `pager` is the address of a daemon (unix:///run/kvtier/pagerd.sock, or tls://host:port) whose memory is shared with
        its other clients.

        `block_size` is that of the store at config.nvme_path or of the daemon where there is one, else chosen from device and
        size.
        `draft` is an engine of a smaller model with the same vocabulary, for SamplingParams(speculation="model").
        `streaming` gives full-attention layers a window and sinks, for texts without end.
        `attention` is what requests use that ask for nothing else (attending.py); "select" takes an eighth of device_bytes
        for its own unless selection_bytes says how much.
        Raises: UnsupportedModelError, ConfigError; nothing is written before all checks have passed.
        """
        config.validate()
        config = _beside(model, config)
        attention = Attention.parse(attention)
        if attention.kind == "select" and not config.selection_size:
            config = with_changes(config, selection_bytes=config.device_size // SELECTION_SHARE)
        spec = discover(model) if streaming is None else discover(model).streamed(streaming)
        named = fingerprint(model)
        stored = stored_block_size(config.nvme_path) if pager is None else block_size_at(pager, named, config)
        size = block_size or stored or _default_block_size(model, spec, config)
        config, cut = split_device(config, spec.layouts(size))
        spec = spec.split(cut)
        layouts = device_layouts(config, spec.layouts(size))
        opened = open_pager(pager, layouts, config, model_fingerprint=named, about=describe(model))
        try:
            return cls(model, spec, opened, tokenizer, max_batch_tokens, limits, draft, attention)
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
        return self.open_session(session_id) is not None or self.pager.session(session_id) is not None

    def open_session(self, session_id: str) -> Session | None:
        """The session of that id if it is open here, parked or not."""
        return self._sessions.get(session_id)

    def add_session(self, session: Session) -> None:
        """Know a session that was made elsewhere."""
        self._sessions[session.id] = session

    def drop_session(self, session: Session) -> None:
        """Know a session that was closed no longer; another of its id stays."""
        if self._sessions.get(session.id) is session:
            del self._sessions[session.id]

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
        params = self._attending(params)
        drafter, sampler = self._drafters.make(params, namespace), Sampler(params)
        seq = self.pager.begin(namespace)
        self.pager.append(seq, list(prompt))
        request = Request(seq, params, sampler, len(prompt), namespace=namespace, drafter=drafter)
        request.priority, request.deadline_s = priority, deadline_s
        request.twins = [
            Request(-1, params, Sampler(params, i), len(prompt), namespace=namespace, priority=priority)
            for i in range(1, params.n)
        ]
        if params.num_beams > 1:
            BeamGroup(request)
        return request

    def check_params(self, params: SamplingParams) -> None:
        """Raises ConfigError for what this engine cannot do."""
        self._attending(params)
        self._drafters.check(params)

    def _attending(self, params: SamplingParams) -> SamplingParams:
        """With the engine's own attention where the request asks for none. Raises ConfigError."""
        if params.attention is not None:
            self._modes.check(params.attention)
            return params
        return params if self.attention.is_exact else replace(params, attention=self.attention)

    def drop(self, request: Request) -> None:
        """Give back what a request and its twins hold; their blocks stay as cache. Those that ended need it no more."""
        for one in (request, *request.twins):
            self._free(one)

    def _free(self, request: Request) -> None:
        if request.drafter is not None:
            request.drafter.close()
            request.drafter = None
        if request.seq >= 0 and not request.keeps_sequence:
            end = self.pager.release if request.is_last else self.pager.finish
            end(request.seq)
            request.seq = -1

    def continue_request(
        self,
        seq: int,
        num_new: int,
        params: SamplingParams,
        rng_state: bytes | None = None,
        match: Match | None = None,
    ) -> Request:
        """A request over a sequence that exists already and has new tokens appended (a session's turn).

        `rng_state` is where an earlier turn's random numbers stopped, `match` what the cache held when the turn came
        (else what it holds now).
        """
        total, params = self.pager.num_tokens(seq), self._attending(params)
        request = Request(seq, params, Sampler(params, state=rng_state), total, max(0, total - num_new - 1))
        request.keeps_sequence, request.namespace = True, self.pager.namespace(seq)
        request.drafter = self._drafters.make(params, request.namespace)
        request.found(match or self.pager.residency(seq))
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
                self._stepper.run(work)
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
            if twin.seq < 0 and not twin.is_done:  # the scheduler has never heard of it
                twin.end(request.output.finish_reason, request.error)
                if twin.on_end is not None:
                    twin.on_end(twin)
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


def _beside(model: Any, config: PagerConfig) -> PagerConfig:
    """The configuration with its backend chosen: pages lie where the model is, also on a machine that has a GPU besides.

    Raises: ConfigError for a backend of another kind of device.
    """
    device = next(model.parameters()).device
    kind = "cuda" if device.type == "cuda" else "cpu"
    if config.backend not in ("auto", kind):
        raise ConfigError(
            f"backend={config.backend!r}: the model is on {str(device)!r} and attends to pages where it is; leave backend "
            "at 'auto', or move the model"
        )
    return with_changes(config, backend=kind)


def _default_block_size(model: Any, spec: ModelSpec, config: PagerConfig) -> int:
    """As the kernels like it (256 tokens on a CPU, 64 on a GPU); halved while the device tier would hold too few blocks."""
    size = current("cuda" if next(model.parameters()).is_cuda else "cpu").block
    token_bytes = sum(layout.token_bytes for layout in spec.layouts(SMALLEST_BLOCK_SIZE))
    while size > SMALLEST_BLOCK_SIZE and config.device_size // (token_bytes * size) < MIN_PAGES_WANTED:
        size //= 2
    return size
