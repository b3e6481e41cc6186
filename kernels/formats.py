"""PageFormat: how the K and V of one layer of one block lie in memory when they are kept in 8, 4 or 2 bits.

Numbers only: no torch, no tensors, so that whoever sizes a tier can ask without loading them. A block is its layers back
to back, as in full precision; a layer is one K record per KV head, then one V record per KV head; a record is codes,
then scales, then zeros, so one contiguous range holds all that is needed to read it:

    block  [layer 0 | layer 1 | ...]      layer  [K of head 0 | K of head 1 | ... | V of head 0 | ...]
    record [codes: block x dim x bits | scales | zeros], parts 16-byte aligned, records 128-byte aligned

Guards: what a format cannot hold, or a kernel could not read aligned, is refused when the format is made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Axis = Literal["channel", "token", "page"]

GROUPS = (32, 64, 128)
PART_ALIGNMENT, RECORD_ALIGNMENT = 16, 128
MIN_INTEGER_TOKENS = 32  # the shortest sum that an int8 tensor-core instruction makes
TABLE_BYTES = 2  # scales and zeros are float16
MAX_PIECES = 4  # accumulators that the attention kernels keep per row: groups or bit fields of a row of V
FORMATS: dict[str, tuple[int, Axis, Axis, bool]] = {  # bits, one scale of K per .., of V per .., has zeros
    "fp8": (8, "page", "page", False),
    "int8": (8, "channel", "token", False),
    "int4": (4, "channel", "token", True),
    "int2": (2, "channel", "token", True),
    "hack8": (8, "token", "channel", True),
    "hack4": (4, "token", "channel", True),
    "hack2": (2, "token", "channel", True),
}


@dataclass(frozen=True, slots=True)
class Part:
    """K or V of one head in one block: where its codes, scales and zeros begin, in bytes from the record's start.

    axis: what one scale stands for. "channel": one channel of `group` tokens, table [block / group, dim]; "token":
    `group` channels of one token, table [dim / group, block]; "page": all of it, one number.
    """

    dim: int
    block: int
    bits: int
    axis: Axis
    group: int
    has_zeros: bool

    @property
    def fields(self) -> int:
        """Values per byte. Field j of byte c of a row is channel j * row_bytes + c: unpacking moves nothing sideways."""
        return 8 // self.bits

    @property
    def row_bytes(self) -> int:
        return self.dim // self.fields

    @property
    def table_shape(self) -> tuple[int, int]:
        if self.axis == "page":
            return (1, 1)
        long, short = (self.dim, self.block) if self.axis == "channel" else (self.block, self.dim)
        return (short // self.group, long)

    @property
    def piece(self) -> int:
        """Channels of a row that share a bit field and, per token, a scale: what one matrix product takes at once."""
        return min(self.group, self.row_bytes) if self.axis == "token" else self.row_bytes

    @property
    def scales_at(self) -> int:
        return _align(self.block * self.row_bytes, PART_ALIGNMENT)

    @property
    def zeros_at(self) -> int:
        rows, columns = self.table_shape
        return self.scales_at + _align(rows * columns * TABLE_BYTES, PART_ALIGNMENT)

    @property
    def record_bytes(self) -> int:
        tables = self.zeros_at - self.scales_at
        return _align(self.zeros_at + (tables if self.has_zeros else 0), RECORD_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class PageFormat:
    """One format for one shape of block.

    fp8: e4m3, one scale per block and head. int8: symmetric. int4, int2: asymmetric with centred codes. These keep K per
    channel and V per token (KIVI). hack8, hack4, hack2 keep K per token and V per channel, so that attention is a product
    of integers (HACK); hack2 and hack4 rotate K by a Hadamard matrix before rounding. group: values that share a scale.
    Raises: ValueError naming the field, its value and what would do.
    Source: KIVI (arXiv 2402.02750), HACK (arXiv 2502.03589); centred codes and packing by fields: measured here.
    """

    name: str
    kv_heads: int
    block: int
    head_dim: int
    value_dim: int | None = None
    group: int = 64

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"format={self.name!r} is unknown; choose {', '.join(FORMATS)}")
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads={self.kv_heads}: must be at least 1")
        if self.group not in GROUPS:
            raise ValueError(f"group={self.group}: choose one of {GROUPS}")
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block}: compressed blocks have a power of two of tokens, 16 or more")
        for field, part in (("head_dim", self.keys), ("value_dim", self.values)):
            _check_part(self, field, part)
        if self.rotates and self.head_dim & (self.head_dim - 1):
            raise ValueError(
                f"head_dim={self.head_dim}: {self.name} rotates K and needs a power of two; use int4 or int2"
            )

    @property
    def bits(self) -> int:
        return FORMATS[self.name][0]

    @property
    def is_hack(self) -> bool:
        """Say whether attention on these pages is a product of integers."""
        return self.name.startswith("hack")

    @property
    def rotates(self) -> bool:
        """Say whether K is rotated by a Hadamard matrix: per token, one outlier channel would take all the codes."""
        return self.is_hack and self.bits < 8

    @property
    def keys(self) -> Part:
        return self._part(self.head_dim, FORMATS[self.name][1])

    @property
    def values(self) -> Part:
        return self._part(self.head_dim if self.value_dim is None else self.value_dim, FORMATS[self.name][2])

    def _part(self, dim: int, axis: Axis) -> Part:
        longest = self.block if axis == "channel" else dim
        return Part(dim, self.block, self.bits, axis, min(self.group, longest), FORMATS[self.name][3])

    @property
    def layer_bytes(self) -> int:
        return self.kv_heads * (self.keys.record_bytes + self.values.record_bytes)

    @property
    def bits_per_value(self) -> float:
        """Bits per number of K and V, scales, zeros and alignment included."""
        return 8 * self.layer_bytes / (self.kv_heads * self.block * (self.keys.dim + self.values.dim))

    def block_bytes(self, num_layers: int) -> int:
        return num_layers * self.layer_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_part(fmt: PageFormat, field: str, part: Part) -> None:
    """Check that rows are cut into whole bytes, groups and pieces."""
    if part.dim < 1 or part.dim % part.fields:
        raise ValueError(
            f"{field}={part.dim}: {fmt.name} packs {part.fields} channels per byte; use a multiple of that"
        )
    if fmt.is_hack and fmt.block < MIN_INTEGER_TOKENS:
        raise ValueError(
            f"block={fmt.block}: {fmt.name} multiplies integers, {MIN_INTEGER_TOKENS} tokens or more at a time"
        )
    if fmt.is_hack and part.group < part.row_bytes and part.axis == "token":
        raise ValueError(
            f"group={fmt.group}: {fmt.name} needs groups of {part.row_bytes} channels or more at {field}={part.dim}"
        )
    if part.axis == "token":
        if part.dim % part.group or max(part.group, part.row_bytes) % min(part.group, part.row_bytes):
            raise ValueError(
                f"group={fmt.group}: does not divide {field}={part.dim} into rows of {part.row_bytes} bytes; use a group "
                f"of at least {field} (one scale per token) or another format"
            )
        if part.dim // part.piece > MAX_PIECES:
            raise ValueError(
                f"group={fmt.group}: {field}={part.dim} has more than {MAX_PIECES} groups per token; use a larger group"
            )


def _align(size: int, step: int) -> int:
    return -(-size // step) * step
