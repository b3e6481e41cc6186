"""SharedStore: the blocks of one model for many processes. A pager's core without a device, behind the protocol's verbs.

Slots, directory, policy, quotas, disk and sessions are those of the embedded pager; here they serve clients, each with
its holdings. Every verb takes the lock, changes the books, and waits for nothing; what has to wait is a LeaseRequest, or
is the keeper's (flush, sessions). Guards: a tenant sees blocks of its own namespaces alone, and foreign ones
take the same path as absent ones; a slot that another tenant wrote to is zeroed before it is handed out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiers.errors import BlockMissError, ConfigError, ProtocolError, TierFullError
from ...tiers.layout import KVLayout
from ...tiers.shared import SharingBackend, make_rows
from .. import hints
from ..config import PagerConfig
from ..core import Core
from ..group import BlockGroup
from ..prefetching import Prefetcher
from ..rules import ALL_RULES, Rules
from ..sizing import Sizes, split_blocks
from ..states import IntArray, SlotState
from ..stores import open_nvme
from ..wire.messages import (
    ABSENT,
    DEMOTE,
    HELD_ALREADY,
    HOLDS,
    IN_MEMORY,
    IS_HELD,
    NOT_THERE,
    ON_DISK,
    OVER_LIMIT,
    PIN,
    PREFETCH,
    REFUSED,
    RELEASE,
    TAKEN,
)
from .client import Client
from .counting import RequestCounts
from .holdings import Holdings
from .keeping import Keeper
from .reading import LeaseRequest
from .tenants import Tenant

LEASE_SHARE = 4  # of a group's slots, one client may have a quarter
MIN_LEASES = 8  # where there are as many
HOLD_SHARE = 2  # of all blocks that the tiers take, one client's sequences may refer to half
MAX_EXPECTED = 64  # chains
_NO_DEVICE_PAGES = 1  # the books want one; nothing is ever put there, so it takes no memory


@dataclass(slots=True, eq=False)
class _Expected:
    """A chain that a client will soon ask for. What finds no room for so many looks is left to its demand."""

    client: Client
    keys: list[bytes]
    looks_left: int = 64


class SharedStore:
    """Open with `SharedStore.open`."""

    def __init__(self, core: Core, fds: list[int]) -> None:
        self.core, self.fds = core, fds
        self.clients: dict[Client, None] = {}  # in order of their coming
        self.keeper = Keeper(core, self.clients)
        self.prefetcher, self.counts = Prefetcher(core), RequestCounts(core, self._visible)
        self._expected: list[_Expected] = []
        core.holders.append(self)
        for group in core.groups:
            group.leaving.is_host_first = True

    @classmethod
    def open(
        cls,
        layouts: tuple[KVLayout, ...],
        config: PagerConfig,
        *,
        model_fingerprint: str,
        about: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        rules: Rules = ALL_RULES,
    ) -> SharedStore:
        """`config` gives this model's part of the memory and disk. Raises: ConfigError, StoreMismatchError,
        StoreLockedError."""
        backend = SharingBackend(io_depth=config.queue_depth())
        none = [0] * len(layouts)
        sizes = Sizes(
            [_NO_DEVICE_PAGES] * len(layouts),
            split_blocks(layouts, config.host_size),
            none,
            bounce_bytes=none,
            summaries=none,
            slices=none,
        )
        if min(sizes.host_slots) < 1:
            raise ConfigError(
                f"host_bytes={config.host_bytes!r} for this model holds no block; one of each layer group takes "
                f"{sum(g.block_bytes for g in layouts)} bytes: raise the daemon's host_bytes, or lower max_models"
            )
        nvme = None
        try:
            nvme = open_nvme(layouts, config, backend, model_fingerprint, about)
            core = Core(layouts, config, sizes, backend, nvme, model_fingerprint, rules, clock)
            fds = [os.dup(fd) for fd in backend.fds] + [_share_generations(core)]
        except BaseException:
            if nvme is not None:
                nvme.close()
            backend.close(5.0)
            raise
        store = cls(core, fds)
        store.keeper.parking.recover()
        if config.host_prefault:
            core.memory.start_prefault()
        return store

    def reconfigure(self, config: PagerConfig) -> None:
        """Quotas and secrets as they are now; what was built at the start stays as it is."""
        with self.core.lock:
            self.core.config = config
            self.core.quotas.update(config.quotas())
            if self.core.nvme is not None:
                self.core.nvme.learn(config.secrets_by_owner())

    def close(self, timeout_s: float = 60.0) -> None:
        """Write down what only the slab holds, as far as there is room, and let go of memory and disk."""
        self.core.is_ending = True  # somebody may still wait on a thread: never on a store that is closed
        self.core.memory.close()
        if self.core.nvme is not None:
            deadline_s = self.core.clock() + timeout_s
            self.keeper.write_down(timeout_s)
            left_s = max(1.0, deadline_s - self.core.clock())
            self.core.wait_until(lambda: not self.core.in_flight(), left_s, while_ending=True)
            with self.core.lock:
                self.core.nvme.close()
        self.core.backend.close(timeout_s)
        while self.fds:
            os.close(self.fds.pop())

    # ------------------------------------------------------------------ clients
    def attach(self, tenant: Tenant) -> Client:
        with self.core.lock:
            client = Client(tenant, [self._holdings(i) for i in range(len(self.core.groups))])
            self.clients[client] = None
            return client

    def detach(self, client: Client) -> None:
        """The process is gone, or has said that none of its copies runs: everything that it held is let go."""
        with self.core.lock:
            for request in client.requests:
                request.end()
            client.requests.clear()
            for holdings in client.holdings:
                self._note_writers(client, holdings.group.index, np.flatnonzero(holdings.reserved))
                holdings.end()
            self.clients.pop(client, None)
            for holdings in client.holdings:
                self._unpin(holdings)

    def _unpin(self, gone: Holdings) -> None:
        """What a client pinned is pinned no longer than others have pinned it."""
        blocks, d = gone.pinned(), gone.group.directory
        until_s = np.zeros(len(blocks))
        for client in self.clients:
            until_s = np.maximum(until_s, client.holdings[gone.group.index].pinned_until(blocks))
        d.pinned_until[blocks] = until_s

    def _holdings(self, index: int) -> Holdings:
        group = self.core.groups[index]
        below = self.core.nvme.num_slots(index) if self.core.nvme is not None else 0
        slots = len(group.host)
        return Holdings(group, self.lease_limit(index), max(1, (slots + below) // HOLD_SHARE))

    def lease_limit(self, index: int) -> int:
        slots = len(self.core.groups[index].host)
        return max(min(slots, MIN_LEASES), slots // LEASE_SHARE)

    def capacity_blocks(self, index: int) -> int:
        below = self.core.nvme.num_slots(index) if self.core.nvme is not None else 0
        return max(below, len(self.core.groups[index].host))

    # ------------------------------------------------------------------ verbs that answer at once
    def lookup(
        self, client: Client, keys: list[bytes], *, prefix: bool, hold: bool, counts: bool = True
    ) -> npt.NDArray[np.uint8]:
        """[groups, keys] of ABSENT, IN_MEMORY or ON_DISK, and IS_HELD. Columns behind the first miss are left out.

        `counts`: this is all that there will be to know of the client's request.
        """
        with self.core.locked():
            found = [self._visible(client, index, keys) for index in range(len(self.core.groups))]
            end = len(keys)
            for group, blocks in zip(self.core.groups, found, strict=True):
                if prefix and group.layout.window is None:
                    has = blocks[:end] >= 0
                    end = len(has) if has.all() else int(np.argmin(has))
            if prefix and counts:
                self.counts.looked_up(client, keys, found[0][:end])
                self._found_again([blocks[:end] for blocks in found])
            return np.stack([self._answer(client, i, blocks[:end], hold) for i, blocks in enumerate(found)])

    def used(
        self, client: Client, keys: list[bytes], num_tokens: int, by_tier: tuple[int, int, int], *, is_turn: bool
    ) -> None:
        """What a client says of a request of its own; what that found counts as used once more."""
        with self.core.lock:
            self.counts.used(client, keys, num_tokens, by_tier, is_turn=is_turn)
            keys = keys[: sum(by_tier) // self.core.block_size]
            self._found_again([self._visible(client, index, keys) for index in range(len(self.core.groups))])

    def _found_again(self, found: list[IntArray]) -> None:
        """A request found these, by layer group, in the order of their chain; negative where it need not have one."""
        for group, blocks in zip(self.core.groups, found, strict=True):
            depth = np.flatnonzero(blocks >= 0)
            if len(depth):
                group.touch_chain(blocks[depth], depth)

    def _answer(self, client: Client, index: int, blocks: IntArray, hold: bool) -> npt.NDArray[np.uint8]:
        d, has = self.core.groups[index].directory, blocks >= 0
        safe = np.maximum(blocks, 0)
        answer = np.where(has, np.where(d.in_host(safe), IN_MEMORY, ON_DISK), ABSENT).astype(np.uint8)
        if hold and has.any():
            self.core.groups[index].touch(blocks[has])
            answer[has] += (client.holdings[index].hold(blocks[has]) * IS_HELD).astype(np.uint8)
        return answer

    def _visible(self, client: Client, index: int, keys: list[bytes]) -> IntArray:
        """Valid blocks by key that this tenant owns, NOWHERE for all else; foreign and absent ones take one path."""
        d = self.core.groups[index].directory
        blocks = d.find(keys)
        safe = np.maximum(blocks, 0)
        return np.where(client.tenant.owns_tags(d.owner[safe]) & d.is_valid(blocks), blocks, -1)

    def reserve(self, client: Client, index: int, count: int) -> tuple[IntArray, npt.NDArray[np.uint64]]:
        """Up to `count` slots to write to. Raises Busy when there is none now."""
        with self.core.locked():
            group, holdings = self.core.groups[index], client.holdings[index]
            asker, pins = client.tenant.tag, self.core.quotas.pins_left(client.tenant.tag)
            count = min(count, holdings.room())
            most = count if pins is None else min(count, pins)
            slots = group.take_host_slots(most, asker=asker) if most else None
            if (
                most and slots is None
            ):  # then all that there is, whatever the try gave up; to count takes as long as to take
                most = min(most, group.leaving.host_room(asker=asker))
                slots = group.take_host_slots(most, asker=asker) if most else None
            if most < count:
                self.core.make_host_room(group, count, asker)
            if slots is None:
                if holdings.room() and pins != 0:  # for want of room in the tier, not of a limit of its own
                    self.core.observer.turned_away.append((self.core.clock(), index))
                raise TierFullError(self._why_full(index, holdings, count, pins), retry_after_s=0.02)
            self._zero_foreign(client, index, slots)
            holdings.reserve(slots, asker)
            return slots, group.host.generation[slots].copy()

    def _why_full(self, index: int, holdings: Holdings, count: int, pins: int | None) -> str:
        group = self.core.groups[index]
        if pins == 0:
            return "the namespace has used up its pins; release slots, or raise pins of its [namespaces] table"
        if not count:
            return f"this client has {holdings.num_slots()} of at most {holdings.lease_limit} slots; release some first"
        held = int((group.host.holds > 0).sum())
        return f"host tier: none of {len(group.host)} slots can be had now, {held} are leased; raise host_bytes"

    def _zero_foreign(self, client: Client, index: int, slots: IntArray) -> None:
        """Nobody is handed bytes that another tenant wrote."""
        group = self.core.groups[index]
        writer = group.host.writer[slots]
        foreign = slots[(writer != 0) & ~client.tenant.owns_tags(writer)]
        group.slab.rows[foreign] = 0
        group.host.writer[foreign] = 0

    def _note_writers(self, client: Client, index: int, slots: IntArray) -> None:
        """This client may have written anything there."""
        self.core.groups[index].host.writer[slots] = client.tenant.tag

    def commit(
        self,
        client: Client,
        index: int,
        slots: IntArray,
        keys: list[bytes],
        parents: list[bytes],
        tokens: IntArray,
        owners: npt.NDArray[np.uint32],
        *,
        hold: bool,
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
        """Per block REFUSED, TAKEN or HELD_ALREADY, and IS_HELD; and the generations of their slots."""
        with self.core.locked():
            group, holdings = self.core.groups[index], client.holdings[index]
            client.require_at_rest(index, slots)
            may = holdings.reserved[slots] & client.tenant.owns_tags(owners) & (tokens <= self.core.block_size)
            may &= _first_times(slots)
            results = np.zeros(len(slots), np.uint8)
            own = np.flatnonzero(may)
            names = [keys[i] for i in own.tolist()]
            before = [parents[i] if any(parents[i]) else None for i in own.tolist()]
            taken, is_held = holdings.commit(slots[own], names, before, tokens[own], owners[own], hold=hold)
            results[own] = taken * TAKEN + is_held * IS_HELD
            group.host.writer[slots[own[taken]]] = owners[own[taken]]
            for i in own.tolist():
                if results[i]:
                    self.core.ghosts.forget(keys[i])
                    if (block := group.directory.by_key.get(keys[i])) is not None:  # a private one has no name any more
                        group.policy.named(block, keys[i])
                else:
                    results[i] = self._commit_twin(client, index, keys[i], hold)
            return results, group.host.generation[slots].copy()

    def _commit_twin(self, client: Client, index: int, key: bytes, hold: bool) -> int:
        """Somebody else stored that block first: theirs counts, if this tenant may see it."""
        blocks = self._visible(client, index, [key])
        if blocks[0] < 0:
            return REFUSED
        is_held = hold and bool(client.holdings[index].hold(blocks)[0])
        return HELD_ALREADY + IS_HELD * is_held

    def lease(self, client: Client, index: int, keys: list[bytes], wait_s: float) -> LeaseRequest:
        """A request that has taken its first step; `is_waiting` while there is more to come."""
        with self.core.locked():
            blocks = self._visible(client, index, keys)
            deadline_s = self.core.clock() + wait_s
            request = LeaseRequest(self.core, client.holdings[index], blocks, deadline_s)
            if not request.step():
                client.requests.append(request)
            return request

    def release(self, client: Client, index: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        with self.core.lock:
            holdings = client.holdings[index]
            client.require_at_rest(index, slots)
            self._note_writers(client, index, slots[holdings.reserved[slots]])
            return holdings.release(slots)

    def hold(self, client: Client, index: int, keys: list[bytes]) -> npt.NDArray[np.uint8]:
        """Per key NOT_THERE, HOLDS, or OVER_LIMIT: it is there, and may leave."""
        with self.core.locked():
            blocks = self._visible(client, index, keys)
            found = np.where(blocks >= 0, OVER_LIMIT, NOT_THERE).astype(np.uint8)
            there = np.flatnonzero(blocks >= 0)
            found[there[client.holdings[index].hold(blocks[there])]] = HOLDS
            return found

    def find(self, client: Client, index: int, keys: list[bytes]) -> IntArray:
        """Blocks of these keys, as far as the client may see them. Raises BlockMissError where one is not there."""
        with self.core.lock:
            blocks = self._visible(client, index, keys)
        if (blocks < 0).any():
            raise BlockMissError(f"{int((blocks < 0).sum())} of these {len(keys)} blocks are not there any more")
        return blocks

    def unhold(self, client: Client, index: int, keys: list[bytes]) -> None:
        with self.core.lock:
            client.holdings[index].unhold_keys(keys)

    def hint(self, client: Client, keys: list[bytes], hint: str, ttl_s: float = 0.0) -> None:
        """What a client says of a chain, as far as it may see it. Blocks that another client refers to stay as they are."""
        with self.core.locked():
            for index, group in enumerate(self.core.groups):
                blocks = self._visible(client, index, list(dict.fromkeys(keys)))  # in their order, each once
                blocks = blocks[blocks >= 0]
                if hint == RELEASE:
                    blocks = hints.own_end(group.directory, blocks)
                    hints.release(group, blocks[client.holdings[index].is_alone_with(blocks)])
                elif hint == DEMOTE:
                    hints.demote(group, blocks := blocks[client.holdings[index].is_alone_with(blocks)])
                    d = group.directory
                    self.core.sink_blocks(group, blocks[d.in_host(blocks) & (d.nvme_slot[blocks] < 0)], "writeback")
                elif hint == PIN:
                    self._pin(client, index, blocks, self.core.clock() + ttl_s)

            if hint == PREFETCH:
                self._expected = [*self._expected[1 - MAX_EXPECTED :], _Expected(client, keys)]
                self._bring_expected()

    def _bring_expected(self) -> None:
        """Go on with what clients expect, in order, as far as there is room and nobody waits for copies."""
        for one in list(self._expected):
            started = missing = 0
            for index, group in enumerate(self.core.groups if one.client in self.clients else ()):
                blocks, d = self._visible(one.client, index, one.keys), group.directory
                blocks = blocks[blocks >= 0]
                blocks = blocks[(d.host_slot[blocks] < 0) & d.nvme_valid[blocks]]
                missing += len(blocks)
                started += self.prefetcher.read(group, blocks)
            one.looks_left -= 1
            if started >= missing or not one.looks_left:
                self._expected.remove(one)
            if started < missing:
                return

    def _pin(self, client: Client, index: int, blocks: IntArray, until_s: float) -> None:
        """From the root on, as many as the quota of their namespace and the tier's size let in."""
        group = self.core.groups[index]
        is_pinned = group.directory.pinned_until > self.core.clock()
        room = len(group.host) // HOLD_SHARE - int((is_pinned & group.directory.is_live).sum())
        for own in self.core.quotas.by_owner(group, blocks[~is_pinned[blocks]]):
            left = self.core.quotas.pins_left(int(group.directory.owner[own[0]]))
            own = own[: max(0, room if left is None else min(room, left))]
            client.holdings[index].pin(own, until_s)
            room -= len(own)
        client.holdings[index].pin(blocks[is_pinned[blocks]], until_s)

    def row(self, client: Client, index: int, slot: int, *, to_write: bool) -> memoryview:
        """The bytes of a slot that the client has. Raises ProtocolError when it has not."""
        holdings = client.holdings[index]
        if not 0 <= slot < len(holdings.reserved):
            raise ProtocolError(f"slot {slot}: layer group {index} has {len(holdings.reserved)}")
        if not (holdings.reserved[slot] if to_write else holdings.leased[slot] > 0):
            raise ProtocolError(f"slot {slot} is not {'reserved' if to_write else 'leased'} by this client")
        return memoryview(holdings.group.slab.rows[slot])  # type: ignore[arg-type]

    def begin_copy(self, client: Client, index: int, slots: IntArray, *, to_write: bool) -> None:
        """A copy into these slots, or out of them, is about to run for this client. Raises ProtocolError: not its slots."""
        with self.core.lock:
            holdings = client.holdings[index]
            may = holdings.reserved[slots] if to_write else holdings.reserved[slots] | (holdings.leased[slots] > 0)
            if not may.all():
                raise ProtocolError(
                    f"slot {slots[~may][0]} is not {'reserved' if to_write else 'leased'} by this client"
                )
            np.add.at(holdings.copying, slots, 1)

    def end_copy(self, client: Client, index: int, slots: IntArray) -> None:
        with self.core.lock:
            np.subtract.at(client.holdings[index].copying, slots, 1)

    # ------------------------------------------------------------------ progress
    def advance(self) -> list[LeaseRequest]:
        """Apply what has finished. Returns the lease requests that have their answer now."""
        with self.core.lock:
            self.core.advance()
            self._bring_expected()
            over = []
            for client in self.clients:
                done = [request for request in client.requests if request.step()]
                client.requests = [request for request in client.requests if request not in done]
                over += done
            return over

    # ------------------------------------------------------------------ integrity
    def references(self, group: int) -> Iterable[IntArray]:
        for client in self.clients:
            yield client.holdings[group].references()
            yield from (request.references for request in client.requests if request.group.index == group)
        yield from (flush.blocks for flush in self.keeper.flushing if flush.group.index == group)

    def reserved(self, group: int) -> IntArray:
        found = [np.flatnonzero(client.holdings[group].reserved) for client in self.clients]
        return np.concatenate([np.empty(0, np.int64), *found])

    def shares(self) -> Iterable[tuple[str, list[IntArray]]]:
        for number, client in enumerate(self.clients, 1):
            yield f"client {number} (of {client.tenant.name})", [one.references() for one in client.holdings]

    def check_integrity(self) -> None:
        """Raises InvariantError when the books of blocks, or those of clients, contradict each other."""
        with self.core.lock:
            self.core.check_integrity()
            assert all(holdings.check() for client in self.clients for holdings in client.holdings)
            assert all(map(self._are_holds_known, self.core.groups)), "holds of slots and who has them do not agree"

    def _are_holds_known(self, group: BlockGroup) -> bool:
        """Whether every hold of a slot is a lease of a client or a copy of ours to nvme."""
        held = np.zeros(len(group.host), np.int64)
        for client in self.clients:
            held += client.holdings[group.index].leased
        for move in group.moves:
            if move.kind == "host_to_nvme":
                np.add.at(held, move.source, 1)
        return bool((group.host.holds == held).all())

    def pinned_slots(self) -> int:
        """Slots that clients have leased or reserved."""
        with self.core.lock:
            return sum(int(((g.host.holds > 0) | (g.host.state == SlotState.STAGING)).sum()) for g in self.core.groups)


def _share_generations(core: Core) -> int:
    """Put the slots' generations where clients can read them and cannot write; returns the descriptor."""
    counts = [len(group.host) for group in core.groups]
    rows, fd = make_rows(1, 8 * sum(counts), name="generations", read_only=True)
    generations, start = rows.reshape(-1).view(np.uint64), 0
    for group, count in zip(core.groups, counts, strict=True):
        group.host.generation = generations[start : start + count]
        start += count
    return fd


def _first_times(slots: IntArray) -> npt.NDArray[np.bool_]:
    """Where a slot is named for the first time in one message."""
    found = np.zeros(len(slots), bool)
    found[np.unique(slots, return_index=True)[1]] = True
    return found
