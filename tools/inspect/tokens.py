"""Token ids as people have them: on the command line, in a text or JSON file, in a .npy array, on stdin."""

from __future__ import annotations

import json
import re
import struct
import sys
from array import array
from pathlib import Path

from ...pager.inspection.asking import ConfigError

MAX_TOKENS = 250_000  # of one question


def read_tokens(text: str) -> bytes:
    """Token ids as little-endian 32-bit numbers. Raises ConfigError naming what is no token id."""
    if re.fullmatch(r"[\d\s,]*,[\d\s,]*", text):  # a file of such a name is reached as ./1,2
        return _packed(_numbers(text, "the argument"))
    if text == "-":
        return _packed(_numbers(sys.stdin.read(), "stdin"))
    path = Path(text)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"prefix: cannot read {path}: {error.strerror}; give a file of token ids, or 1,2,3"
        ) from error
    if raw[:6] == b"\x93NUMPY":
        return _packed(_from_npy(path))
    try:
        return _packed(_numbers(raw.decode(), str(path)))
    except UnicodeDecodeError:
        raise ConfigError(f"prefix: {path} is neither text nor .npy") from None


def _numbers(text: str, where: str) -> list[int]:
    stripped = text.strip()
    try:
        if stripped.startswith("["):
            found = json.loads(stripped)
            if all(type(token) is int for token in found):
                return list(found)
            raise ValueError
        return [int(word) for word in re.split(r"[\s,]+", stripped) if word]
    except ValueError:
        raise ConfigError(f"prefix: {where} holds something that is no token id; give whole numbers") from None


def _from_npy(path: Path) -> list[int]:
    import numpy as np  # only for this kind of file

    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"prefix: {path}: {error}") from error
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ConfigError(f"prefix: {path} holds {found.dtype} of shape {found.shape}; need a row of whole numbers")
    return [int(token) for token in found]


def _packed(tokens: list[int]) -> bytes:
    if len(tokens) > MAX_TOKENS:
        raise ConfigError(f"prefix: {len(tokens)} tokens; one question takes at most {MAX_TOKENS}")
    try:
        packed = array("I", tokens)
    except OverflowError:
        bad = next(token for token in tokens if not 0 <= token < 1 << 32)
        raise ConfigError(f"prefix: token id {bad} is outside 0 to 4294967295") from None
    if sys.byteorder == "big" or packed.itemsize != 4:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    return packed.tobytes()
