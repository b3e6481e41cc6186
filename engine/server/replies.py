"""Answers as they go over the wire; what OpenAPI says of them is made from these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class PromptTokens(BaseModel):
    """cached = device + host + disk, by the tier that held them when the request came. Recomputed: had been computed before."""

    cached_tokens: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    recomputed_tokens: int


class ReuseBreakReply(BaseModel):
    """The first prompt token that is not what it was in the last request with this prompt_cache_key."""

    at: int
    reason: str
    explanation: str


class KvTierUsage(BaseModel):
    """`ledger`: seconds to the first token, line by line; they add up to ttft_s.

    `is_durable`, of a turn of a session: false where no disk has taken it, so that a crash would lose it.
    """

    ttft_s: float
    ledger: dict[str, float]
    pinned_tokens: int | None = None
    reuse_break_at: ReuseBreakReply | None = None
    is_durable: bool | None = None
    selection: dict[str, float] | None = (
        None  # of attention=select: pages and bytes read, and a bound on what was left out
    )


class UsageReply(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    kvtier: KvTierUsage

    def to_wire(self) -> dict[str, Any]:
        wire = self.model_dump()
        wire["kvtier"] = {name: value for name, value in wire["kvtier"].items() if value is not None}
        return wire


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob] | None
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply


class ModelReply(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvtier"
    max_context: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelReply]


class Health(BaseModel):
    status: str


class SessionReply(BaseModel):
    """`last_used` is in seconds since the epoch, 0 when this process has not used the session.

    `is_durable`: after a crash it would be as it is now; false while a turn is under way, or where no disk took the last one.
    """

    id: str
    object: Literal["session"] = "session"
    tokens: int
    computed_tokens: int
    state: Literal["active", "parked", "busy"]
    is_durable: bool
    last_used: float


class SessionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SessionReply]


class Deleted(BaseModel):
    id: str
    deleted: bool = True


class PinReply(BaseModel):
    """`tokens` is in whole blocks; what is past the last one is not kept."""

    id: str
    object: Literal["cache.pin"] = "cache.pin"
    tokens: int
    expires_in_s: float


class PinList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PinReply]


class WarmedPrompt(BaseModel):
    tokens: int
    cached_tokens: int
    computed_tokens: int
    seconds: float


class WarmReply(BaseModel):
    object: Literal["cache.warm"] = "cache.warm"
    prompts: list[WarmedPrompt]
    tokens: int
    computed_tokens: int


class StatsReply(BaseModel):
    """What the tiers hold and have done, for all namespaces together, and what is this namespace's own."""

    object: Literal["cache.stats"] = "cache.stats"
    block_size: int
    tiers: dict[str, dict[str, Any]]
    miss_tokens: int
    ghost_tokens: int
    transfers_in_flight: int
    requests: dict[str, int]
    sessions: int
    pins: int
    pinned_tokens: int


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: these statuses come with an error body."""
    return {status: {"model": ErrorReply} for status in statuses}
