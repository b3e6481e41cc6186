"""What a client wrote as token ids, and how many of them lie before each point that it wants kept.

Runs on the text threads: rendering and encoding a long prompt takes a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..template import render_text
from .bodies import CacheOptions, ChatMessage, Part, TokenIds
from .errors import bad

SECONDS = {"5m": 300.0, "30m": 1800.0, "1h": 3600.0, "12h": 43200.0, "24h": 86400.0}
_MARKER = "kvtier-marks-this-place"
MAX_KEPT = 4  # points of one prompt


@dataclass(frozen=True, slots=True)
class Kept:
    """The first num_tokens tokens are to be kept for ttl_s."""

    num_tokens: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ready for the engine."""

    token_ids: list[int]
    kept: tuple[Kept, ...] = ()
    is_last: bool = False  # nobody goes on from its answer


class PromptReader:
    """Of one tokenizer and a model with so many token ids."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        tokenizer("x")  # sets up truncation and padding, which later calls on several threads leave alone

    def chat(self, messages: Sequence[ChatMessage], options: CacheOptions | None = None) -> Prompt:
        """Raises: ApiError, and ConfigError when the model's template refuses the messages."""
        plain = plain_messages(messages)
        text = self._render(plain)
        marked = _kept_points(messages, options)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(marked))
        ids = self._checked(encoded["input_ids"], "messages")
        kept = []
        for index, num_parts, ttl_s in marked:
            end = self._end_of(plain, index, plain_text(messages[index], num_parts), text)
            kept.append(Kept(sum(0 < stop <= end for _, stop in encoded["offset_mapping"]), ttl_s))
        return Prompt(ids, tuple(kept))

    def completion(self, prompt: str | TokenIds) -> Prompt:
        ids = self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return Prompt(self._checked(ids, "prompt"))

    def _checked(self, ids: Sequence[int], param: str) -> list[int]:
        if not ids:
            raise bad(f"{param}: it is empty; a prompt needs at least one token", param)
        if max(ids) >= self._vocab_size:
            raise bad(f"{param}: token id {max(ids)} is unknown; this model has ids 0 to {self._vocab_size - 1}", param)
        return [int(token) for token in ids]

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            return "\n".join(message["content"] for message in messages)
        return render_text(self._tokenizer, messages)

    def _end_of(self, messages: list[dict[str, str]], index: int, until: str, text: str) -> int:
        """Where in the rendered text this part of a message ends: rendered again with a marker there, and compared."""
        with_marker = [*messages[:index], messages[index] | {"content": until + _MARKER}, *messages[index + 1 :]]
        before = self._render(with_marker).partition(_MARKER)[0]
        if text.startswith(before):
            return len(before)
        return next(i for i, (a, b) in enumerate(zip(before + "\0", text + "\1")) if a != b)  # a template that trims


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Role and text, as templates take them. Raises: ApiError for what is not text."""
    for number, message in enumerate(messages):
        for field in ("tool_calls", "function_call", "audio"):
            if (message.model_extra or {}).get(field):
                raise bad(f"messages.{number}.{field} is not supported; send text only", f"messages.{number}.{field}")
        for place, part in enumerate(_parts(message)):
            param = f"messages.{number}.content.{place}"
            if part.type != "text" or part.text is None:
                raise bad(f"{param}: type {part.type!r} is not supported; send parts of type 'text' with a text", param)
    return [{"role": message.role, "content": plain_text(message)} for message in messages]


def plain_text(message: ChatMessage, num_parts: int | None = None) -> str:
    """A message's (first) parts, a line each."""
    return "\n".join(part.text or "" for part in _parts(message)[:num_parts])


def _parts(message: ChatMessage) -> list[Part]:
    return [Part(text=message.content)] if isinstance(message.content, str) else message.content


def first_mark(messages: Sequence[ChatMessage]) -> str | None:
    """The first field that wants the prompt kept up to there."""
    for number, message in enumerate(messages):
        if message.cache_control is not None:
            return f"messages.{number}.cache_control"
        for place, part in enumerate(_parts(message)):
            for name in ("cache_control", "prompt_cache_breakpoint"):
                if getattr(part, name) is not None:
                    return f"messages.{number}.content.{place}.{name}"
    return None


def _kept_points(messages: Sequence[ChatMessage], options: CacheOptions | None) -> list[tuple[int, int, float]]:
    """Message, number of its parts, seconds; for the last MAX_KEPT points that are marked."""
    found = []
    default = options.ttl if options is not None and options.ttl else "30m"
    for index, message in enumerate(messages):
        parts = _parts(message)
        for place, part in enumerate(parts):
            control = part.cache_control or (message.cache_control if place == len(parts) - 1 else None)
            if control is not None:
                found.append((index, place + 1, SECONDS[control.ttl]))
            elif part.prompt_cache_breakpoint is not None:
                found.append((index, place + 1, SECONDS[part.prompt_cache_breakpoint.ttl or default]))
    return found[-MAX_KEPT:]
