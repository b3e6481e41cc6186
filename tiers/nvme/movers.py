"""Which code moves the blocks of which layer group: as they are, encoded, in a format, or encrypted.

What a group's codec means for its blocks stands here: how many bytes of disk one is counted with, what it is rounded to,
what rows it can be read into and written from again. The bytes themselves are the movers' own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..formats import BlockFormat
from ..layout import KVLayout
from ..streams import IntArray, Rows, aligned_rows
from .blocks import BlockIo
from .codecs import codec_for, is_encrypted, usual_bytes
from .encoded import EncodedIo
from .encrypted import EncryptedIo
from .files import SegmentFiles
from .frames import PagesCodec
from .layout import Geometry
from .pages import PagesIo, StoredFrame
from .sealing import BlockSealer
from .segment_io import SegmentIo


class Movers:
    """Of one store, by layer group."""

    def __init__(
        self,
        io: SegmentIo,
        files: SegmentFiles,
        layouts: Sequence[KVLayout],
        geometries: Sequence[Geometry],
        codecs: Sequence[str],
        secrets: Mapping[int, bytes],
        *,
        with_checksums: bool,
    ) -> None:
        self._io, self._files, self._layouts = io, files, layouts
        self.codecs = list(codecs)
        self._secrets = dict(secrets)  # of namespaces, by owner tag; more may come while the store is open
        self.plain = BlockIo(io, layouts, geometries, with_checksums=with_checksums)
        self._usual = [
            geometry.counted_bytes(usual_bytes(codec, layout))
            for layout, geometry, codec in zip(layouts, geometries, codecs, strict=True)
        ]
        self._movers = [self._make(*parts) for parts in zip(layouts, geometries, codecs, strict=True)]

    def of(self, group: int) -> BlockIo | EncodedIo:
        return self._movers[group]

    def reads_parts(self, group: int, target: Rows, rows: IntArray) -> bool:
        """Whether parts of this group's blocks can be read straight into these rows."""
        return self._movers[group] is self.plain and all(self.plain.reads_parts(group, target[row]) for row in rows)

    def format(self, group: int) -> BlockFormat | None:
        """What whole blocks are rounded to; None where they are kept as they are."""
        mover = self._movers[group]
        return mover.fmt if isinstance(mover, PagesIo) else None

    def usual_bytes(self, group: int) -> int:
        """Bytes of disk that a whole block is counted with; under a format those of a packed one."""
        return self._usual[group]

    def spare_rows(self, group: int, count: int) -> Rows:
        """Rows to read blocks into and write them from again, to here or to a store of the same codec: as they are stored
        where decoding would lose something."""
        if isinstance(self._movers[group], PagesIo):
            return [StoredFrame() for _ in range(count)]
        return aligned_rows(count, self._layouts[group].block_bytes)

    @property
    def is_encrypted(self) -> bool:
        return any(map(is_encrypted, self.codecs))

    def learn(self, secrets: Mapping[int, bytes]) -> None:
        """Secrets of more namespaces, by owner tag. Those that are known stay: blocks are sealed with them."""
        self._secrets.update({owner: secret for owner, secret in secrets.items() if owner not in self._secrets})

    def _make(self, layout: KVLayout, geometry: Geometry, codec: str) -> BlockIo | EncodedIo:
        encoder = codec_for(codec, layout)
        if is_encrypted(codec):
            sealer = BlockSealer(self._secrets, layout.fingerprint)
            return EncryptedIo(self._io, self._files, layout, geometry, encoder, sealer)
        if isinstance(encoder, PagesCodec):
            return PagesIo(self._io, self._files, layout, geometry, encoder)
        return self.plain if encoder is None else EncodedIo(self._io, self._files, layout, geometry, encoder)
