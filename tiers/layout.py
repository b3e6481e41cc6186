"""KVLayout: what one block is, in bytes; and how sizes are read and written.

Memory of a block, contiguous: for each layer K [kv_heads, block, head_dim], then V [kv_heads, block, value_dim]; or, where
its form says so, packed layers of equal size whose inside is kernels' business. A pool is rows of blocks. Pure arithmetic;
the fingerprint is part of every block key, so two readings of one shape never mix, nor exact blocks and rounded ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import ConfigError

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
STORAGE_DTYPE = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}  # zarr-python has no bfloat16: bits as uint16
MAX_BLOCK_SIZE = 4096
ROW_ALIGNMENT = 16  # bytes; kernels spill registers without it
MAX_SIZE = 1 << 63
FULL, TAIL = "full", "tail"  # forms of a layer group that is not packed
MAX_FORM = 64
_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of a block of one layer group.

    value_dim: width of V where it differs from K's head_dim (MLA). window: tokens that a query sees, itself included
    (None: all). sinks: first tokens kept beside the window. form: "full"; a page format such as "int8/64", whose layers take
    packed_bytes each; or "tail", the newest tokens of a packed group in full precision: its window is what is kept of them,
    and only a block that is not whole has to be there. Raises ConfigError on construction for what cannot be.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: str = "bfloat16"
    value_dim: int | None = None
    window: int | None = None
    sinks: int = 0
    name: str = "full"
    form: str = FULL
    packed_bytes: int = 0

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "head_dim"):
            _require_positive(field, getattr(self, field))
        size = self.block_size
        if (
            not isinstance(size, int)
            or isinstance(size, bool)
            or size < 1
            or size > MAX_BLOCK_SIZE
            or size & (size - 1)
        ):
            raise ConfigError(f"block_size={size!r}: use a power of two from 1 to {MAX_BLOCK_SIZE}, e.g. 16, 64 or 256")
        if self.dtype not in ITEMSIZE:
            raise ConfigError(f"dtype={self.dtype!r} is unknown; choose {', '.join(ITEMSIZE)}")
        if self.value_dim is not None:
            _require_positive("value_dim", self.value_dim)
        if self.window is not None:
            _require_positive("window", self.window)
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ConfigError(f"sinks={self.sinks}: must not be negative")
        for field, width in (("head_dim", self.head_dim), ("value_dim", self.v_dim)):
            if width * ITEMSIZE[self.dtype] % ROW_ALIGNMENT:
                raise ConfigError(
                    f"{field}={width} with dtype={self.dtype!r} gives rows of {width * ITEMSIZE[self.dtype]} bytes; kernels "
                    f"need a multiple of {ROW_ALIGNMENT}"
                )
        if not isinstance(self.name, str):
            raise ConfigError(f"name={self.name!r:.80}: give a text")
        self._check_form()

    def _check_form(self) -> None:
        if not isinstance(self.form, str) or not 0 < len(self.form) <= MAX_FORM:
            raise ConfigError(f"form={self.form!r:.80}: give {FULL!r}, {TAIL!r} or a page format such as 'int8/64'")
        if not self.is_packed and self.packed_bytes == 0:
            return
        _require_positive("packed_bytes", self.packed_bytes)
        if not self.is_packed or self.packed_bytes % ROW_ALIGNMENT or self.packed_bytes > self.full_layer_bytes:
            raise ConfigError(
                f"packed_bytes={self.packed_bytes} with form={self.form!r}: a packed layer takes a multiple of {ROW_ALIGNMENT} "
                f"bytes, {self.full_layer_bytes} at most, and another form takes none"
            )

    @property
    def is_packed(self) -> bool:
        """Whether only kernels can tell what lies where in a layer."""
        return self.form not in (FULL, TAIL)

    @property
    def is_tail(self) -> bool:
        return self.form == TAIL

    @property
    def num_kept(self) -> int:
        """Whole blocks before the one that is being filled that a tail keeps."""
        return (self.window - 1) // self.block_size if self.is_tail and self.window is not None else 0

    @property
    def format_text(self) -> str:
        """The format that blocks have, as settings say it."""
        return self.form if self.is_packed else FULL

    @property
    def v_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def itemsize(self) -> int:
        """Bytes of one stored element."""
        return 1 if self.is_packed else ITEMSIZE[self.dtype]

    @property
    def key_bytes(self) -> int:
        """K of one layer of one block, in full precision."""
        return self.num_kv_heads * self.block_size * self.head_dim * ITEMSIZE[self.dtype]

    @property
    def value_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * self.v_dim * ITEMSIZE[self.dtype]

    @property
    def full_layer_bytes(self) -> int:
        """K and V of one layer of one block, in full precision."""
        return self.key_bytes + self.value_bytes

    @property
    def layer_bytes(self) -> int:
        return self.packed_bytes if self.is_packed else self.full_layer_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        return np.dtype("|u1" if self.is_packed else STORAGE_DTYPE[self.dtype])

    @property
    def block_shape(self) -> tuple[int, ...]:
        """[layers, 2, kv_heads, block, head_dim], or [layers, elements] where K and V differ in width or are packed."""
        if self.v_dim == self.head_dim and not self.is_packed:
            return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)
        return (self.num_layers, self.layer_bytes // self.itemsize)

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What from_dict takes; without a form where it is the plain one, so that stores keep the fingerprint they had."""
        said = asdict(self)
        if self.form == FULL:
            del said["form"]
        if not self.is_packed:
            del said["packed_bytes"]
        return said

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> KVLayout:
        try:
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(f"layout fields {sorted(fields)} are not those of this version: {error}") from error


def parse_bytes(size: int | str, *, name: str = "size", total: int | None = None) -> int:
    """Bytes of an int or of text such as "8GiB", "512MB" or, where `total` is known, "80%". Raises ConfigError."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"{name}={size!r}: give a number of bytes or text such as '8GiB'")
    if isinstance(size, int):
        if size < 0:
            raise ConfigError(f"{name}={size}: must not be negative")
        return _checked_size(size, size, name)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z%]*)\s*", size)
    if match:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and total is not None:
            return _checked_size(total * number / 100, size, name)
        if unit != "b":
            unit = unit.removesuffix("b")
        if unit in _UNITS:
            return _checked_size(number * _UNITS[unit], size, name)
    raise ConfigError(f"{name}={size!r} is not a size; write bytes or a number with KiB, MiB, GiB, TiB (or KB, MB, GB)")


def _checked_size(nbytes: float, said: int | str, name: str) -> int:
    if not nbytes < MAX_SIZE:
        raise ConfigError(f"{name}={said!r}: more than there can be; give at most 8 EiB")
    return int(nbytes)


def format_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _require_positive(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field}={value!r}: must be a whole number of at least 1")
