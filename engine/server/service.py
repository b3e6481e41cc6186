"""Service: one engine loop and all that the endpoints share. Turns requests into submissions and answers into usage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...pager.keys import salted
from ...tiers.errors import ConfigError, QueueFullError
from ..attending import Attention
from ..conversations import Conversations
from ..engine import Engine
from ..loop import EngineLoop, Submission
from ..request import Request
from ..sampling import SamplingParams
from ..template import end_tokens
from .answers import Answers, Ended
from .bodies import ChatRequest, CompletionRequest, Sampling, unsupported
from .errors import ApiError, bad
from .gate import REQUEST_ID, Gate
from .histories import Histories
from .metrics import Metrics
from .pins import Pin, Pins
from .prompts import SECONDS, Kept, Prompt, PromptReader
from .replies import KvTierUsage, PromptTokens, ReuseBreakReply, UsageReply
from .settings import ServerSettings
from .text import TextStream
from .token_bytes import TokenBytes

T = TypeVar("T")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
TEXT_THREADS, WAITING_THREADS = 2, 32


@dataclass(frozen=True, slots=True)
class Urgency:
    """Of a request: higher goes first in our scheduler, and nobody may ask for more than others have."""

    priority: int
    timeout_s: float | None


@dataclass(slots=True)
class Asked:
    """One generating request on its way, for usage and metrics."""

    endpoint: str
    namespace: str  # with the salt
    owner: str
    params: SamplingParams
    prompts: Sequence[Prompt]
    answers: Answers
    urgency: Urgency
    started_s: float = field(default_factory=time.monotonic)
    name: str = field(default_factory=REQUEST_ID.get)
    history_key: str | None = None
    pins: list[Pin] = field(default_factory=list)
    reuse_break: ReuseBreakReply | None = None

    @property
    def wants_pins(self) -> bool:
        return any(prompt.kept for prompt in self.prompts)

    @property
    def ends(self) -> list[Ended]:
        """Of all outputs, in order; once they are complete."""
        return [self.answers.ends[i] for i in sorted(self.answers.ends)]


class Service:
    """Owns loop, conversations and pins; the engine itself belongs to whoever opened it."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        if engine.tokenizer is None:
            raise ConfigError("the model has no tokenizer; a server needs one saved beside the weights")
        self.engine, self.settings, self.tokenizer = engine, settings, engine.tokenizer
        self.created_s = int(time.time())
        self.max_context = _max_context(engine, settings)
        self.gate = Gate(settings.max_concurrency)
        self.reader = PromptReader(engine.tokenizer, engine.model.get_input_embeddings().num_embeddings)
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.ends = end_tokens(engine.model, engine.tokenizer)
        self.pins = Pins(engine.pager, int(engine.pager.capacity_tokens() * settings.pinned_share), time.monotonic)
        self._text = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="kvtier-text")
        self._waiting = ThreadPoolExecutor(WAITING_THREADS, thread_name_prefix="kvtier-waiting")
        self.histories = Histories(engine.tokenizer)
        self.loop = EngineLoop(engine)
        self.conversations = Conversations(self.loop, idle_s=settings.idle_s)
        self.metrics = Metrics(self)

    # ------------------------------------------------------------------ running things elsewhere
    async def on_text_thread(self, fn: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._text, fn, *arguments)

    async def on_waiting_thread(self, fn: Callable[[], T]) -> T:
        """For what may wait for a step or a disk."""
        return await asyncio.get_running_loop().run_in_executor(self._waiting, fn)

    async def on_engine(self, fn: Callable[[Engine], T]) -> T:
        return await asyncio.wrap_future(self.loop.call(fn))

    # ------------------------------------------------------------------ what a request asks for
    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"model {name!r} is not served here; use {self.settings.model_name!r} (GET /v1/models)",
                param="model",
                code="model_not_found",
            )

    def params(self, body: Sampling, num_tokens: int, *, known_tokens: int = 0) -> SamplingParams:
        """Checked against the model's context. Raises: ApiError, ConfigError."""
        field = unsupported(body)
        if field is not None:
            raise bad(f"{field} is not supported and would change the answer; leave it out", field, "unsupported")
        limit = self._max_tokens(body, self.max_context - known_tokens - num_tokens)
        if known_tokens + num_tokens + limit > self.max_context:
            raise bad(
                f"{known_tokens + num_tokens} tokens of prompt and {limit} of answer are more than the context of "
                f"{self.max_context}; shorten the prompt or lower max_tokens",
                "prompt" if isinstance(body, CompletionRequest) else "messages",
                "context_length_exceeded",
            )
        logprobs = body.logprobs if isinstance(body, CompletionRequest) else None
        if isinstance(body, ChatRequest):
            if body.top_logprobs is not None and not body.logprobs:
                raise bad("top_logprobs needs logprobs: true", "top_logprobs")
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return SamplingParams(
            max_tokens=limit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            seed=None if body.seed is None else body.seed % (1 << 62),
            n=body.n or 1,
            stop_token_ids=self.ends,
            logprobs=logprobs,
            attention=None if body.attention is None else Attention.parse(body.attention),
        )

    def _max_tokens(self, body: Sampling, left: int) -> int:
        limit = given_limit(body)
        if limit is not None:
            return limit
        return max(left, 1) if isinstance(body, ChatRequest) else min(DEFAULT_COMPLETION_TOKENS, max(left, 1))

    def urgency(self, body: Sampling | None = None) -> Urgency:
        """Of the wire a lower number goes first, and no time is longer than the server's."""
        priority, asked_s = (0, None) if body is None else (body.priority or 0, body.timeout_s)
        times_s = [one for one in (asked_s, self.settings.request_timeout_s) if one is not None]
        return Urgency(-priority, min(times_s, default=None))

    def kept_of(self, body: Sampling, prompt: Prompt) -> Prompt:
        """With prompt_cache_retention: all of it is kept. With end_of_session: what is not kept is given up."""
        kept = prompt.kept
        if body.prompt_cache_retention == "24h":
            kept = (*kept, Kept(len(prompt.token_ids), SECONDS["24h"]))
        return Prompt(prompt.token_ids, kept, is_last=bool(body.end_of_session))

    # ------------------------------------------------------------------ generating
    async def generate(
        self,
        endpoint: str,
        owner: str,
        salt: str | None,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        stops: Sequence[str] = (),
        is_continued: bool = False,
        urgency: Urgency | None = None,
    ) -> Asked:
        """Submit prompts, n outputs each. `is_continued`: the answer goes on within the prompt's last word.

        Raises what the engine refuses with. Until `deltas` is iterated, whoever called has to cancel on failure.
        """
        contexts = [prompt.token_ids if is_continued else () for prompt in prompts for _ in range(params.n)]
        answers = Answers([TextStream(self.tokenizer, stops, frozenset(self.ends), c) for c in contexts])
        namespace = owner if salt is None else salted(owner, salt)
        asked = Asked(endpoint, namespace, owner, params, prompts, answers, urgency or self.urgency())
        starting: list[Future[Submission]] = []
        try:
            for i, prompt in enumerate(prompts):
                starting.append(self._start(asked, prompt, i * params.n))
                answers.add(starting[-1])
            await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(one)) for one in starting))
        except BaseException:
            answers.cancel()
            raise
        return asked

    def _start(self, asked: Asked, prompt: Prompt, first: int) -> Future[Submission]:
        def make(engine: Engine) -> Request:
            request = engine.request(prompt.token_ids, asked.params, asked.namespace, priority=asked.urgency.priority)
            request.name = asked.name
            for one in (request, *request.twins):
                one.is_last = prompt.is_last
            if prompt.kept:
                request.on_prompt = lambda done: self._keep(asked, prompt, done)
            return request

        listener = asked.answers.listener(first)
        return self.loop.start_request(make, listener, timeout_s=asked.urgency.timeout_s)

    async def submit_turn(self, answers: Answers, send: Callable[[], Submission]) -> None:
        """Run a session's `send`, which may wait for a disk and for a step."""
        starting = self._waiting.submit(send)
        answers.add(starting)
        await asyncio.shield(asyncio.wrap_future(starting))

    async def num_computed(self, asked: Asked) -> int:
        """Tokens of a running request's prompts that need no computing any more."""

        def look(engine: Engine) -> int:
            running = [one.first for one in asked.answers.begun()]
            return sum(engine.pager.num_computed(r.seq) if r.seq >= 0 else r.prompt_tokens for r in running)

        return await self.on_engine(look)

    def _keep(self, asked: Asked, prompt: Prompt, request: Request) -> None:
        """On the engine's thread, the prompt being computed. With no room for a pin the answer comes without one."""
        for kept in sorted(prompt.kept, key=lambda one: one.num_tokens):
            try:
                pin = self.pins.hold(request.seq, kept.num_tokens, kept.ttl_s, asked.owner)
            except QueueFullError:
                self.metrics.backpressure("pins")
                continue
            if pin is not None:
                asked.pins.append(pin)

    # ------------------------------------------------------------------ afterwards
    def usage(self, asked: Asked) -> UsageReply:
        """Of all outputs together; prompts count once, however many answers they have. Call it once per request."""
        ends = asked.ends
        firsts = ends[:: asked.params.n]
        prompt = sum(end.output.usage.prompt_tokens for end in firsts)
        completion = sum(end.output.usage.completion_tokens for end in ends)
        self.metrics.finished(asked)
        self.histories.remember(
            asked.namespace, asked.history_key, asked.prompts[0].token_ids, ends[0].output.token_ids
        )
        return UsageReply(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokens(
                cached_tokens=sum(end.output.usage.cached_tokens for end in firsts),
                device_tokens=sum(end.output.usage.device_tokens for end in firsts),
                host_tokens=sum(end.output.usage.host_tokens for end in firsts),
                disk_tokens=sum(end.output.usage.disk_tokens for end in firsts),
                recomputed_tokens=sum(end.output.usage.recomputed_tokens for end in firsts),
            ),
            kvtier=KvTierUsage(
                ttft_s=firsts[0].output.usage.ttft_s,
                ledger=firsts[0].output.ledger,
                pinned_tokens=max((pin.tokens for pin in asked.pins), default=0) if asked.wants_pins else None,
                reuse_break_at=asked.reuse_break,
                is_durable=firsts[0].output.is_durable,
                selection=None if (read := firsts[0].output.selection) is None else read.to_dict(),
            ),
        )

    # ------------------------------------------------------------------ ending
    @property
    def is_ready(self) -> bool:
        return not self.gate.is_draining and self.loop.is_running

    async def drain(self, give_up: asyncio.Event) -> None:
        """Let nobody in; wait for who is inside, until the deadline or until told to give up."""
        self.gate.is_draining = True
        deadline_s = time.monotonic() + self.settings.drain_s
        while self.gate.num_inside and time.monotonic() < deadline_s and not give_up.is_set():
            await asyncio.sleep(0.05)

    def close(self) -> int:
        """Cancel what still runs, park every session, end the loop. Returns how many sessions could not be parked."""
        failed = 0
        if self.loop.is_running:
            self.loop.cancel_all()
            failed = self.conversations.park_all()
            self.loop.call(lambda engine: self.pins.close()).result()
        self.conversations.close()
        self.loop.close()
        return failed

    def end_threads(self) -> None:
        """After the last HTTP request was answered."""
        self._text.shutdown()
        self._waiting.shutdown()


def _max_context(engine: Engine, settings: ServerSettings) -> int:
    limits = [engine.pager.capacity_tokens(), settings.max_context]
    limits.append(getattr(engine.model.config, "max_position_embeddings", None))
    return min(limit for limit in limits if limit)


def given_limit(body: Sampling) -> int | None:
    """The most tokens of an answer that the client asked for."""
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        return body.max_completion_tokens
    return body.max_tokens
