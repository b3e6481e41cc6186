"""The two formats of an answer: chat completions and completions, whole and in chunks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from .answers import Delta
from .replies import (
    AssistantMessage,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatReply,
    ChatTopLogprob,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    UsageReply,
)
from .text import LoggedToken
from .token_bytes import TokenBytes

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class Whole:
    """One output, all of its pieces together."""

    text: str = ""
    logged: list[LoggedToken] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "length"

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.logged += delta.logged
        if delta.finish_reason is not None:
            self.finish_reason = "stop" if delta.finish_reason == "stop" else "length"


class Wire(Protocol):
    """Of one answer: its id, time and format."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before an output's first piece."""
        ...

    def chunk(self, delta: Delta) -> dict[str, Any]: ...

    def last(self, usage: UsageReply) -> dict[str, Any]:
        """A chunk of no output, with the usage."""
        ...

    def reply(self, outputs: Sequence[Whole], usage: UsageReply) -> BaseModel: ...


class ChatWire:
    """/v1/chat/completions."""

    def __init__(self, model: str, created_s: int, tokens: TokenBytes, has_logprobs: bool) -> None:
        self._head: dict[str, Any] = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created_s, "model": model}
        self._tokens, self._has_logprobs = tokens, has_logprobs

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logged)
        message = {"content": delta.text} if delta.text or logprobs else {}
        return self._chunk(delta.index, message, logprobs, delta.finish_reason)

    def last(self, usage: UsageReply) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage.to_wire()}

    def reply(self, outputs: Sequence[Whole], usage: UsageReply) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=output.text),
                logprobs=self._logprobs(output.logged, always=True),
                finish_reason=output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return ChatReply(**self._head, choices=choices, usage=usage)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None, reason: str | None
    ) -> dict[str, Any]:
        wire = None if logprobs is None else logprobs.model_dump()
        choice = {"index": index, "delta": delta, "logprobs": wire, "finish_reason": reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, logged: Sequence[LoggedToken], *, always: bool = False) -> ChatLogprobs | None:
        if not self._has_logprobs or not (logged or always):
            return None
        return ChatLogprobs(content=[self._of(one) for one in logged])

    def _of(self, logged: LoggedToken) -> ChatLogprob:
        entry = logged.entry
        own = self._one(entry.token, entry.logprob)
        top = [self._one(token, value) for token, value in entry.top]
        return ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _one(self, token: int, logprob: float) -> ChatTopLogprob:
        text, raw = self._tokens.of(token)
        return ChatTopLogprob(token=text, logprob=max(logprob, _LEAST_LOGPROB), bytes=raw)


class CompletionWire:
    """/v1/completions."""

    def __init__(self, model: str, created_s: int, tokens: TokenBytes, num_logprobs: int | None) -> None:
        self._head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "created": created_s, "model": model}
        self._tokens, self._num_logprobs = tokens, num_logprobs

    def opening(self, index: int) -> None:
        return None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.logged)
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": delta.finish_reason,
        }
        return self._head | {"object": "text_completion", "choices": [choice]}

    def last(self, usage: UsageReply) -> dict[str, Any]:
        return self._head | {"object": "text_completion", "choices": [], "usage": usage.to_wire()}

    def reply(self, outputs: Sequence[Whole], usage: UsageReply) -> BaseModel:
        choices = [
            CompletionChoice(
                index=index,
                text=output.text,
                logprobs=self._logprobs(output.logged, always=True),
                finish_reason=output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return CompletionReply(**self._head, choices=choices, usage=usage)

    def _logprobs(self, logged: Sequence[LoggedToken], *, always: bool = False) -> CompletionLogprobs | None:
        if self._num_logprobs is None or not (logged or always):
            return None
        entries = [one.entry for one in logged]
        return CompletionLogprobs(
            tokens=[self._text(entry.token) for entry in entries],
            token_logprobs=[max(entry.logprob, _LEAST_LOGPROB) for entry in entries],
            top_logprobs=[
                {self._text(token): max(value, _LEAST_LOGPROB) for token, value in entry.top} for entry in entries
            ]
            if self._num_logprobs
            else None,
            text_offset=[one.start for one in logged],
        )

    def _text(self, token: int) -> str:
        """As OpenAI writes it: a token that is no whole character is named by its bytes."""
        text, raw = self._tokens.of(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if "\ufffd" in text else text
