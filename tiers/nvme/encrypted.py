"""Blocks of one layer group, encrypted after a codec made them smaller or did not, to and from segment files.

Everything that encoded.py does, but for what proves a block: the tag of AES-GCM does (sealing.py), over bytes that name
the block key, the generation and the namespace. What the trailer and the manifest keep as sums is the tag, so they tell
nothing of what was sealed. Guards: what does not open is a miss, counted and said once per namespace, and its row is
zeros, never half of a decryption.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import KVLayout
from .blocks import Stamps
from .codecs import BlockCodec
from .encoded import Bytes, EncodedIo
from .files import Scratch, SegmentFiles
from .layout import Geometry, Trailer
from .sealing import OVERHEAD_BYTES, TAG_BYTES, BlockSealer, Header
from .segment_io import SegmentIo

_LOG = logging.getLogger("kvtier.nvme")


class EncryptedIo(EncodedIo):
    """Called from many workers at once."""

    def __init__(
        self,
        io: SegmentIo,
        files: SegmentFiles,
        layout: KVLayout,
        geometry: Geometry,
        codec: BlockCodec | None,
        sealer: BlockSealer,
    ) -> None:
        super().__init__(io, files, layout, geometry, codec or _AsItIs())
        self._sealer, self._opened, self._sealed = sealer, Scratch(), Scratch()
        self._is_plain = codec is None
        self._said: set[int] = set()

    def _encode(self, row: Bytes, stamp: Stamps) -> tuple[Any, npt.NDArray[np.uint64]]:
        key, generation, _, _, owner, _ = stamp[0].tolist()
        plain = np.frombuffer(row.data if self._is_plain else self._codec.encode(row), np.uint8)
        sealed = self._sealer.seal(plain, owner, key, generation, self._sealed.take(len(plain) + OVERHEAD_BYTES))
        sums = np.zeros(self._layout.num_layers, np.uint64)
        sums[0] = sealed[-TAG_BYTES:].view("<u8")[0]
        return sealed, sums

    def _decode(self, encoded: Bytes, row: Bytes, stamp: Any) -> bool:
        header = Header.of(encoded)
        is_it = header is not None and (header.key, header.generation, header.owner) == (
            stamp["key"].tobytes(),
            int(stamp["generation"]),
            int(stamp["owner"]),
        )
        if not is_it:
            return False
        plain = row if self._is_plain else self._opened.take(len(encoded) - OVERHEAD_BYTES)
        with self._working:
            is_open = self._sealer.open(encoded, plain)
        if not is_open:
            self._say(int(stamp["owner"]))
            return False
        return self._is_plain or super()._decode(plain, row, stamp)

    def _proves(self, row: Bytes, trailer: Trailer) -> bool:
        return True  # the tag did

    def _proves_slice(self, row: Bytes, trailer: Trailer, layer: int) -> bool:
        return True

    def _say(self, owner: int) -> None:
        if owner in self._said:
            return
        self._said.add(owner)
        reason = "another_secret_or_changed_bytes" if self._sealer.has_secret(owner) else "no_secret"
        _LOG.error("event=block_does_not_open owner=%08x reason=%s: counted as corrupt, computed again", owner, reason)


class _AsItIs:
    """The codec of blocks that are only encrypted."""

    overhead_bytes = 0

    def encode(self, row: Bytes) -> bytes:
        return row.tobytes()

    def decode(self, encoded: Bytes, row: Bytes) -> None:
        row[:] = encoded

    def zarr_codec(self) -> Any:
        raise NotImplementedError("nothing stands in the array's metadata for this")
