"""Turns of a chat as token ids, through the tokenizer's own chat template, without rendering history again.

A session keeps token ids, so only the new turn is rendered: it is what the template puts behind an assistant's answer.
That text is found by rendering a conversation whose answer is a marker. A tokenizer without a template gets plain text.
"""

from __future__ import annotations

from typing import Any

_MARKER = "kvtier-marks-this-answer"


def render_turn(tokenizer: Any, text: str, known: list[int]) -> list[int]:
    """Token ids to append for a user's message, after the tokens `known` (only whether there are any, and the last)."""
    if not getattr(tokenizer, "chat_template", None):
        return [int(token) for token in tokenizer(text, add_special_tokens=not known)["input_ids"]]
    message = {"role": "user", "content": text}
    if not known:
        rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    else:
        history = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _MARKER}]
        whole = tokenizer.apply_chat_template([*history, message], tokenize=False, add_generation_prompt=True)
        rendered = whole.partition(_MARKER)[2]
        end = tokenizer.eos_token
        if end and known[-1] == tokenizer.eos_token_id and rendered.startswith(end):
            rendered = rendered[len(end) :]  # the model said it already
    return [int(token) for token in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
