"""The short name of a namespace that is kept with each of its blocks, in memory, in the manifest and in sealed chunks."""

from __future__ import annotations

import hashlib

SALT_MARK = "--"  # of a namespace name, what follows is a salt: other keys, the same secret and quota


def owner_tag(namespace: str) -> int:
    """1 to 2^32 - 1; 0 is nobody's."""
    return int.from_bytes(hashlib.blake2b(namespace.encode(), digest_size=4).digest(), "little") or 1


def unsalted(namespace: str) -> str:
    """Who a namespace belongs to: its name without a salt."""
    return namespace.partition(SALT_MARK)[0] or namespace


def owner_of(namespace: str) -> int:
    """The tag of whom a namespace belongs to, whatever its salt."""
    return owner_tag(unsalted(namespace))
