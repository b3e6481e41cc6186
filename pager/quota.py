"""How much of the host and nvme tiers each namespace may hold, and how fast it may write. Bookkeeping only; nothing here
moves a block.

    ceiling   a namespace there makes room for its new blocks from itself alone; where it has nothing to give up, they wait
              one tier above
    floor     below it a namespace loses nothing to others; its own blocks may still make room for its own
    rate      bytes a second to nvme; over it, blocks stay above (and may be dropped there if nobody refers to them)
    pins      slots of the host tier that clients of the namespace may hold at a time, to read or to write, and blocks, wherever
              they are, that they have pinned for a time

Bytes are of the tier, on disk padding included. Cost: nothing where no namespace has a quota; else one pass over the
directory's arrays per question, as a choice of victims costs anyhow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from ..tiers.errors import ConfigError
from ..tiers.layout import format_bytes, parse_bytes
from .keys import owner_tag
from .rates import TokenBucket
from .settings import check_names
from .states import IntArray, SlotState

if TYPE_CHECKING:
    from .group import BlockGroup

Size = int | str
Tier = Literal["host", "nvme"]
TIERS: tuple[Tier, ...] = ("host", "nvme")
MIN_HOST_BLOCKS = 4  # of each layer group, on their way up and down at the same time


@dataclass(frozen=True, slots=True)
class NamespaceQuota:
    """Of one namespace, in bytes (pins: in blocks); None is no limit."""

    host_floor: int = 0
    host_ceiling: int | None = None
    nvme_floor: int = 0
    nvme_ceiling: int | None = None
    write_bytes_per_s: int | None = None
    pins: int | None = None

    def floor(self, tier: Tier) -> int:
        return self.host_floor if tier == "host" else self.nvme_floor

    def ceiling(self, tier: Tier) -> int | None:
        return self.host_ceiling if tier == "host" else self.nvme_ceiling

    @property
    def is_of_nvme(self) -> bool:
        return bool(self.nvme_floor) or self.nvme_ceiling is not None or self.write_bytes_per_s is not None


def parse_quota(value: Size | Mapping[str, Size], *, name: str) -> NamespaceQuota:
    """A quota from the configuration: a size alone is of nvme. Raises ConfigError."""
    if not isinstance(value, Mapping):
        return NamespaceQuota(nvme_ceiling=parse_bytes(value, name=name))
    given = check_names(value, NamespaceQuota, (), where=f"{name}.")
    quota = NamespaceQuota(**{key: parse_bytes(size, name=f"{name}.{key}") for key, size in given.items()})
    for tier in TIERS:
        ceiling = quota.ceiling(tier)
        if ceiling is not None and ceiling < quota.floor(tier):
            raise ConfigError(
                f"{name}: {tier}_floor={format_bytes(quota.floor(tier))} is above {tier}_ceiling={format_bytes(ceiling)}"
            )
    if quota.write_bytes_per_s == 0:
        raise ConfigError(f"{name}.write_bytes_per_s=0 would never write; leave it out, or set nvme_ceiling=0")
    return quota


def check_floors(quotas: Mapping[str, NamespaceQuota], sizes: Mapping[Tier, int | None]) -> None:
    """What is promised must be there. Raises ConfigError."""
    for tier, size in sizes.items():
        promised = sum(quota.floor(tier) for quota in quotas.values())
        if size is not None and promised > size:
            raise ConfigError(
                f"{tier}_floor of all namespaces is {format_bytes(promised)} together, the {tier} tier has "
                f"{format_bytes(size)}: lower floors, or raise {tier}_bytes"
            )


class Quotas:
    """Of one pager, by namespace; namespaces without one share what there is. The pager's lock is held by the caller."""

    def __init__(self, quotas: Mapping[str, NamespaceQuota], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._groups: Sequence[BlockGroup] = ()
        self._buckets: dict[int, TokenBucket] = {}
        self.update(quotas)

    def update(self, quotas: Mapping[str, NamespaceQuota]) -> None:
        """These hold from now on. What is held above a lowered ceiling stays until it leaves."""
        now_s = self._clock()
        self._names = {owner_tag(name): name for name in quotas}
        self._quotas = {owner_tag(name): quota for name, quota in quotas.items()}
        old, self._buckets = self._buckets, {}
        for owner, quota in self._quotas.items():
            if quota.write_bytes_per_s is not None:
                bucket = self._buckets[owner] = old.get(owner) or TokenBucket(quota.write_bytes_per_s, now_s)
                bucket.set_rate(quota.write_bytes_per_s, now_s)

    def watch(self, groups: Sequence[BlockGroup]) -> None:
        """The quota of a namespace is over all layer groups. Raises ConfigError for one that nothing could pass through."""
        self._groups = groups
        least = MIN_HOST_BLOCKS * sum(group.forms.slot_bytes * group.forms.most_slots for group in groups)
        for owner, quota in self._quotas.items():
            if quota.host_ceiling is not None and quota.host_ceiling < least:
                raise ConfigError(
                    f"namespace_quotas[{self._names[owner]!r}].host_ceiling={format_bytes(quota.host_ceiling)}: blocks of this "
                    f"model pass through the host tier {MIN_HOST_BLOCKS} at a time; give at least {format_bytes(least)}"
                )

    def used_bytes(self, tier: Tier, owner: int) -> int:
        """Bytes that a namespace's blocks take there, those on their way included."""
        return sum(int(_held(group, tier, owner).sum()) * _block_bytes(group, tier) for group in self._groups)

    # ------------------------------------------------------------------ who asks
    def by_owner(self, group: BlockGroup, blocks: IntArray) -> Iterator[IntArray]:
        """These blocks in parts of one namespace each, or all together where no namespace has a quota."""
        owners = group.directory.owner[blocks]
        distinct = np.unique(owners) if self._quotas else owners[:1]
        for owner in distinct.tolist():
            yield blocks[owners == owner] if len(distinct) > 1 else blocks

    # ------------------------------------------------------------------ floors
    def spare(self, group: BlockGroup, tier: Tier, blocks: IntArray, asker: int | None) -> IntArray:
        """Those of these blocks that may be evicted for `asker` (None: for anybody), coldest of each namespace first.

        A namespace loses to others only what it holds above its floor.
        """
        guarded = [(o, q.floor(tier)) for o, q in self._quotas.items() if q.floor(tier) and o != asker]
        if not guarded or not len(blocks):
            return blocks
        may_go, owners = np.ones(len(blocks), bool), group.directory.owner[blocks]
        for owner, floor in guarded:
            own = np.flatnonzero(owners == owner)
            above = max(0, self.used_bytes(tier, owner) - floor) // _block_bytes(group, tier)
            if above < len(own):
                may_go[own] = np.isin(blocks[own], group.policy.of(tier).victims(above, blocks[own]))
        return blocks[may_go]

    # ------------------------------------------------------------------ ceilings
    def room(self, group: BlockGroup, tier: Tier, owner: int | None) -> int | None:
        """Blocks of this group that the namespace may still add; negative when its ceiling was lowered, None: any."""
        quota = None if owner is None else self._quotas.get(owner)
        ceiling = None if quota is None else quota.ceiling(tier)
        if ceiling is None:
            return None
        assert owner is not None
        return (ceiling - self.used_bytes(tier, owner)) // _block_bytes(group, tier)

    def allows(self, group: BlockGroup, blocks: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each block could go down to nvme now, alone: room, or a block of its own kind to give up; and the rate."""
        allowed = np.ones(len(blocks), bool)
        for owner in self._limited(group, blocks):
            room = self.room(group, "nvme", owner)
            is_full = room is not None and room + len(self.unreferenced(group, owner)) < 1
            if is_full or not self._num_by_rate(group, owner, 1):
                allowed[group.directory.owner[blocks] == owner] = False
        return allowed

    def admit(self, group: BlockGroup, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Those of these blocks that may go down to nvme together, and what has to be evicted for them."""
        d, admitted, evicted = group.directory, np.ones(len(blocks), bool), []
        for owner in self._limited(group, blocks):
            own = np.flatnonzero(d.owner[blocks] == owner)
            count = self._num_by_rate(group, owner, len(own))
            room = self.room(group, "nvme", owner)
            if room is not None:
                victims = group.policy.of("nvme").victims(max(0, count - room), self.unreferenced(group, owner))
                evicted.append(victims)
                count = min(count, max(0, room + len(victims)))
            admitted[own[count:]] = False
        return blocks[admitted], np.concatenate(evicted) if evicted else blocks[:0]

    def unreferenced(self, group: BlockGroup, owner: int) -> IntArray:
        """Blocks of a namespace on nvme that could be evicted now."""
        d = group.directory
        is_own = d.nvme_valid & (d.refs == 0) & (d.nvme_holds == 0) & (d.owner == owner)
        return group.unpinned_by_ttl(np.flatnonzero(is_own))

    # ------------------------------------------------------------------ pins
    def pins_left(self, owner: int) -> int | None:
        """Slots that its clients may still take, or blocks pin; None: any. Copies of the pager's own count while they run."""
        quota = self._quotas.get(owner)
        if quota is None or quota.pins is None:
            return None
        held = 0
        for group in self._groups:
            is_held = (group.host.holds > 0) | (group.host.state == SlotState.STAGING)
            held += int((is_held & _held(group, "host", owner)).sum())
            if group.last_pin_s > group.clock():
                d = group.directory
                pinned = np.flatnonzero((d.pinned_until > group.clock()) & (d.owner == owner) & d.is_live)
                slots = d.host_slot[pinned]
                held += int(((slots < 0) | ~is_held[slots]).sum())
        return max(0, quota.pins - held)

    # ------------------------------------------------------------------ rates
    def wrote(self, group: BlockGroup, blocks: IntArray) -> None:
        """A write of these blocks to nvme was started."""
        for owner in self._limited(group, blocks):
            if owner in self._buckets:
                count = int((group.directory.owner[blocks] == owner).sum())
                self._buckets[owner].take(count * _block_bytes(group, "nvme"), self._clock())

    def is_throttled(self, owner: int | None = None) -> bool:
        """Whether that namespace (None: any) has to wait for its rate, which time alone ends."""
        buckets = self._buckets.values() if owner is None else filter(None, [self._buckets.get(owner)])
        return any(bucket.level(self._clock()) <= 0 for bucket in buckets)

    def _num_by_rate(self, group: BlockGroup, owner: int, wanted: int) -> int:
        bucket = self._buckets.get(owner)
        return wanted if bucket is None else min(wanted, bucket.num_allowed(_block_bytes(group, "nvme"), self._clock()))

    # ------------------------------------------------------------------ words
    def explain(self, namespace: str) -> str:
        """Why a namespace cannot store more; empty when its quota is not the reason."""
        owner = owner_tag(namespace)
        quota = self._quotas.get(owner)
        if quota is None:
            return ""
        used = self.used_bytes("nvme", owner)
        smallest = min((group.cold_bytes for group in self._groups), default=0)
        if quota.nvme_ceiling is not None and used + smallest > quota.nvme_ceiling:
            return (
                f"namespace {namespace!r} holds {format_bytes(used)} of its {format_bytes(quota.nvme_ceiling)} on nvme; "
                f"raise namespace_quotas[{namespace!r}] or forget sessions of it"
            )
        if self.is_throttled(owner):
            return (
                f"namespace {namespace!r} may write {format_bytes(quota.write_bytes_per_s or 0)} a second to nvme and has "
                f"used that up; wait, or raise namespace_quotas[{namespace!r}].write_bytes_per_s"
            )
        return ""

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Limits and use by namespace, for status: `limit_bytes` and `used_bytes` are of nvme."""
        return {self._names[owner]: self._row(owner, quota) for owner, quota in self._quotas.items()}

    def _row(self, owner: int, quota: NamespaceQuota) -> dict[str, int]:
        limits = {f.name: getattr(quota, f.name) for f in fields(quota)}
        row = {name: limit for name, limit in limits.items() if limit}
        row |= {"used_bytes": self.used_bytes("nvme", owner), "host_used_bytes": self.used_bytes("host", owner)}
        return row if quota.nvme_ceiling is None else {"limit_bytes": quota.nvme_ceiling, **row}

    def _limited(self, group: BlockGroup, blocks: IntArray) -> list[int]:
        if not self._quotas:
            return []
        owners: list[int] = np.unique(group.directory.owner[blocks]).tolist()
        return [owner for owner in owners if owner in self._quotas]


def _held(group: BlockGroup, tier: Tier, owner: int) -> npt.NDArray[np.bool_]:
    d = group.directory
    if tier == "nvme":
        return (d.nvme_slot >= 0) & (d.owner == owner)
    return (group.host.state != SlotState.NONE) & (d.owner[group.host.block] == owner)


def _block_bytes(group: BlockGroup, tier: Tier) -> int:
    return group.forms.slot_bytes if tier == "host" else group.cold_bytes
