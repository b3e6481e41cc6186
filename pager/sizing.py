"""How many pages and slots each layer group gets out of one byte budget per tier. Arithmetic only.

Groups with full attention need a block for every token of the context, windowed groups only for their window: giving
all groups the same number of blocks would waste most of a hybrid model's memory on layers that cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tiers.errors import ConfigError
from ..tiers.layout import KVLayout, format_bytes
from .page_table import num_blocks_of
from .streaming import RING_SLOTS, StagingRing

MIN_PAGES = 4  # a context block, the tail, a copy-on-write and a new block
WINDOWS_KEPT = 8  # windows of this many sequences (or resume points) fit in a windowed group
STAGING_SHARE = 8  # 1/8 of the device tier for streaming unless told otherwise


@dataclass(frozen=True, slots=True)
class Sizes:
    """Blocks per group in each tier, and bytes of staging per full-attention group."""

    pages: list[int]
    host_slots: list[int]
    staging_bytes: list[int]


def plan_sizes(layouts: Sequence[KVLayout], device: int, host: int, staging: int | None, has_nvme: bool) -> Sizes:
    """Divide the budgets. Raises ConfigError when a tier cannot hold the minimum."""
    staging_each = [_staging_of(layout, layouts, device, staging) for layout in layouts]
    pages = split_blocks(layouts, device - sum(staging_each))
    for layout, n in zip(layouts, pages, strict=True):
        if n < MIN_PAGES:
            need = sum(staging_each) + MIN_PAGES * sum(other.block_bytes for other in layouts)
            raise ConfigError(
                f"device_bytes={format_bytes(device)} holds {max(n, 0)} blocks of {format_bytes(layout.block_bytes)} for layer "
                f"group {layout.name!r}; at least {MIN_PAGES} are needed: give {format_bytes(need)} or use a smaller block_size"
            )
    bounce = sum(staging_each) if has_nvme else 0
    slots = split_blocks(layouts, host - bounce) if host else [0] * len(layouts)
    if host and min(slots) < 1:
        need = bounce + sum(layout.block_bytes for layout in layouts)
        raise ConfigError(
            f"host_bytes={format_bytes(host)} holds no block beside {format_bytes(bounce)} of staging; give at least "
            f"{format_bytes(need)}, or host_bytes=0 without a store"
        )
    return Sizes(pages, slots, staging_each)


def split_blocks(layouts: Sequence[KVLayout], budget: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Blocks per group: windowed groups get WINDOWS_KEPT windows at most, full ones share the rest equally.

    `sizes`: bytes that a block of each group takes; block_bytes when not given.
    """
    sizes = sizes or [layout.block_bytes for layout in layouts]
    equal = max(budget, 0) // sum(sizes)
    if all(layout.window is not None for layout in layouts):
        return [equal] * len(layouts)
    counts = [equal if layout.window is None else min(equal, _window_cap(layout, equal)) for layout in layouts]
    left = budget - sum(n * size for n, size in zip(counts, sizes, strict=True))
    full = sum(size for layout, size in zip(layouts, sizes, strict=True) if layout.window is None)
    extra = max(left, 0) // full
    return [n + extra if layout.window is None else n for n, layout in zip(counts, layouts, strict=True)]


def _window_cap(layout: KVLayout, equal: int) -> int:
    assert layout.window is not None
    per_sequence = num_blocks_of(layout.window + layout.sinks, layout.block_size) + 2
    return max(WINDOWS_KEPT * per_sequence, equal // 8, MIN_PAGES)


def _staging_of(layout: KVLayout, layouts: Sequence[KVLayout], device: int, staging: int | None) -> int:
    """Only full-attention groups stream; a device tier too small for a ring does without."""
    if layout.window is not None:
        return 0
    num_full = sum(other.window is None for other in layouts)
    wanted = (device // STAGING_SHARE if staging is None else staging) // num_full
    smallest = StagingRing.smallest_bytes(layout.layer_bytes)
    if staging == 0:
        return 0
    chunk = max(wanted, smallest) // RING_SLOTS // layout.layer_bytes
    size = RING_SLOTS * chunk * layout.layer_bytes
    return size if size * 2 <= device else 0
