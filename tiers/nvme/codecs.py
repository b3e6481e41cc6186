"""Codecs of blocks, by name: what goes into zarr.json, and the same bytes made and read without zarr.

    none    the block's bytes as they are: preallocated, read layer by layer, at the disk's speed
    lz4     Blosc, bitshuffle, lz4: the fastest
    zstd    Blosc, bitshuffle, zstd
    split   planes of bytes, zstd where that helps (split.py): the smallest for random mantissas; needs kvtier to be installed
    int4..  what `formats.py` reads as formats of layers, at least one of them lossy (frames.py); needs kvtier and torch
    aes     encrypted (sealing.py); `lz4+aes`, `zstd+aes`, `split+aes`: made smaller first

An encoder takes a row and returns bytes that Zarr's codec of that name decodes; a decoder fills a row whose size is
known, and refuses whatever does not fill it exactly. Loads numcodecs or zarr only when a codec is asked for.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..formats import is_policy
from ..layout import KVLayout
from .frames import PagesCodec
from .sealing import OVERHEAD_BYTES

_LOG = logging.getLogger("kvtier.tiers")
NONE, AES = "none", "aes"
_PLUS_AES = "+aes"
Row = npt.NDArray[np.uint8]

_BITSHUFFLE = 2
_BLOSC_OVERHEAD_BYTES = 16  # of a frame that holds its bytes as they were: the header
_BLOSC_MOST_BYTES = 2**31 - 1 - _BLOSC_OVERHEAD_BYTES
_BLOSC_HEADER = struct.Struct("<4B3I")  # version, its compressor's, flags, typesize; bytes, block, bytes of the frame


class BlockCodec(Protocol):
    """One array's codec. Called from many threads at once."""

    @property
    def overhead_bytes(self) -> int:
        """How many bytes more than the block its encoding can have."""

    def encode(self, row: Row) -> bytes: ...

    def decode(self, encoded: Row, row: Row) -> None:
        """Fill the row. Raises ValueError when these bytes are not an encoding of exactly so many."""

    def zarr_codec(self) -> Any:
        """What stands between `bytes` and `crc32c` in the array's metadata. Loads zarr."""


def check_codec(name: Any, *, where: str = "codec") -> str:
    """The name, if there is such a codec. Raises ConfigError."""
    if not isinstance(name, str) or (name not in (*CODECS, *ENCRYPTED) and not is_policy(name)):
        raise ConfigError(f"{where}={name!r} is unknown; choose {', '.join((*CODECS, *ENCRYPTED))}")
    return name


def is_encrypted(name: str) -> bool:
    return name in ENCRYPTED


def is_lossy(name: str) -> bool:
    """Whether blocks come back near what was written, not as it was."""
    return name not in CODECS and not is_encrypted(name)


def usual_bytes(name: str, layout: KVLayout) -> int | None:
    """Stored bytes of a whole block where its encoding says so beforehand; None where it depends on the values."""
    return codec.usual_bytes if isinstance(codec := codec_for(name, layout), PagesCodec) else None


def check_mix(names: Sequence[str], *, where: str = "codecs") -> None:
    """Raises ConfigError where some groups would be encrypted and others not: what one hides, the other would show."""
    if len({is_encrypted(name) for name in names}) > 1:
        raise ConfigError(f"{where}={', '.join(names)}: encrypt all layer groups of a store, or none")


def overhead_of(name: str, layout: KVLayout) -> int | None:
    """Bytes that an encoded block can have more than the block; None where it is not encoded. Raises ConfigError."""
    codec = codec_for(name, layout)
    if codec is None and not is_encrypted(name):
        return None
    return (codec.overhead_bytes if codec else 0) + (OVERHEAD_BYTES if is_encrypted(name) else 0)


def zarr_codecs(name: str, layout: KVLayout) -> list[Any]:
    """What stands between `bytes` and `crc32c` in the array's metadata. Loads zarr where there is any, which then knows it."""
    codec = codec_for(name, layout)
    stages = [] if codec is None else [codec.zarr_codec()]
    if is_encrypted(name):
        from .zarr_aes import ZarrAesGcm

        stages.append(ZarrAesGcm(layout=layout.fingerprint))
    return stages


def codec_for(name: str, layout: KVLayout) -> BlockCodec | None:
    """What makes blocks of this layout smaller, None for `none` and `aes`. Raises ConfigError."""
    if is_policy(name):
        return PagesCodec(layout, name)
    make = CODECS[NONE if check_codec(name) == AES else name.removesuffix(_PLUS_AES)]
    if layout.block_bytes > _BLOSC_MOST_BYTES and name != NONE:
        raise ConfigError(f"codec={name!r} takes blocks below 2 GiB; use a smaller block_size than {layout.block_size}")
    return None if make is None else make(layout)


def check_codecs(names: Sequence[str] | None, layouts: Sequence[KVLayout]) -> list[str] | None:
    """One name per layer group, formats in their shortest text, or None for whatever there is. Raises ConfigError."""
    if names is None:
        return None
    if len(names) != len(layouts):
        raise ConfigError(f"codecs={list(names)!r}: {len(layouts)} layer groups need one each")
    made = [codec_for(name, layout) for name, layout in zip(names, layouts, strict=True)]
    check_mix(names)
    return [codec.fmt.text if isinstance(codec, PagesCodec) else name for name, codec in zip(names, made, strict=True)]


def warn_of_others(path: Path, kept: Sequence[str], asked: Sequence[str] | None) -> None:
    """Say in the log where an array keeps another codec than was asked for."""
    for index, (has, wanted) in enumerate(zip(kept, asked or kept, strict=True)):
        if has != wanted:
            _LOG.warning(
                "store %s: array g%d was made with codec=%r and keeps it, codec=%r is ignored; `kvtier store export "
                "--codec %s` copies a store into another",
                path,
                index,
                has,
                wanted,
                wanted,
            )


class BloscCodec:
    """Zarr's `blosc`, with bits shuffled: the bits of exponents lie together and repeat, those of mantissas do not."""

    overhead_bytes = _BLOSC_OVERHEAD_BYTES

    def __init__(self, layout: KVLayout, name: str, level: int, piece_bytes: int) -> None:
        from numcodecs import blosc

        blosc.use_threads = False  # as zarr sets it: Blosc's own threads are one pool with one lock
        self._blosc, self._name, self._level, self._piece_bytes = blosc, name, level, piece_bytes
        self._itemsize = layout.itemsize

    def encode(self, row: Row) -> bytes:
        frame: bytes = self._blosc.compress(
            row, self._name.encode(), self._level, _BITSHUFFLE, self._piece_bytes, self._itemsize
        )
        return frame

    def decode(self, encoded: Row, row: Row) -> None:
        if len(encoded) < _BLOSC_HEADER.size:
            raise ValueError(f"{len(encoded)} bytes are no Blosc frame")
        *_, nbytes, _, frame_bytes = _BLOSC_HEADER.unpack_from(encoded.data)
        if nbytes != row.nbytes or frame_bytes != len(encoded):
            raise ValueError(
                f"a Blosc frame of {frame_bytes} bytes that holds {nbytes}, where {len(encoded)} were to hold {row.nbytes}"
            )
        try:
            self._blosc.decompress(encoded, row)
        except RuntimeError as error:
            raise ValueError(f"not a Blosc frame: {error}") from error

    def zarr_codec(self) -> Any:
        from zarr.codecs import BloscCodec as ZarrBlosc

        return ZarrBlosc(
            typesize=self._itemsize,
            cname=self._name,  # type: ignore[arg-type]
            clevel=self._level,
            shuffle="bitshuffle",
            blocksize=self._piece_bytes,
        )


class SplitCodec:
    """Our own Zarr codec `kvtier.split`, see split.py."""

    def __init__(self, layout: KVLayout) -> None:
        from . import split

        self._split, self._itemsize = split, layout.itemsize
        self.overhead_bytes = split.header_bytes(layout.itemsize)

    def encode(self, row: Row) -> bytes:
        return self._split.encode(row, self._itemsize)

    def decode(self, encoded: Row, row: Row) -> None:
        self._split.decode(encoded, row)

    def zarr_codec(self) -> Any:
        from .zarr_split import ZarrSplit

        return ZarrSplit(typesize=self._itemsize)


# Levels and piece sizes: `kvtier bench codecs`. Blosc's own choice of pieces makes zstd a third slower and 4 % larger.
CODECS: Mapping[str, Callable[[KVLayout], BlockCodec] | None] = {
    NONE: None,
    "lz4": lambda layout: BloscCodec(layout, "lz4", 5, 256 << 10),
    "zstd": lambda layout: BloscCodec(layout, "zstd", 1, 1 << 20),
    "split": SplitCodec,
}
ENCRYPTED = (AES, *(f"{name}{_PLUS_AES}" for name in CODECS if name != NONE))
