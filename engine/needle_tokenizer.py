"""A tokenizer for the needle model: every token is a word, so a prompt can be read and typed.

Symbols are `s0`, `s1`, ..., filler is `f0`, `f1`, ...; any other word becomes `f0`. A chat is
the words of its messages, one after the other; the model answers the last word with what followed it before.
"""

from __future__ import annotations

from typing import Any

from .needle import BOS, FIRST_SYMBOL, NULL, NeedleSpec

_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"


def needle_tokenizer(spec: NeedleSpec | None = None) -> Any:
    """For build_needle_model(spec)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spec = spec or NeedleSpec()
    first_filler = FIRST_SYMBOL + spec.num_symbols
    words = {"<bos>": BOS, "<absent>": NULL}
    words |= {f"s{i}": FIRST_SYMBOL + i for i in range(spec.num_symbols)}
    words |= {f"f{i}": first_filler + i for i in range(spec.vocab_size - first_filler)}
    raw = Tokenizer(models.WordLevel(words, unk_token="f0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="f0")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
