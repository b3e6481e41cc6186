"""Engine: an unmodified Hugging Face decoder over the pager's pages. Steps of several sequences, prefill in chunks.

A step takes decodes first, then prompt chunks, under one token budget; where the device tier cannot hold a step, the step
shrinks; where it cannot hold one sequence, that sequence streams alone. A lost block costs computing it again and never
an answer. Invariant: before a forward, a sequence has at least one token that is not computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..kernels import layer_views, write_kv
from ..pager.config import PagerConfig
from ..pager.lease import Span
from ..pager.ledger import RequestLedger
from ..pager.pager import Pager
from ..tiers.errors import BlockMissError, ConfigError, TierFullError
from . import attention
from .attention import STEP, Step, pools_of, typed
from .hf import ModelSpec, discover, fingerprint
from .sampling import Output, Sampler, SamplingParams, Usage, margin
from .session import Session

Progress = Callable[[int, int], None]
MAX_BATCH_TOKENS = 2048
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE, SMALLEST_BLOCK_SIZE = 256, 64, 16
MIN_PAGES_WANTED = 32  # a smaller device tier gets smaller blocks


@dataclass(slots=True)
class Request:
    """One sequence being generated."""

    seq: int
    params: SamplingParams
    sampler: Sampler
    ledger: RequestLedger
    usage: Usage
    output: Output = field(default_factory=Output)
    is_done: bool = False


class Engine:
    """Open with `Engine.from_model` or `Engine.from_pretrained`."""

    def __init__(self, model: Any, spec: ModelSpec, pager: Pager, tokenizer: Any, max_batch_tokens: int) -> None:
        self.model, self.spec, self.pager, self.tokenizer = model, spec, pager, tokenizer
        self.progress: Progress | None = None
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._pools = pools_of(pager, self._dtype)
        self._budget = min(max_batch_tokens, pager.max_span_tokens())
        if self._budget < 1:
            raise ConfigError("device_bytes: the device tier is too small for a single step; give it more")

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

        Raises: UnsupportedModelError, ConfigError; nothing is written before all checks have passed.
        """
        config.validate()
        spec = discover(model)
        layouts = spec.layouts(block_size or _default_block_size(model, spec, config))
        pager = Pager.open(layouts, config, model_fingerprint=fingerprint(model))
        attention.register()
        model.set_attn_implementation(attention.NAME)
        try:
            return cls(model, spec, pager, tokenizer, max_batch_tokens)
        except BaseException:
            pager.close()
            raise

    @classmethod
    def from_pretrained(cls, path: str, config: PagerConfig, **options: Any) -> Engine:
        """Load a local checkpoint and its tokenizer. Raises ConfigError when there is none at that path."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model path {path!r} cannot be loaded: {error}") from error
        return cls.from_model(model, config, tokenizer, **options)

    # ------------------------------------------------------------------ generating
    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None) -> list[Output]:
        """Generate for all prompts together; params.n outputs for each, in order. Prefixes are reused from the cache."""
        params = params or SamplingParams()
        for prompt in prompts:
            self.check_length(len(prompt) + params.max_tokens)
        requests: list[Request] = []
        try:
            for prompt in prompts:
                for index in range(params.n):
                    requests.append(self._begin(list(prompt), params, index))
            self.run(requests)
        finally:
            for request in requests:
                self.pager.finish(request.seq)
        return [request.output for request in requests]

    def session(self, session_id: str, namespace: str = "default") -> Session:
        """A conversation by id: resumed when it was parked, new otherwise."""
        return Session.open(self, session_id, namespace)

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

    def _begin(self, prompt: list[int], params: SamplingParams, index: int) -> Request:
        ledger = RequestLedger(time.perf_counter)
        with ledger.phase("match"):
            seq = self.pager.begin()
            match = self.pager.attach(seq, prompt[:-1])
            self.pager.append(seq, prompt[match.tokens :])
        usage = Usage(
            prompt_tokens=len(prompt),
            cached_tokens=match.tokens,
            device_tokens=match.device_tokens,
            host_tokens=match.host_tokens,
            disk_tokens=match.nvme_tokens,
            recomputed_tokens=match.ghost_tokens,
        )
        return Request(seq, params, Sampler(params, index), ledger, usage)

    def continue_request(self, seq: int, num_new: int, params: SamplingParams) -> Request:
        """A request over a sequence that exists already and has new tokens appended (a session's turn)."""
        ledger = RequestLedger(time.perf_counter)
        computed, total = self.pager.num_computed(seq), len(self.pager.token_ids(seq))
        usage = Usage(
            prompt_tokens=total, cached_tokens=computed, recomputed_tokens=max(0, total - num_new - 1 - computed)
        )
        return Request(seq, params, Sampler(params), ledger, usage)

    @torch.inference_mode()
    def run(self, requests: Iterable[Request], on_token: Callable[[Request, int], None] | None = None) -> None:
        """Step until every request is done."""
        running = [r for r in requests if not r.is_done]
        lost = self.pager.counters.get("lost_tokens")
        while running:
            work = self._plan(running)
            self._step_shrinking(work, on_token)
            if (now := self.pager.counters.get("lost_tokens")) != lost:
                work[0][0].usage.recomputed_tokens += int(now - lost)
                lost = now
            running = [r for r in running if not r.is_done]

    def _plan(self, running: list[Request]) -> list[tuple[Request, int]]:
        """Decodes first, then prompt chunks in order, within the budget."""
        left, work = self._budget, []
        remaining = {id(r): len(self.pager.token_ids(r.seq)) - self.pager.num_computed(r.seq) for r in running}
        for request in sorted(running, key=lambda r: remaining[id(r)] > 1):
            if left <= 0:
                break
            take = 1 if remaining[id(request)] == 1 else self.pager.plan_prefill(request.seq, left)
            if take > 0:
                work.append((request, take))
                left -= take
        return work

    def _step_shrinking(self, work: list[tuple[Request, int]], on_token: Callable[[Request, int], None] | None) -> None:
        """Run one step over as much of the work as the device tier can hold."""
        while True:
            try:
                self._step(work, on_token)
                return
            except BlockMissError:
                return  # the pager has cut the sequence; the next plan computes what is missing
            except TierFullError:
                if len(work) > 1:
                    work = work[: len(work) // 2]
                elif work[0][1] > 1:
                    work = [(work[0][0], work[0][1] // 2)]
                else:
                    raise

    def _step(self, work: list[tuple[Request, int]], on_token: Callable[[Request, int], None] | None) -> None:
        spans = []
        for request, count in work:
            start = self.pager.num_computed(request.seq)
            spans.append(Span(request.seq, start, start + count))
        ids = [self.pager.token_ids(span.seq) for span in spans]
        reading = [i for i, span in enumerate(spans) if span.end == len(ids[i])]
        ledger = work[0][0].ledger
        with ledger.phase("wait_for_blocks"):
            lease = self.pager.lease(spans)
        with lease:
            with ledger.phase("decode" if spans[0].end - spans[0].start == 1 else "prefill"):
                logits = self._forward(lease, spans, ids, reading)
            lease.commit()
        if self.progress is not None and len(spans) == 1:
            self.progress(spans[0].end, len(ids[0]))
        for row, index in enumerate(reading):
            self._take_token(work[index][0], logits[row], on_token)

    def _forward(self, lease: Any, spans: list[Span], ids: list[list[int]], reading: list[int]) -> Tensor:
        """Logits [len(reading), vocab] of the last row of the spans in `reading`."""
        tokens = torch.tensor([t for i, s in enumerate(spans) for t in ids[i][s.start : s.end]])[None]
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans])[None]
        step = Step(lease, self.spec, self._pools, self.pager.block_size, reading, self._row_view)
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

    def _row_view(self, group: int, rows: Any) -> Tensor:
        return typed(rows, self._dtype)

    def _take_token(self, request: Request, logits: Tensor, on_token: Callable[[Request, int], None] | None) -> None:
        request.ledger.first_token()
        params, out = request.params, request.output
        if params.max_tokens > 0:
            token = request.sampler.choose(logits)
            if params.top2_margin:
                out.margins.append(margin(logits))
            out.token_ids.append(token)
            self.pager.append(request.seq, [token])
            if on_token is not None:
                on_token(request, token)
            if token in params.stop_token_ids:
                out.finish_reason = "stop"
                request.is_done = True
        request.is_done |= len(out.token_ids) >= params.max_tokens
        if request.is_done:
            request.usage.completion_tokens = len(out.token_ids)
            request.usage.ttft_s = request.ledger.ttft_s or 0.0
            out.usage, out.ledger = request.usage, request.ledger.to_dict()

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
                for index, (group, layer) in enumerate(self.spec.group_of):
                    shape = self.spec.groups[group]
                    k, v = layer_views(
                        self._pools[group],
                        layer,
                        shape.num_kv_heads,
                        self.pager.block_size,
                        shape.head_dim,
                        shape.value_dim,
                    )
                    new_k, new_v = (t[:, start:end].transpose(0, 1) for t in cache[index])
                    write_kv(new_k, new_v, k, v, lease.slots[group])
                lease.commit()
            if self.progress is not None:
                self.progress(end, total)

    # ------------------------------------------------------------------ end
    def close(self) -> None:
        """End the pager. Parked sessions stay in its store."""
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
