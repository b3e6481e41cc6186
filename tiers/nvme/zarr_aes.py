"""`kvtier.aes_gcm` as a Zarr v3 codec, for any zarr-python that finds it: pyproject.toml names it as an entry point.

It opens chunks that kvtier sealed (sealing.py) where the secret of their namespace is in the environment, as
KVTIER_NAMESPACE_SECRETS="name=hex,..."; without it refuses in words, and writes nothing: what is sealed must carry the
block key and generation that only kvtier's manifest gives. kvtier itself reads and writes without this file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.common import JSON, parse_named_configuration
from zarr.registry import register_codec

from ..owners import owner_tag
from .sealing import OVERHEAD_BYTES, BlockSealer, Header

NAME = "kvtier.aes_gcm"
SECRETS = "KVTIER_NAMESPACE_SECRETS"


@dataclass(frozen=True)
class ZarrAesGcm(BytesBytesCodec):
    """AES-256-GCM. `layout`: fingerprint of the blocks' layout, which is part of every key."""

    is_fixed_size = True
    layout: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, NAME)
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        return {"name": NAME, "configuration": {"layout": self.layout}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        return input_byte_length + OVERHEAD_BYTES

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise ValueError(f"{NAME}: only kvtier writes here; a chunk carries what its manifest says of the block")

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode, chunk_bytes, chunk_spec)

    def _decode(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        sealed = np.ascontiguousarray(chunk_bytes.as_numpy_array()).view(np.uint8)
        header = Header.of(sealed)
        if header is None:
            raise ValueError(f"{NAME}: these {len(sealed)} bytes were not sealed by kvtier")
        sealer = BlockSealer(_secrets(os.environ), self.layout)
        if not sealer.has_secret(header.owner):
            raise ValueError(
                f"{NAME}: this chunk is encrypted for the namespace with tag {header.owner:#010x}; set "
                f'{SECRETS}="name=hex" to its secret'
            )
        plain = np.empty(len(sealed) - OVERHEAD_BYTES, np.uint8)
        if not sealer.open(sealed, plain):
            raise ValueError(
                f"{NAME}: the chunk does not open: another secret than it was sealed with, or changed bytes"
            )
        return chunk_spec.prototype.buffer.from_array_like(plain)


register_codec(NAME, ZarrAesGcm)


def _secrets(env: Mapping[str, str]) -> dict[int, bytes]:
    """By owner tag, as the environment names them. Raises ValueError."""
    found: dict[int, bytes] = {}
    for part in filter(None, env.get(SECRETS, "").split(",")):
        name, _, text = part.partition("=")
        try:
            found[owner_tag(name.strip())] = bytes.fromhex(text.strip())
        except ValueError:
            raise ValueError(f"{NAME}: {SECRETS} is to be name=hex,name=hex") from None
    return found
