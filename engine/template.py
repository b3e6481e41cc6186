"""Turns of a chat as token ids, through the tokenizer's own chat template, without rendering history again.

A session keeps token ids, so only the new turn is rendered: it is what the template puts behind an assistant's answer.
That text is found by rendering a conversation whose answer is a marker. A tokenizer without a template gets plain text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..tiers.errors import ConfigError

Message = Mapping[str, Any]  # role and content, as chat templates take them
_MARKER = "kvtier-marks-this-answer"


def render_turn(tokenizer: Any, text: str, known: list[int]) -> list[int]:
    """Token ids to append for a user's message, after the tokens `known` (only whether there are any, and the last)."""
    return render_messages(tokenizer, [{"role": "user", "content": text}], known)


def render_messages(
    tokenizer: Any, messages: Sequence[Message], known: list[int], ends: Collection[int] = ()
) -> list[int]:
    """Token ids to append for new messages, and for the header of the answer to them.

    `ends`: tokens that end an answer, besides the special ones. Raises: ConfigError for no messages, or when the template
    refuses them.
    """
    if not messages:
        raise ConfigError("messages: there are none; send at least one")
    if not getattr(tokenizer, "chat_template", None):
        text = "\n".join(str(message["content"]) for message in messages)
        return [int(token) for token in tokenizer(text, add_special_tokens=not known)["input_ids"]]
    if not known:
        return _encode(tokenizer, render_text(tokenizer, messages))
    history = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _MARKER}]
    rendered = render_text(tokenizer, [*history, *messages]).partition(_MARKER)[2]
    if known[-1] in ends or _is_special(tokenizer, known[-1]):
        # Token by token, not in the text: the end may take the space around it along.
        end, *rest = _encode(tokenizer, rendered.lstrip()) or [-1]
        if end == known[-1]:
            return rest  # the model said it already
    return _encode(tokenizer, rendered)


def render_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A whole chat as text, up to the header of the next answer. Raises: ConfigError when the template refuses it."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ConfigError(f"messages: the model's chat template refuses them: {error}") from error


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's own."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {getattr(tokenizer, "eos_token_id", None), *(named if isinstance(named, list) else [named])}
    return tuple(sorted(token for token in ends if token is not None))


def _is_special(tokenizer: Any, token: int) -> bool:
    return not tokenizer.decode([token], skip_special_tokens=True) and bool(tokenizer.decode([token]))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
