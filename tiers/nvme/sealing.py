"""Encryption at rest: AES-256-GCM over blocks and session records, keys by namespace. Loads `cryptography` when asked to.

    sealed = magic, owner, counter, era, block key, generation | ciphertext | tag       the first part is authenticated too

A cipher key belongs to one namespace, one kind of content and one *era*: HKDF-SHA256 of the namespace's secret, salted
with 128 random bits that are drawn when a process first writes, after a fork, and after ERA_BYTES. Nonces under it are a
counter in memory. So a pair of key and nonce comes twice only if 128 random bits do: nothing has to be reserved on disk,
and neither a crash, a restored snapshot, a copied store nor two processes with one secret can make a counter run again
under a known key. The limit on bytes keeps the advantage of GCM's birthday bound under 2^-56 per era.

A block is bound to its name (block key) and to its writing (generation): another block of the same tenant, or an older
one of the same slot, does not open where the manifest lists this one. Guards: no plaintext checksum is kept beside it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..owners import owner_of

Bytes = npt.NDArray[np.uint8]
HEADER = struct.Struct("<4sIQ16s32sQ")  # magic, owner, counter, era, block key, generation
TAG_BYTES = 16
OVERHEAD_BYTES = HEADER.size + TAG_BYTES
MIN_SECRET_BYTES = 16
ERA_BYTES = 1 << 40
_MAGIC = b"kva1"
_MAX_KEYS = 4096  # derived keys remembered: one per namespace and era that is read
_BLOCK, _SESSION, _NAME = b"kvtier aes-256-gcm block 1", b"kvtier aes-256-gcm session 1", b"kvtier session name 1"


class Header(NamedTuple):
    """What stands before a ciphertext, in clear."""

    owner: int
    counter: int
    era: bytes
    key: bytes
    generation: int

    @classmethod
    def of(cls, sealed: Any) -> Header | None:
        """None when these bytes were not sealed by us."""
        if len(sealed) < OVERHEAD_BYTES:
            return None
        magic, *rest = HEADER.unpack_from(sealed)
        return cls(*rest) if magic == _MAGIC else None

    def pack(self) -> bytes:
        return HEADER.pack(_MAGIC, *self)

    @property
    def nonce(self) -> bytes:
        return self.counter.to_bytes(12, "little")


class BlockSealer:
    """Seals and opens blocks of one layout. Called from many threads. `secrets`: by owner tag; may grow meanwhile."""

    def __init__(self, secrets: Mapping[int, bytes], fingerprint: str) -> None:
        self._aead = _library()
        self._secrets, self._info = secrets, _BLOCK + fingerprint.encode()
        self._lock = threading.Lock()
        self._keys: OrderedDict[tuple[int, bytes], Any] = OrderedDict()
        self._era, self._counter, self._bytes, self._pid = b"", 0, 0, -1

    def seal(self, plain: Bytes, owner: int, key: bytes, generation: int, into: Bytes | None = None) -> Bytes:
        """Header, ciphertext and tag, `into` memory of OVERHEAD_BYTES more than `plain` where some is given.

        Raises ConfigError when the namespace has no secret.
        """
        era, counter = self._next_nonce(len(plain))
        cipher = self._cipher(owner, era)
        if cipher is None:
            raise ConfigError(f"encryption: the namespace with tag {owner:#010x} has no secret")
        header = Header(owner, counter, era, key, generation)
        sealed = np.empty(len(plain) + OVERHEAD_BYTES, np.uint8) if into is None else into
        sealed[: HEADER.size] = np.frombuffer(header.pack(), np.uint8)
        cipher.encrypt_into(header.nonce, plain.data, header.pack(), sealed[HEADER.size :].data)
        return sealed

    def open(self, sealed: Bytes, plain: Bytes) -> bool:
        """Fill `plain`, whose size is known. False when the bytes or the secret are not those they were sealed with."""
        header = Header.of(sealed)
        if header is None or len(sealed) != len(plain) + OVERHEAD_BYTES:
            return False
        cipher = self._cipher(header.owner, header.era)
        if cipher is None:
            return False
        try:
            cipher.decrypt_into(header.nonce, sealed[HEADER.size :].data, header.pack(), plain.data)
        except self._aead.invalid_tag:
            plain[:] = 0  # what was decrypted before the tag was looked at is nobody's
            return False
        return True

    def has_secret(self, owner: int) -> bool:
        return len(self._secrets.get(owner, b"")) >= MIN_SECRET_BYTES

    def _next_nonce(self, nbytes: int) -> tuple[bytes, int]:
        with self._lock:
            if self._pid != os.getpid() or self._bytes + nbytes > ERA_BYTES:
                self._era, self._counter, self._bytes, self._pid = os.urandom(16), 0, 0, os.getpid()
            self._counter += 1
            self._bytes += nbytes
            return self._era, self._counter

    def _cipher(self, owner: int, era: bytes) -> Any:
        with self._lock:
            found = self._keys.get((owner, era))
            if found is not None:
                self._keys.move_to_end((owner, era))
                return found
        if not self.has_secret(owner):
            return None
        made = self._aead.cipher(_derived(self._secrets[owner], era, self._info))
        with self._lock:
            self._keys[owner, era] = made
            while len(self._keys) > _MAX_KEYS:
                self._keys.popitem(last=False)
        return made


class RecordSealer:
    """Seals session records of namespaces, each under a key of its own; names them so that an id is not told either."""

    def __init__(self, secrets: Mapping[int, bytes]) -> None:
        self._aead = _library()
        self._secrets = secrets

    def wrap(self, session_id: str, record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """What the journal calls a session, and the sealed record. Raises ConfigError without a secret."""
        owner, era = owner_of(record["namespace"]), os.urandom(16)
        name, cipher = self.name(session_id, record["namespace"]), self._cipher(owner, era)
        body = cipher.encrypt(bytes(12), msgpack.packb({**record, "id": session_id}), name.encode())  # used this once
        return name, {"owner": owner, "era": era, "sealed": body}

    def unwrap(self, name: str, sealed: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """None when the namespace's secret is not the one that it was sealed with, or the record was changed or moved."""
        try:
            cipher = self._cipher(int(sealed["owner"]), bytes(sealed["era"]))
            record: dict[str, Any] = msgpack.unpackb(
                cipher.decrypt(bytes(12), sealed["sealed"], name.encode()), raw=False
            )
            return str(record.pop("id")), record
        except (ConfigError, KeyError, TypeError, ValueError, self._aead.invalid_tag):
            return None

    def name(self, session_id: str, namespace: str) -> str:
        """The same each time, and nothing to whoever lacks the secret."""
        secret = self._secret(owner_of(namespace))
        return hashlib.blake2b(_NAME + session_id.encode(), digest_size=24, key=secret).hexdigest()

    def _cipher(self, owner: int, era: bytes) -> Any:
        return self._aead.cipher(_derived(self._secret(owner), era, _SESSION))

    def _secret(self, owner: int) -> bytes:
        secret = self._secrets.get(owner, b"")
        if len(secret) < MIN_SECRET_BYTES:
            raise ConfigError(f"encryption: the namespace with tag {owner:#010x} has no secret")
        return secret


def is_sealed(record: Mapping[str, Any]) -> bool:
    return "sealed" in record


class _Library(NamedTuple):
    cipher: Any
    invalid_tag: type[Exception]


@cache
def _library() -> _Library:
    """Raises ConfigError where `cryptography` is missing or too old."""
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError(
            f"encryption needs the cryptography package: pip install 'kvtier[crypto]' ({error})"
        ) from error
    if not hasattr(AESGCM, "decrypt_into"):
        raise ConfigError("encryption needs a newer cryptography package: pip install --upgrade 'kvtier[crypto]'")
    return _Library(AESGCM, InvalidTag)


def _derived(secret: bytes, salt: bytes, info: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, info).derive(secret)
