"""Requests as they come over the wire. Fields that OpenAI knows and that would change an answer here are refused by
name; others that we do not know are ignored, as OpenAI does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..sampling import MAX_LOGPROBS

MAX_STOPS, MAX_STOP_CHARS, MAX_N, MAX_PROMPTS = 4, 256, 32, 64
MAX_TTL_S = MAX_TIMEOUT_S = 24 * 3600.0
MAX_PRIORITY = 1000
Retention = Literal["in_memory", "in-memory", "24h"]
TokenIds = list[Annotated[int, Field(ge=0, lt=1 << 32)]]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class CacheControl(Body):
    """Keep the prompt up to here for `ttl` after this request."""

    type: Literal["ephemeral"] = "ephemeral"
    ttl: Literal["5m", "1h"] = "5m"


class Breakpoint(Body):
    """OpenAI's way to say the same; without `ttl` that of the request's prompt_cache_options counts."""

    mode: Literal["explicit"] = "explicit"
    ttl: Literal["30m", "12h"] | None = None


class CacheOptions(Body):
    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None


class Part(Body):
    """A part of a message. Only text is understood."""

    type: str = "text"
    text: str | None = None
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: Breakpoint | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    cache_control: CacheControl | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampling(Body):
    """What both generating endpoints take."""

    model: str | None = Field(None, description="The served model, or nothing.")
    max_tokens: int | None = Field(None, ge=0, description="0 only warms the cache: the answer is empty, with usage.")
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all tokens.")
    min_p: float | None = Field(None, ge=0, lt=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = None
    stop: str | list[str] | None = Field(None, description=f"Up to {MAX_STOPS} texts that end an answer.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    attention: str | None = Field(
        None,
        max_length=64,
        description="full, window:TOKENS,sinks=TOKENS or select:PAGES,recall=SHARE; the server's when not given. All but "
        "full are approximate.",
    )
    priority: int | None = Field(
        None,
        ge=0,
        le=MAX_PRIORITY,
        description="0 is first; with a higher number it gives way to those with a lower one.",
    )
    timeout_s: float | None = Field(
        None, gt=0, le=MAX_TIMEOUT_S, description="So long it may take in all; the server's own limit counts too."
    )
    cache_salt: str | None = Field(
        None, min_length=1, max_length=512, description="Only requests with the same salt share cached blocks."
    )
    prompt_cache_key: str | None = Field(None, max_length=512)
    prompt_cache_retention: Retention | None = Field(None, description="24h keeps the whole prompt for a day.")
    prompt_cache_options: CacheOptions | None = None
    end_of_session: bool | None = Field(
        None, description="Nobody goes on from this answer: its own cached blocks may leave first."
    )

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARS for text in texts):
            raise ValueError(f"give up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(Sampling):
    prompt: str | list[str] | TokenIds | list[TokenIds]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class SessionRequest(Body):
    id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="1 to 64 letters, digits, '_', '-' or '.'; made up when not given.",
    )


class ForkRequest(Body):
    n: int = Field(1, ge=1, le=64)


class RollbackRequest(Body):
    num_tokens: int = Field(ge=0, description="Everything past so many tokens is forgotten.")


class Prompts(Body):
    """Text, token ids, or messages; several of them with `prompts`."""

    prompts: list[str | TokenIds] | None = Field(None, max_length=MAX_PROMPTS)
    messages: list[ChatMessage] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=512)


class WarmRequest(Prompts):
    stream: bool | None = Field(None, description="Events with progress instead of one answer.")


class PinRequest(Prompts):
    ttl_s: float = Field(gt=0, le=MAX_TTL_S)


def _is_other(*allowed: Any) -> Any:
    return lambda value: value not in allowed


_UNSUPPORTED: dict[str, Any] = {  # name -> whether this value would change the answer
    "tools": bool,
    "tool_choice": _is_other("none", "auto"),
    "functions": bool,
    "function_call": _is_other("none", "auto"),
    "response_format": lambda value: not isinstance(value, dict) or value.get("type") != "text",
    "logit_bias": bool,
    "frequency_penalty": _is_other(0),
    "presence_penalty": _is_other(0),
    "repetition_penalty": _is_other(1),
    "modalities": _is_other(["text"]),
    "audio": bool,
    "web_search_options": lambda value: True,
    "reasoning_effort": _is_other("none"),
    "best_of": _is_other(1),
    "echo": bool,
    "suffix": bool,
    "min_tokens": bool,
    "ignore_eos": bool,
    "stop_token_ids": bool,
    "guided_json": bool,
    "guided_regex": bool,
    "guided_choice": bool,
    "guided_grammar": bool,
    "structured_outputs": bool,
    "chat_template": bool,
    "chat_template_kwargs": bool,
    "continue_final_message": bool,
}


def unsupported(body: Body) -> str | None:
    """The first field that would change the answer and that we do not have."""
    for name, value in (body.model_extra or {}).items():
        if value is not None and name in _UNSUPPORTED and _UNSUPPORTED[name](value):
            return name
    return None
