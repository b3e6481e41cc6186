"""Engine: an unmodified Hugging Face decoder over the pager's pages. Steps of several sequences, prefill in chunks.

A step takes decodes first, then prompt chunks, under one token budget; where the device tier cannot hold a step, the step
shrinks; where it cannot hold one sequence, that sequence streams alone. A lost block costs computing it again and never
an answer. Invariant: before a forward, a sequence has at least one token that is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..kernels import write_kv
from ..pager.config import PagerConfig
from ..pager.lease import Span
from ..pager.pager import Pager, stored_block_size
from ..tiers.errors import BlockMissError, ConfigError, TierFullError, TierUnavailableError
from . import attention
from .attention import STEP, Step, layers_of
from .hf import ModelSpec, describe, discover, fingerprint
from .loading import load_checkpoint
from .request import Request, phase
from .sampling import Output, Sampler, SamplingParams, margin
from .session import Session

Progress = Callable[[int, int], None]
OnToken = Callable[[Request, int], None]
Work = list[tuple[Request, int]]
MAX_BATCH_TOKENS = 2048
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, SMALLEST_BLOCK_SIZE = 256, 64, 16
MIN_PAGES_WANTED = 32  # a smaller device tier gets smaller blocks
SPARE_MISSES = 16  # lost blocks per request beyond two for each of its blocks, before the disk is given up on


class Engine:
    """Open with `Engine.from_model` or `Engine.from_pretrained`."""

    def __init__(self, model: Any, spec: ModelSpec, pager: Pager, tokenizer: Any, max_batch_tokens: int) -> None:
        self.model, self.spec, self.pager, self.tokenizer = model, spec, pager, tokenizer
        self.progress: Progress | None = None
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._layers = layers_of(pager, spec, self._dtype)
        self._sessions: dict[str, Session] = {}
        self._budget = min(max_batch_tokens, pager.max_span_tokens())
        if self._budget < 1:
            raise ConfigError("device_bytes: the device tier is too small for a single step; give it more")
        attention.install(model)
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
    ) -> Engine:
        """Put a loaded Hugging Face decoder over a new pager.

        `block_size` is that of the store at config.nvme_path where there is one, else chosen from device and size.
        Raises: UnsupportedModelError, ConfigError; nothing is written before all checks have passed.
        """
        config.validate()
        spec = discover(model)
        size = block_size or stored_block_size(config.nvme_path) or _default_block_size(model, spec, config)
        pager = Pager.open(spec.layouts(size), config, model_fingerprint=fingerprint(model), about=describe(model))
        try:
            return cls(model, spec, pager, tokenizer, max_batch_tokens)
        except BaseException:
            pager.close()
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
        for prompt in prompts:
            self.check_length(len(prompt) + params.max_tokens)
        firsts: list[Request] = []
        try:
            for prompt in prompts:
                firsts.append(self._begin(list(prompt), params, namespace))
            self.run(firsts)
        finally:
            for request in (r for first in firsts for r in (first, *first.twins)):
                if request.seq >= 0:
                    self.pager.finish(request.seq)
        return [request.output for first in firsts for request in (first, *first.twins)]

    def session(self, session_id: str, namespace: str = "default") -> Session:
        """A conversation by id: the running one, else the parked one resumed, else a new one.

        Raises ConfigError when the id belongs to another namespace.
        """
        known = self._sessions.get(session_id)
        if known is not None and known.is_open:
            if known.namespace != namespace:
                raise ConfigError(f"session {session_id!r} is open in namespace {known.namespace!r}, not {namespace!r}")
            return known.resume()
        self._sessions[session_id] = session = Session.open(self, session_id, namespace)
        return session

    def has_session(self, session_id: str) -> bool:
        """Whether the id is taken, by an open session or a parked one."""
        known = self._sessions.get(session_id)
        return (known is not None and known.is_open) or session_id in self.pager.sessions()

    def add_session(self, session: Session) -> None:
        """Know a session that was made by forking."""
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

    def _begin(self, prompt: list[int], params: SamplingParams, namespace: str) -> Request:
        seq = self.pager.begin(namespace)
        request = Request(seq, params, Sampler(params), len(prompt), 0)
        with request.ledger.phase("match"):
            match = self.pager.attach(seq, prompt[:-1])
            self.pager.append(seq, prompt[match.tokens :])
        request.found(match)
        request.known_tokens = match.tokens + match.ghost_tokens
        request.twins = [Request(-1, params, Sampler(params, i), len(prompt), 0) for i in range(1, params.n)]
        return request

    def continue_request(
        self, seq: int, num_new: int, params: SamplingParams, rng_state: bytes | None = None
    ) -> Request:
        """A request over a sequence that exists already and has new tokens appended (a session's turn).

        `rng_state` is where an earlier turn's random numbers stopped.
        """
        total = self.pager.num_tokens(seq)
        request = Request(seq, params, Sampler(params, state=rng_state), total, max(0, total - num_new - 1))
        request.found(self.pager.residency(seq))
        return request

    @torch.inference_mode()
    def run(self, requests: Iterable[Request], on_token: OnToken | None = None) -> None:
        """Step until every request is done. Raises TierUnavailableError when blocks are lost again and again."""
        running = [r for r in requests if not r.is_done]
        while running:
            work = self._plan(running)
            busy = {id(request) for request, _ in work}
            with phase((r for r in running if id(r) not in busy), "queued"):
                self._step_shrinking(work, on_token)
            if self.progress is not None:
                totals = [(self.pager.num_computed(r.seq), self.pager.num_tokens(r.seq)) for r in running]
                self.progress(sum(done for done, _ in totals), sum(total for _, total in totals))
            running += [twin for r in running for twin in r.twins if twin.seq >= 0 and twin not in running]
            running = [r for r in running if not r.is_done]

    def _plan(self, running: list[Request]) -> Work:
        """Decodes first, then prompt chunks in order, within the budget."""
        left, work = self._budget, []
        remaining = {id(r): self.pager.num_tokens(r.seq) - self.pager.num_computed(r.seq) for r in running}
        for request in sorted(running, key=lambda r: remaining[id(r)] > 1):
            if left <= 0:
                break
            take = 1 if remaining[id(request)] == 1 else self.pager.plan_prefill(request.seq, left)
            if take > 0:
                work.append((request, take))
                left -= take
        return work

    def _step_shrinking(self, work: Work, on_token: OnToken | None) -> None:
        """Run one step over as much of the work as the device tier can hold."""
        while True:
            try:
                self._step(work, on_token)
                return
            except BlockMissError as error:
                self._count_miss(next(r for r, _ in work if r.seq == error.seq), error)
                return  # the pager has cut the sequence; the next plan computes what is missing
            except TierFullError:
                if len(work) > 1:
                    work = work[: len(work) // 2]
                elif work[0][1] > 1:
                    work = [(work[0][0], work[0][1] // 2)]
                else:
                    raise

    def _count_miss(self, request: Request, error: BlockMissError) -> None:
        request.num_misses += 1
        limit = SPARE_MISSES + 2 * self.pager.num_tokens(request.seq) // self.pager.block_size
        if request.num_misses > limit:
            raise TierUnavailableError(
                f"sequence {request.seq} lost a block {request.num_misses} times; the store keeps losing what is "
                "written to it: check the disk under nvme_path"
            ) from error

    def _step(self, work: Work, on_token: OnToken | None) -> None:
        starts = [self.pager.num_computed(request.seq) for request, _ in work]
        spans = [Span(r.seq, start, start + count) for (r, count), start in zip(work, starts, strict=True)]
        reading = [i for i, span in enumerate(spans) if span.end == self.pager.num_tokens(span.seq)]
        requests = [request for request, _ in work]
        with phase(requests, "wait_for_blocks"):
            lease = self.pager.lease(spans)
        with lease:
            with phase(requests, "decode" if all(count == 1 for _, count in work) else "prefill"):
                logits = self._forward(lease, spans, reading)
            lease.commit()
        for request, span in zip(requests, spans, strict=True):
            request.computed(span.start, span.end)
        for row, index in enumerate(reading):
            self._take_token(requests[index], logits[row], on_token)

    def _forward(self, lease: Any, spans: list[Span], reading: list[int]) -> Tensor:
        """Logits [len(reading), vocab] of the last row of the spans in `reading`."""
        tokens = torch.tensor([t for s in spans for t in self.pager.token_ids(s.seq, s.start, s.end)])[None]
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans])[None]
        step = Step(lease, self.spec, self._layers, self.pager.block_size, self._dtype, reading)
        keep = step.rows if reading else torch.tensor([0])
        token = STEP.set(step)
        try:
            out = self.model(
                input_ids=tokens.to(self._device),
                position_ids=positions.to(self._device),
                attention_mask=None,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=keep.to(self._device),
            )
        finally:
            STEP.reset(token)
        return out.logits[0]

    def _take_token(self, request: Request, logits: Tensor, on_token: OnToken | None) -> None:
        """Sample from logits [vocab] for the request, and at its first token for its twins."""
        first = [twin for twin in request.twins if twin.seq < 0]
        for twin in first:
            twin.seq, twin.known_tokens = self.pager.fork(request.seq), request.known_tokens
        for one in (request, *first):
            one.ledger.first_token()
            if one.params.max_tokens > 0:
                token = one.sampler.choose(logits)
                if one.params.top2_margin:
                    one.output.margins.append(margin(logits))
                self.pager.append(one.seq, [token])
                one.take(token)
                if on_token is not None:
                    on_token(one, token)
            one.end_if_full()

    # ------------------------------------------------------------------ prebuilt caches
    @torch.inference_mode()
    def inject(self, seq: int, cache: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write the K/V of the sequence's uncomputed tokens from a prebuilt cache instead of computing them.

        Shapes: per layer K [kv_heads, tokens, head_dim], V [kv_heads, tokens, value_dim], over all tokens of the sequence.
        """
        total = int(cache[0][0].shape[1])
        while (start := self.pager.num_computed(seq)) < total:
            end = min(total, start + self._budget)
            with self.pager.lease([Span(seq, start, end)]) as lease:
                for pages, (k, v) in zip(self._layers, cache, strict=True):
                    new_k, new_v = (t[:, start:end].transpose(0, 1) for t in (k, v))
                    write_kv(new_k, new_v, pages.k, pages.v, lease.slots[pages.group])
                lease.commit()
            if self.progress is not None:
                self.progress(end, total)

    # ------------------------------------------------------------------ end
    def close(self) -> None:
        """End the pager and give the model its own attention back. Parked sessions stay in the store."""
        if not self._is_closed:
            self._is_closed = True
            attention.uninstall(self.model)
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
