"""What a single token is in text and in bytes, for log probabilities; a part of a character is bytes only."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Of one tokenizer. Byte-level vocabularies are read exactly, others through their decoder."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()} if is_byte_level else {}
        self._special = set(tokenizer.all_special_ids)
        self.of = lru_cache(maxsize=65536)(self._of)

    def _of(self, token: int) -> tuple[str, list[int]]:
        """Text, and bytes of UTF-8."""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := _BYTE_TOKEN.fullmatch(piece):
            raw = bytes([int(byte[1], 16)])
        elif self._byte_of and token not in self._special and all(char in self._byte_of for char in piece):
            raw = bytes(self._byte_of[char] for char in piece)
        else:
            raw = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()
        return raw.decode(errors="replace"), list(raw)
