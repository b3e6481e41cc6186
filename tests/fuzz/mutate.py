"""Mutations of bytes, of text and of values, from one random generator: same seed, same inputs."""

from __future__ import annotations

import random
import struct
from typing import Any

NASTY_INTS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 63) - 1,
    (1 << 64) - 1,
    -(1 << 63),
)
NASTY_TEXT = (
    *("", "\0", "..", "/", "\ud800", "NaN", "9" * 400, "1" + "0" * 30 + "GiB", "-1", "%", "True", "x" * 5000, "ü"),
    *("a=b,c", "0x10"),
)
MARKERS = (
    0x80,
    0x8F,
    0x90,
    0x9F,
    0xA0,
    0xBF,
    0xC0,
    0xC1,
    0xC4,
    0xC6,
    0xC7,
    0xC9,
    0xCB,
    0xD9,
    0xDB,
    0xDC,
    0xDD,
    0xDE,
    0xDF,
)


def mutated_bytes(choose: random.Random, raw: bytes) -> bytes:
    """One to four of: flip, set, insert, delete, repeat, cut, overwrite a number. `choose` decides."""
    out = bytearray(raw)
    for _ in range(1 + int(choose.random() * 4)):
        kind, at = int(choose.random() * 8), int(choose.random() * (len(out) + 1))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(choose.random() * 8)
        elif kind == 1 and at < len(out):
            out[at] = MARKERS[int(choose.random() * len(MARKERS))]
        elif kind == 2:
            out[at:at] = choose.randbytes(1 + int(choose.random() * 8))
        elif kind == 3:
            del out[at : at + 1 + int(choose.random() * 8)]
        elif kind == 4:
            out[at:at] = out[at : at + 16]
        elif kind == 5:
            del out[at:]
        elif kind == 6 and at + 4 <= len(out):
            out[at : at + 4] = struct.pack("<I", NASTY_INTS[int(choose.random() * len(NASTY_INTS))] & 0xFFFFFFFF)
        elif kind == 7 and at < len(out):
            out[at] = int(choose.random() * 256)
    return bytes(out)


def mutated_value(choose: random.Random, value: Any, *, is_json: bool = False) -> Any:
    """A copy of a value of dicts, lists and scalars with one part of it changed."""
    if isinstance(value, dict) and value and choose.random() < 0.85:
        copy = dict(value)
        key = choose.choice(list(copy))
        how = choose.random()
        if how < 0.12:
            del copy[key]
        elif how < 0.2:
            copy[choose.choice(["", "x", key + "x"])] = copy.pop(key)
        else:
            copy[key] = mutated_value(choose, copy[key], is_json=is_json)
        return copy
    if isinstance(value, list) and value and choose.random() < 0.7:
        copy = list(value)
        at = choose.randrange(len(copy))
        how = choose.random()
        if how < 0.15:
            del copy[at]
        elif how < 0.3:
            copy.insert(at, copy[at])
        else:
            copy[at] = mutated_value(choose, copy[at], is_json=is_json)
        return copy
    if isinstance(value, bytes) and choose.random() < 0.7:
        return mutated_bytes(choose, value)
    return any_value(choose, is_json=is_json)


def any_value(choose: random.Random, *, is_json: bool = False) -> Any:
    """Something of another kind, or of the same and out of range."""
    kind = choose.randrange(9 if is_json else 10)
    if kind < 3:
        return choose.choice(NASTY_INTS)
    if kind == 3:
        return choose.choice(NASTY_TEXT)
    if kind == 4:
        return choose.choice([0.0, -0.5, 1e308, float("inf"), float("nan")])
    if kind == 5:
        return choose.choice([None, True, False])
    if kind == 6:
        return [any_value(choose, is_json=is_json) for _ in range(choose.randrange(3))]
    if kind == 7:
        return {choose.choice(["", "a", "format"]): any_value(choose, is_json=is_json)}
    if kind == 8:
        return nested(choose.randrange(2, 30))
    return choose.randbytes(choose.randrange(40))


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value
