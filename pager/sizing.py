"""How many pages and slots each layer group gets out of one byte budget per tier. Arithmetic only.

Groups with full attention need a block for every token of the context, windowed groups only for their window: giving
all groups the same number of blocks would waste most of a hybrid model's memory on layers that cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tiers.errors import ConfigError
from ..tiers.formats import BlockFormat, tail_of
from ..tiers.layout import KVLayout, format_bytes
from ..tiers.packed_slab import width_of
from .page_table import num_blocks_of
from .selecting import MIN_SLICES
from .streaming import MAX_BOUNCE_SLOTS, RING_SLOTS, StagingRing

MIN_PAGES = 4  # a context block, the tail, a copy-on-write and a new block
WINDOWS_KEPT = 8  # windows of this many sequences (or resume points) fit in a windowed group
TAIL_TOKENS = 4096  # of a step's new tokens, in the device tier, where pages are packed,
TAILS_KEPT = 16  # beside the blocks that so many sequences are filling;
TAIL_SHARE, MOST_TAIL_SHARE = 256, 8  # 1/256 of it where that is more, at most 1/8
MIN_TAIL_PAGES = 8  # three blocks of new tokens, without what is kept
STAGING_SHARE = 8  # 1/8 of the device tier for streaming unless told otherwise,
STAGING_SHARE_OF_SMALL = 4  # and up to 1/4 of a small one, where chunks would cost more calls than they move bytes:
BOUNCE_SHARE = 6  # at most 1/6 of the host tier is read ahead into
STAGING_CHUNK_BYTES = 2 << 20  # about as long on a disk or a bus as one call of the kernels takes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Blocks per group in each tier, and bytes of staging per full-attention group."""

    pages: list[int]
    host_slots: list[int]
    staging_bytes: list[int]
    bounce_bytes: list[int]  # in the host tier, likewise
    summaries: list[int]  # key summaries of selected attention, one per block, in the device tier
    slices: list[int]  # layer slices that it picks, likewise


def plan_sizes(
    layouts: Sequence[KVLayout],
    device: int,
    host: int,
    staging: int | None,
    has_nvme: bool,
    host_formats: Sequence[BlockFormat] | None = None,
    selection: int = 0,
) -> Sizes:
    """Divide the budgets. Raises ConfigError when a tier cannot hold the minimum."""
    summaries, slices = plan_selection(layouts, selection)
    left = device - selection if any(summaries) else device
    staging_each = [_staging_of(layout, layouts, left, staging) for layout in layouts]
    pages = _pages(layouts, left - sum(staging_each))
    least_pages = [_least_pages(layouts, index) for index in range(len(layouts))]
    for layout, n, few in zip(layouts, pages, least_pages, strict=True):
        if n < few:
            smallest = sum(few * other.block_bytes for few, other in zip(least_pages, layouts, strict=True))
            need = device - left + sum(staging_each) + smallest
            raise ConfigError(
                f"device_bytes={format_bytes(device)} holds {max(n, 0)} blocks of {format_bytes(layout.block_bytes)} for layer "
                f"group {layout.name!r}; at least {few} are needed: give {format_bytes(need)} or use a smaller block_size"
            )
    bounce_each = [_bounce_of(staging, host // len(layouts)) if has_nvme else 0 for staging in staging_each]
    bounce = sum(bounce_each)
    sizes = [fmt.block_bytes for fmt in host_formats or ()] or [layout.block_bytes for layout in layouts]
    least = [width_of(fmt) for fmt in host_formats or ()] or [1] * len(layouts)  # a tail, in full precision
    slots = split_blocks(layouts, host - bounce, sizes) if host else [0] * len(layouts)
    if host and any(n < few for n, few in zip(slots, least, strict=True)):
        need = bounce + sum(size * few for size, few in zip(sizes, least, strict=True))
        raise ConfigError(
            f"host_bytes={format_bytes(host)} holds no block beside {format_bytes(bounce)} of staging; give at least "
            f"{format_bytes(need)}, or host_bytes=0 without a store"
        )
    return Sizes(pages, slots, staging_each, bounce_each, summaries, slices)


def summary_bytes(layout: KVLayout) -> int:
    """Minimum and maximum of every key channel of a block, all layers, in full precision whatever the block is in."""
    return layout.key_bytes // layout.block_size * 2 * layout.num_layers


def plan_selection(layouts: Sequence[KVLayout], nbytes: int) -> tuple[list[int], list[int]]:
    """Half for key summaries, half for picked slices, of full-attention groups. Raises ConfigError where it is too little."""
    full = [layout for layout in layouts if layout.window is None]
    none = [0] * len(layouts)
    if not nbytes or not full:
        return none, none
    blocks = nbytes // 2 // sum(map(summary_bytes, full))  # as many of each group
    summaries = [blocks if layout.window is None else 0 for layout in layouts]
    whole = sum(layout.block_bytes for layout in full)
    each = [nbytes // 2 * layout.block_bytes // whole // layout.layer_bytes for layout in full]  # as its layers pick
    shares = iter(each)
    slices = [next(shares) if layout.window is None else 0 for layout in layouts]
    if min(each) < MIN_SLICES:
        need = 2 * -(-MIN_SLICES * whole // min(layout.num_layers for layout in full))
        raise ConfigError(
            f"selection_bytes={format_bytes(nbytes)} holds fewer than {MIN_SLICES} slices of one layer; give at least "
            f"{format_bytes(need)}, or 0 to do without"
        )
    return summaries, slices


def _pages(layouts: Sequence[KVLayout], budget: int) -> list[int]:
    """Pages per group: tails first, which hold only what is being computed; the rest is the blocks'."""
    tails = {i: layout for i, layout in enumerate(layouts) if layout.is_tail}
    each = budget // max(1, len(tails))
    counts = {i: _tail_pages(layout, max(each, 0)) for i, layout in tails.items()}
    left = budget - sum(counts[i] * layout.block_bytes for i, layout in tails.items())
    others = iter(split_blocks([layout for layout in layouts if not layout.is_tail], left))
    return [counts[i] if i in counts else next(others) for i in range(len(layouts))]


def _tail_pages(layout: KVLayout, budget: int) -> int:
    wanted = num_blocks_of(TAIL_TOKENS, layout.block_size) + TAILS_KEPT * (1 + layout.num_kept)
    most = budget // MOST_TAIL_SHARE // layout.block_bytes
    return max(min(max(wanted, budget // TAIL_SHARE // layout.block_bytes), most), _least_tail(layout))


def _least_tail(layout: KVLayout) -> int:
    """Three blocks of new tokens behind what one sequence keeps."""
    return MIN_TAIL_PAGES + layout.num_kept


def _least_pages(layouts: Sequence[KVLayout], index: int) -> int:
    """Of a packed group what its tail keeps stays in the device tier too, although it is not read there."""
    return (
        _least_tail(layouts[index]) if layouts[index].is_tail else MIN_PAGES + layouts[tail_of(layouts, index)].num_kept
    )


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
    """What the ring takes, no more. Only full-attention groups stream; a device tier too small for a ring does without."""
    if layout.window is not None:
        return 0
    num_full = sum(other.window is None for other in layouts)
    usual = max(
        device // STAGING_SHARE, min(device // STAGING_SHARE_OF_SMALL, num_full * RING_SLOTS * STAGING_CHUNK_BYTES)
    )
    wanted = (usual if staging is None else staging) // num_full
    if staging == 0:
        return 0
    size = RING_SLOTS * StagingRing.chunk_slices_of(layout.layer_bytes, wanted) * layout.layer_bytes
    return size if size * 2 <= device else 0


def _bounce_of(staging: int, host: int) -> int:
    """Host bytes to read a ring's chunks into: as many of them as the ring has, and more where that is a small share."""
    chunk = staging // RING_SLOTS
    return chunk * max(RING_SLOTS, min(MAX_BOUNCE_SLOTS, host // BOUNCE_SHARE // chunk)) if chunk else 0
