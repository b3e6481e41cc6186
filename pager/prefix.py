"""Prefix matching: how much of a prompt some tier already holds, and taking it over.

A prefix of n blocks is usable when every full-attention group has all n blocks and every windowed group has the blocks
that a query at that point sees. Changes references only through `adopt` and its like. A match is told in tokens, by the
tier that held them at match time; lookups.py counts.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ..tiers.errors import BlockMissError
from . import kept
from .core import Core
from .group import BlockGroup
from .page_table import Sequence, lowest_needed, lowest_visible, num_blocks_of, visible_blocks
from .states import NOWHERE, IntArray


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens of a prompt that need no computing, by the tier that holds them; ghosts were held and evicted."""

    tokens: int
    device_tokens: int = 0
    host_tokens: int = 0
    nvme_tokens: int = 0
    ghost_tokens: int = 0

    def __add__(self, other: Match) -> Match:
        return Match(
            self.tokens + other.tokens,
            self.device_tokens + other.device_tokens,
            self.host_tokens + other.host_tokens,
            self.nvme_tokens + other.nvme_tokens,
            self.ghost_tokens + other.ghost_tokens,
        )


def match_keys(core: Core, keys: list[bytes], first: int = 0) -> tuple[int, list[IntArray]]:
    """Longest usable prefix in blocks, at least `first` (already held); and per group the block ids of keys[first:].

    Cost: a dictionary look-up per run of blocks that was found before, else per block, stopping behind the first miss of the
    full groups.
    """
    found: list[IntArray] = []
    end = len(keys)
    for group in core.groups:
        blocks = np.empty(0, np.int64)
        if group.layout.window is None:
            blocks = group.runs.find(keys, first, end)
            valid = group.directory.is_valid(blocks)
            end = first + (len(valid) if valid.all() else int(np.argmin(valid)))
        found.append(blocks)
    for index, group in enumerate(core.groups):
        if group.layout.window is not None:
            if group.layout.is_tail:  # a cached prefix is read packed, whatever somebody has kept of it
                found[index] = np.full(end - first, NOWHERE)
                continue
            blocks = group.directory.find(keys[first:end])
            found[index] = np.where(group.directory.is_valid(blocks), blocks, NOWHERE)
        found[index] = found[index][: end - first]
    usable = np.ones(end - first + 1, bool)  # usable[i]: first + i blocks can be resumed from
    for group, blocks in zip(core.groups, found, strict=True):
        if group.layout.window is not None and not group.layout.is_tail:
            usable &= _window_complete(core, group.layout.window, group.layout.sinks, blocks >= 0, first)
    usable[0] = True
    best = int(np.flatnonzero(usable)[-1])
    return first + best, [blocks[:best] for blocks in found]


def _window_complete(
    core: Core, window: int, sinks: int, has: npt.NDArray[np.bool_], first: int
) -> npt.NDArray[np.bool_]:
    """For every n: whether blocks [window start at token n*size, n) and the sinks are all there (past `first`)."""
    size, total = core.block_size, len(has)
    missing = np.concatenate([[0], np.cumsum(~has)])
    n = np.arange(total + 1)
    low = np.clip(((n + first) * size - window + 1) // size - first, 0, n)
    complete: npt.NDArray[np.bool_] = missing[n] - missing[low] == 0
    if first == 0:
        complete &= missing[np.minimum(num_blocks_of(sinks, size), n)] == 0
    return complete


def adopt(core: Core, seq: Sequence, limit_tokens: int) -> Match:
    """Extend a sequence by cached blocks that follow its computed tokens, up to limit_tokens."""
    size = core.block_size
    if seq.num_computed % size or seq.num_computed >= limit_tokens:
        return Match(0)
    first = seq.num_computed // size
    seq.chain.extend(seq.keys, seq.token_ids[: limit_tokens // size * size])
    end, found = match_keys(core, seq.keys[: limit_tokens // size], first)
    if end == first:
        return Match(0, ghost_tokens=_ghosts(core, seq.keys[first : limit_tokens // size]))
    tiers = _blocks_by_tier(core, found)
    for group, table, blocks in zip(core.groups, seq.tables, found, strict=True):
        kept = blocks.copy()
        low = lowest_visible(group.layout, end * size) // size - first
        sink_blocks = num_blocks_of(group.layout.sinks, size) - first
        index = np.arange(len(kept))
        kept[(index < low) & (index >= sink_blocks)] = NOWHERE
        table.extend(kept)
        group.ref(kept[kept >= 0])
        group.touch_chain(kept[kept >= 0], first + index[kept >= 0])
    seq.num_computed = end * size
    return Match(
        tokens=(end - first) * size,
        device_tokens=tiers[0] * size,
        host_tokens=tiers[1] * size,
        nvme_tokens=tiers[2] * size,
        ghost_tokens=_ghosts(core, seq.keys[end : limit_tokens // size]),
    )


def adopt_tail(core: Core, seq: Sequence, limit_tokens: int) -> Match:
    """After `adopt`: extend by the longest sealed tail that continues the prompt, up to limit_tokens.

    Cost: one hash per token of a block at most; sealed tails are found by trying every length.
    """
    size = core.block_size
    if seq.num_computed % size:
        return Match(0)
    for num_tokens in range(min(size - 1, limit_tokens - seq.num_computed), 0, -1):
        if take_tail(core, seq, num_tokens):
            tier = int(_tier_of_each(core, [table.ids[-1:] for table in seq.tables])[0])
            return Match(num_tokens, *(num_tokens * (tier == index) for index in range(3)))
    return Match(0)


def take_back(core: Core, seq: Sequence, num_tokens: int, tail_keys: list[bytes]) -> bool:
    """Give an empty sequence all that its token at num_tokens sees, found by key. False where a block of it is missing.

    `tail_keys`: names of the partial tail block in each group, where they are not of what it holds.
    Unlike `adopt`, asks a windowed group only for what is seen from the end of the tail, not from its start.
    """
    full, rest = divmod(num_tokens, core.block_size)
    seq.chain.extend(seq.keys, seq.token_ids[: full * core.block_size])
    if rest and len(tail_keys) != len(core.groups):
        tail_keys = [seal_key(core, seq, num_tokens)] * len(core.groups)
    found = []
    for group, tail in zip(core.groups, tail_keys if rest else [b""] * len(core.groups), strict=True):
        ids = group.directory.find([*seq.keys[:full], *([tail] if rest else [])])
        seen = visible_blocks(group.layout, num_tokens, num_tokens)
        if group.layout.is_tail:
            seen = seen[seen >= full]
        if not group.directory.is_valid(ids[seen]).all():
            return False
        found.append((group, ids, seen))
    for (group, ids, seen), table in zip(found, seq.tables, strict=True):
        table.extend(np.where(np.isin(np.arange(len(ids)), seen), ids, NOWHERE))
        group.ref(ids[seen])
        group.touch_chain(ids[seen], seen)
    seq.num_computed = num_tokens
    return True


def seal_key(core: Core, seq: Sequence, num_tokens: int) -> bytes:
    """The key of the partial block that ends at num_tokens, named by what it holds."""
    full = num_tokens // core.block_size
    tail = seq.token_ids[full * core.block_size : num_tokens]
    return seq.chain.seal(seq.keys[full - 1] if full else None, tail, full)


def take_tail(core: Core, seq: Sequence, num_tokens: int) -> bool:
    """Extend a sequence of whole blocks by the sealed tail of exactly so many tokens. False where none is held.

    What a window sees from the end of the tail is part of what it sees from its start, so nothing else is checked.
    """
    start, full = seq.num_computed, seq.num_computed // core.block_size
    key = seal_key(core, seq, start + num_tokens)
    found = [group.directory.find([key]) for group in core.groups]
    if not all(group.directory.is_valid(block).all() for group, block in zip(core.groups, found, strict=True)):
        return False
    for group, table, block in zip(core.groups, seq.tables, found, strict=True):
        table.extend(block)
        group.ref(block)
        group.touch_chain(block, np.array([full]))
    seq.num_computed += num_tokens
    return True


def lose(core: Core, seq: Sequence, logical: int, group: BlockGroup) -> NoReturn:
    """A block of this sequence is gone from a group: count only what lies before it, and say so.

    Of a tail nothing but the block that is being filled is missed: without another the same is asked for again.
    """
    had = seq.num_computed
    if group.layout.is_tail and logical < had // core.block_size:
        kept.forget(group, seq.tables[group.index], logical + 1)
    else:
        rewind(core, seq, logical * core.block_size)
    core.counters.add("lost_tokens", had - seq.num_computed)
    raise BlockMissError(
        f"sequence {seq.id}: block {logical} is in no tier any more; compute again from token {seq.num_computed}",
        seq=seq.id,
        num_valid=seq.num_computed,
    )


def rewind(core: Core, seq: Sequence, num_tokens: int) -> None:
    """Count only the first num_tokens as computed, or fewer where a windowed group no longer holds what that point sees.

    Token ids stay. Blocks that fell out of a window are taken back by key where some tier still has them.
    """
    core.trim(seq, num_tokens)
    size, now = core.block_size, seq.num_computed
    for group, table in zip(core.groups, seq.tables, strict=True):
        if group.layout.window is None:
            continue
        low = lowest_needed(group.layout, now) // size
        window = np.arange(low, len(table))
        gone = window[table.ids[window] == NOWHERE]
        if len(gone) and int(gone[-1]) == now // size:  # what ends in the middle of a block has no key to find it by
            rewind(core, seq, now // size * size)
            return
        if len(gone):
            seq.chain.extend(seq.keys, seq.token_ids[: now // size * size])
            blocks = group.directory.find([seq.keys[i] for i in gone.tolist()])
            if not group.directory.is_valid(blocks).all():
                core.drop_tables(seq, released=False)
                adopt(core, seq, now // size * size)
                return
            table.put(gone, blocks)
            group.ref(blocks)


def next_cached_block(core: Core, seq: Sequence, end_tokens: int) -> int | None:
    """First block behind the computed tokens that full groups could adopt once the gap before it is computed."""
    size = core.block_size
    first = num_blocks_of(seq.num_computed + 1, size)
    keys = seq.keys[first : end_tokens // size]
    groups = [group for group in core.groups if not group.layout.is_tail]  # a tail holds nothing at a block's end
    if not keys or any(group.layout.window is not None for group in groups):
        return None
    has = np.ones(len(keys), bool)
    for group in groups:
        has &= group.directory.is_valid(group.directory.find(keys))
    return first + int(np.argmax(has)) if has.any() else None


def peek(core: Core, namespace: str, token_ids: Tokens[int]) -> Match:
    """What `adopt` would find for a new sequence; changes and counts nothing.

    Cost: as of `match_keys`, beside a hash per block that is held and not remembered; what lies behind is not hashed.
    """
    keys: list[bytes] = []
    full = [group.directory.by_key for group in core.groups if group.layout.window is None]

    def goes_on(key: bytes) -> bool:
        return all(key in by_key for by_key in full) or core.ghosts.get(key) is not None

    core.chain(namespace).extend(keys, token_ids, goes_on if full else None)
    end, found = match_keys(core, keys)
    size = core.block_size
    device, host, nvme = _blocks_by_tier(core, found)
    return Match(end * size, device * size, host * size, nvme * size, _ghosts(core, keys[end:]))


def residency(core: Core, seq: Sequence) -> Match:
    """Where the computed tokens of a sequence are now, each by the slowest tier that its next step would read."""
    size = core.block_size
    tiers = _tier_of_each(core, [table.ids for table in seq.tables])
    tokens = np.clip(seq.num_computed - np.arange(len(tiers)) * size, 0, size)
    device, host, nvme = (int(tokens[tiers == tier].sum()) for tier in range(3))
    return Match(seq.num_computed, device, host, nvme)


def bring_back_s(core: Core, seqs: list[Sequence]) -> list[float]:
    """Seconds to bring each sequence's blocks up from the host tier as far as it has room for them, else from nvme.

    Infinite where no tier below has room for what it would have to write down.
    """
    up_s, read_s = (core.costs.load_s(1.0, way) for way in ("host_to_device", "nvme_to_host"))  # per byte
    each_s = [0.0] * len(seqs)
    for i, group in enumerate(core.groups):
        d, host_room = group.directory, dict[int, int]()  # by owner; counting it looks at the whole tier
        for number, seq in enumerate(seqs):
            owner, ids = seq.chain.owner, seq.tables[i].ids
            if owner not in host_room:
                host_room[owner] = group.leaving.host_room(asker=owner)
            blocks = ids[ids >= 0]
            others = blocks[~d.in_host(blocks)]
            from_nvme = max(0, len(others) - host_room[owner])
            each_s[number] += len(blocks) * group.tier_bytes("host") * up_s
            each_s[number] += from_nvme * group.tier_bytes("nvme") * read_s
            if not group.can_write_nvme and int((~d.nvme_valid[others]).sum()) > host_room[owner]:
                each_s[number] = float("inf")
    return each_s


def _blocks_by_tier(core: Core, found: list[IntArray]) -> tuple[int, int, int]:
    tiers = _tier_of_each(core, found)
    return int((tiers == 0).sum()), int((tiers == 1).sum()), int((tiers == 2).sum())


def _tier_of_each(core: Core, found: list[IntArray]) -> IntArray:
    """Per block 0 device, 1 host, 2 nvme: the slowest that any group needs (windowed groups may not need theirs)."""
    slowest = np.zeros(len(found[0]), np.int64)
    for group, blocks in zip(core.groups, found, strict=True):
        safe, held = np.maximum(blocks, 0), blocks >= 0
        d = group.directory
        in_device = d.in_device(safe)
        if (in_device | ~held).all():
            continue
        in_memory = d.in_host(safe)
        if group.cold is not None:
            in_memory |= group.cold.is_near(safe)
        tier = np.where(in_device, 0, np.where(in_memory, 1, 2))
        slowest = np.where(held, np.maximum(slowest, tier), slowest)
    return slowest


def _ghosts(core: Core, keys: list[bytes]) -> int:
    count = 0
    for key in keys:  # stops at the first key that was never held: thrashing is contiguous
        if core.ghosts.get(key) is None:
            break
        count += core.block_size
    return count
