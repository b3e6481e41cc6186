"""Secrets of namespaces from files, and tokens: made, read, hashed, compared. None of it is ever logged or printed back.

A namespace's secret is in a file of its own, or is derived from a root secret by HKDF-SHA256 with the namespace's name, so
that one file serves many. A token is 256 random bits that a client shows; the configuration keeps a BLAKE2b hash of it: for
so many random bits a slow hash adds nothing, and a token that somebody made up is refused where it is shorter. Guards: a
secret file that others can read is refused, whatever is in it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable

from ...tiers.errors import ConfigError

SECRET_BYTES = 32
MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 64
TOKEN_PREFIX, HASH_PREFIX = "kvt_", "blake2b:"
_TOKEN = re.compile(r"kvt_[A-Za-z0-9_-]{43}")
_HASH = re.compile(r"blake2b:[0-9a-f]{64}")
_PERSON = b"kvtier-token-1"


# ---------------------------------------------------------------------- secrets
def read_secret(path: str | os.PathLike[str], *, name: str) -> bytes:
    """The secret in a file: hexadecimal text of 16 to 64 bytes. Raises ConfigError, which never shows it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not hold us up
        try:
            _require_private(os.fstat(fd), path, name)
            raw = os.read(fd, 4 * MAX_SECRET_BYTES)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name}={str(path)!r} cannot be read: {why}") from error
    try:
        secret = bytes.fromhex(raw.decode().strip())
    except ValueError:
        raise ConfigError(
            f"{name}={str(path)!r} does not hold hexadecimal text; make one with pagerd --new-secret"
        ) from None
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise ConfigError(
            f"{name}={str(path)!r} holds {len(secret)} bytes; need {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES}: make one with "
            "pagerd --new-secret"
        )
    return secret


def _require_private(found: os.stat_result, path: str | os.PathLike[str], name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{name}={str(path)!r} is not a file")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{name}={str(path)!r} belongs to uid {found.st_uid}; it must be ours or root's")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{name}={str(path)!r} can be read by others (mode {found.st_mode & 0o777:04o}): chmod 600 it"
        )


def write_new_secret(path: str | os.PathLike[str]) -> None:
    """A new random secret in a new file of mode 0600. Raises ConfigError when there is one."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--new-secret {str(path)!r} cannot be made: {error.strerror}") from error
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES) + "\n")
        file.flush()
        os.fsync(fd)


def derive_secret(root: bytes, namespace: str) -> bytes:
    """HKDF-SHA256 (RFC 5869), with the standard library alone: a daemon without `cryptography` derives the same."""
    extracted = hmac.digest(b"kvtier namespace secret 1", root, "sha256")
    return hmac.digest(extracted, namespace.encode() + b"\x01", "sha256")


# ---------------------------------------------------------------------- tokens
def new_token() -> tuple[str, str]:
    """A token for a client, and what the configuration keeps of it."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, hash_token(token)


def hash_token(token: str) -> str:
    return HASH_PREFIX + hashlib.blake2b(token.encode(), digest_size=32, person=_PERSON).hexdigest()


def check_token_hash(text: str, *, name: str) -> str:
    """Raises ConfigError, which never shows what may be the token itself."""
    if _TOKEN.fullmatch(text):
        raise ConfigError(f"{name} holds a token; keep its hash there: pagerd --hash-token prints it")
    if not _HASH.fullmatch(text):
        raise ConfigError(
            f"{name}: a token's hash is {HASH_PREFIX} and 64 hexadecimal digits; pagerd --new-token makes one"
        )
    return text


def is_token(text: str) -> bool:
    """Whether this can be one of ours: 256 random bits, not words that somebody chose."""
    return _TOKEN.fullmatch(text) is not None


def matches(token: str, hashes: Iterable[str]) -> list[bool]:
    """Which hashes are of this token. Compares with all of them, each in constant time."""
    shown = hash_token(token) if is_token(token) else ""
    return [hmac.compare_digest(shown, kept) for kept in hashes]
