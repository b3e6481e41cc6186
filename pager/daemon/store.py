"""SharedStore: the blocks of one model for many processes. A pager's core without a device, behind the protocol's verbs.

Slots, directory, policy, quotas, disk and sessions are those of the embedded pager; here they serve clients, each with
its holdings. Every verb takes the lock, changes the books, and waits for nothing; what has to wait is a LeaseRequest, or
runs on a thread of its own (flush, sessions). Guards: a tenant sees blocks of its own namespaces alone, and foreign ones
take the same path as absent ones; a slot that another tenant wrote to is zeroed before it is handed out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...tiers.errors import BlockMissError, Busy, ConfigError, ProtocolError, TierFullError, UnknownSessionError
from ...tiers.layout import KVLayout
from ...tiers.shared import SharingBackend, make_rows
from ..config import PagerConfig
from ..core import Core
from ..group import MAX_MOVE_BYTES
from ..parking import Parking
from ..prefix import adopt, take_tail
from ..rules import ALL_RULES, Rules
from ..sessions import SessionEntry
from ..sizing import Sizes, split_blocks
from ..states import IntArray, SlotState
from ..stores import open_nvme
from ..wire.messages import (
    ABSENT,
    HELD_ALREADY,
    HOLDS,
    IN_MEMORY,
    IS_HELD,
    NOT_THERE,
    ON_DISK,
    OVER_LIMIT,
    REFUSED,
    TAKEN,
)
from .holdings import Holdings
from .reading import LeaseRequest
from .tenants import Tenant

LEASE_SHARE = 4  # of a group's slots, one client may have a quarter
MIN_LEASES = 8  # where there are as many
HOLD_SHARE = 2  # of all blocks that the tiers take, one client's sequences may refer to half
_NO_DEVICE_PAGES = 1  # the books want one; nothing is ever put there, so it takes no memory


class Client:
    """What one attached process holds of one store."""

    def __init__(self, tenant: Tenant, holdings: list[Holdings]) -> None:
        self.tenant, self.holdings = tenant, holdings
        self.requests: list[LeaseRequest] = []
        self.sessions: set[str] = set()  # those that it has taken
        self.writing: tuple[int, int] | None = None  # group and slot that a payload is on its way into

    def require_not_writing(self, index: int, slots: IntArray) -> None:
        if self.writing is not None and self.writing[0] == index and (slots == self.writing[1]).any():
            raise ProtocolError(f"slot {self.writing[1]}: its WRITE is not over")


class SharedStore:
    """Open with `SharedStore.open`."""

    def __init__(self, core: Core, fds: list[int]) -> None:
        self.core, self.fds = core, fds
        self.parking = Parking(core)
        self.clients: set[Client] = set()
        self._writer = [
            np.zeros(len(g.host), np.uint32) for g in core.groups
        ]  # tag of the namespace whose bytes are in a slot
        core.holders.append(self)

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
        backend = SharingBackend(io_depth=config.nvme_queue_depth)
        sizes = Sizes([_NO_DEVICE_PAGES] * len(layouts), split_blocks(layouts, config.host_size), [0] * len(layouts))
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
        store.parking.recover()
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
        self.core.memory.close()
        if self.core.nvme is not None:
            deadline_s = self.core.clock() + timeout_s
            self.write_down(timeout_s)
            self.core.wait_until(lambda: not self.core.in_flight(), max(1.0, deadline_s - self.core.clock()))
            self.core.nvme.close()
        self.core.backend.close(timeout_s)
        while self.fds:
            os.close(self.fds.pop())

    def write_down(self, timeout_s: float) -> None:
        """Bring every block that only the slab holds to nvme, each tried once: in a full tier they would only take turns."""
        core = self.core
        with core.lock:
            left = [self._only_in_slab(index) for index in range(len(core.groups))]

        def is_down() -> bool:
            for index, group in enumerate(core.groups):
                batch = left[index][: max(1, MAX_MOVE_BYTES // group.layout.block_bytes)]
                if len(batch) and group.nvme_room() and not group.moves:
                    core.sink_blocks(group, batch, "drain")
                    left[index] = left[index][len(batch) :]
            return not any(map(len, left)) and not core.in_flight()

        core.wait_until(is_down, timeout_s)

    def _only_in_slab(self, index: int) -> IntArray:
        """Blocks that a crash would lose, those that others refer to first."""
        group = self.core.groups[index]
        d, blocks = group.directory, group.host.block[group.host.state == SlotState.VALID]
        blocks = blocks[d.is_named[blocks] & (d.nvme_slot[blocks] < 0)]
        return blocks[np.argsort(-d.refs[blocks], kind="stable")]

    # ------------------------------------------------------------------ clients
    def attach(self, tenant: Tenant) -> Client:
        with self.core.lock:
            client = Client(tenant, [self._holdings(i) for i in range(len(self.core.groups))])
            self.clients.add(client)
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
            self.clients.discard(client)

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
    def lookup(self, client: Client, keys: list[bytes], *, prefix: bool, hold: bool) -> npt.NDArray[np.uint8]:
        """[groups, keys] of ABSENT, IN_MEMORY or ON_DISK, and IS_HELD. Columns behind the first miss are left out."""
        with self.core.locked():
            found = [self._visible(client, index, keys) for index in range(len(self.core.groups))]
            end = len(keys)
            for group, blocks in zip(self.core.groups, found, strict=True):
                if prefix and group.layout.window is None:
                    has = blocks[:end] >= 0
                    end = len(has) if has.all() else int(np.argmin(has))
            if prefix:
                self.core.observer.looked_up(client.tenant.name, client.tenant.owns_tags, keys, end)
            return np.stack([self._answer(client, i, blocks[:end], hold) for i, blocks in enumerate(found)])

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
            room = min(count, group.host_room(asker=asker), count if pins is None else pins)
            slots = group.take_host_slots(room, asker=asker) if room else None
            if room < count:
                self.core.make_host_room(group, count, asker)
            if slots is None:
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
        writer = self._writer[index][slots]
        foreign = slots[(writer != 0) & ~client.tenant.owns_tags(writer)]
        self.core.groups[index].slab.rows[foreign] = 0
        self._writer[index][foreign] = 0

    def _note_writers(self, client: Client, index: int, slots: IntArray) -> None:
        """This client may have written anything there."""
        self._writer[index][slots] = client.tenant.tag

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
        """Per block NOT_THERE, HOLDS, OVER_LIMIT = 0, 1, 2
        REFUSED, TAKEN or HELD_ALREADY, and IS_HELD; and the generations of their slots."""
        with self.core.locked():
            group, holdings = self.core.groups[index], client.holdings[index]
            client.require_not_writing(index, slots)
            may = holdings.reserved[slots] & client.tenant.owns_tags(owners) & (tokens <= self.core.block_size)
            results = np.zeros(len(slots), np.uint8)
            for i in np.flatnonzero(may).tolist():  # a few dozen, each with its own key
                slot, key, parent = int(slots[i]), keys[i], parents[i] if any(parents[i]) else None
                if not holdings.reserved[slot]:
                    continue  # twice in one message
                if holdings.commit(slot, key, parent, int(tokens[i]), int(owners[i]), hold=hold):
                    self._writer[index][slot] = owners[i]
                    results[i] = TAKEN
                    self.core.ghosts.forget(key)
                else:
                    results[i] = self._commit_twin(client, index, key, hold)
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
            request = LeaseRequest(self.core, client.holdings[index], blocks, deadline_s, self._writer[index])
            if not request.step():
                client.requests.append(request)
            return request

    def release(self, client: Client, index: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        with self.core.lock:
            holdings = client.holdings[index]
            client.require_not_writing(index, slots)
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

    def unhold(self, client: Client, index: int, keys: list[bytes]) -> None:
        with self.core.lock:
            blocks = self.core.groups[index].directory.find(keys)
            client.holdings[index].unhold(blocks[blocks >= 0])

    def row(self, client: Client, index: int, slot: int, *, to_write: bool) -> memoryview:
        """The bytes of a slot that the client has. Raises ProtocolError when it has not."""
        holdings = client.holdings[index]
        if not 0 <= slot < len(holdings.reserved):
            raise ProtocolError(f"slot {slot}: layer group {index} has {len(holdings.reserved)}")
        if not (holdings.reserved[slot] if to_write else holdings.leased[slot] > 0):
            raise ProtocolError(f"slot {slot} is not {'reserved' if to_write else 'leased'} by this client")
        return memoryview(holdings.group.slab.rows[slot])  # type: ignore[arg-type]

    # ------------------------------------------------------------------ progress
    def advance(self) -> list[LeaseRequest]:
        """Apply what has finished. Returns the lease requests that have their answer now."""
        with self.core.lock:
            self.core.advance()
            over = []
            for client in self.clients:
                done = [request for request in client.requests if request.step()]
                client.requests = [request for request in client.requests if request not in done]
                over += done
            return over

    # ------------------------------------------------------------------ verbs that wait, on a thread
    def flush(self, client: Client, timeout_s: float) -> None:
        """Make durable what the client committed and still holds. Raises: TierFullError, TierUnavailableError."""
        core = self.core
        with core.lock:
            wanted = [(holdings, holdings.take_unflushed()) for holdings in client.holdings]
        if core.nvme is None:
            return

        def all_down() -> bool:
            missing = 0
            for holdings, blocks in wanted:
                d = holdings.group.directory
                todo = blocks[d.is_live[blocks] & ~d.nvme_valid[blocks]]
                core.sink_blocks(holdings.group, todo[d.in_host(todo) & (d.nvme_slot[todo] < 0)], "persist")
                missing += len(todo)
            return missing == 0

        if not core.wait_until(all_down, timeout_s, may_wait_for_pins=True):
            with core.lock:
                for holdings, blocks in wanted:
                    holdings.still_unflushed(blocks)
            raise TierFullError(f"not everything could be written to nvme within {timeout_s:.0f} s", retry_after_s=1.0)
        core.nvme.flush(timeout_s)

    def put_session(self, client: Client, session_id: str, record: dict[str, Any], timeout_s: float) -> None:
        """Remember a session; durable when this returns. Raises BlockMissError when some of its blocks are gone."""
        core, entry = self.core, _entry(session_id, record)
        if not client.tenant.owns(entry.namespace):
            raise UnknownSessionError(f"namespace {entry.namespace!r} is not of this client")
        self._require_not_taken(client, session_id)
        with core.locked():
            seq = core.begin(entry.namespace)
            seq.token_ids = list(entry.token_ids)
            full, rest = divmod(entry.num_computed, core.block_size)
            adopt(core, seq, entry.num_computed, count=False)
            if rest and seq.num_computed == full * core.block_size:
                take_tail(core, seq, rest)
        try:
            if seq.num_computed < entry.num_computed:
                raise BlockMissError(
                    f"session {session_id!r}: {seq.num_computed} of its {entry.num_computed} tokens are held here; write "
                    "the others again"
                )
            self.parking.park(session_id, seq, entry.extra, timeout_s)
        except BaseException:
            with core.locked():
                core.drop_tables(seq, released=False)
                core.sequences.pop(seq.id, None)
            raise
        client.sessions.add(session_id)

    def get_session(self, client: Client, session_id: str, *, take: bool) -> dict[str, Any]:
        """Raises UnknownSessionError, also for a session of somebody else; Busy while another client has it."""
        with self.core.lock:
            entry = self._session(client, session_id)
            if take:
                self._require_not_taken(client, session_id)
                client.sessions.add(session_id)
            return entry.to_record() | {"is_durable": entry.is_durable}

    def drop_session(self, client: Client, session_id: str, *, keep: bool) -> None:
        with self.core.lock:
            self._session(client, session_id)
            self._require_not_taken(client, session_id)
            client.sessions.discard(session_id)
        if not keep:
            self.parking.forget(session_id)

    def list_sessions(self, client: Client, after: str, limit: int) -> tuple[list[SessionEntry], bool]:
        """Those of this tenant's namespaces behind `after`, in order; and whether there are more."""
        with self.core.lock:
            ids = sorted(i for i, e in self.core.sessions.items() if i > after and client.tenant.owns(e.namespace))
            return [self.core.sessions[i] for i in ids[:limit]], len(ids) > limit

    def is_taken(self, session_id: str) -> bool:
        return any(session_id in client.sessions for client in self.clients)

    def _session(self, client: Client, session_id: str) -> SessionEntry:
        entry = self.core.sessions.get(session_id)
        if entry is None or not client.tenant.owns(entry.namespace):
            raise UnknownSessionError(f"session {session_id!r} is unknown")
        return entry

    def _require_not_taken(self, client: Client, session_id: str) -> None:
        entry = self.core.sessions.get(session_id)
        if entry is not None and not client.tenant.owns(entry.namespace):
            raise UnknownSessionError(f"session id {session_id!r} cannot be used; choose another")
        if any(session_id in other.sessions for other in self.clients - {client}):
            raise Busy(f"session {session_id!r} is active in another process", retry_after_s=0.1)

    # ------------------------------------------------------------------ integrity
    def references(self, group: int) -> Iterable[IntArray]:
        for client in self.clients:
            yield client.holdings[group].references()
            yield from (request.references for request in client.requests if request.group.index == group)

    def reserved(self, group: int) -> IntArray:
        found = [np.flatnonzero(client.holdings[group].reserved) for client in self.clients]
        return np.concatenate([np.empty(0, np.int64), *found])

    def check_integrity(self) -> None:
        """Raises InvariantError when the books of blocks, or those of clients, contradict each other."""
        with self.core.lock:
            self.core.check_integrity()
            assert all(holdings.check() for client in self.clients for holdings in client.holdings)

    def pinned_slots(self) -> int:
        """Slots that clients have leased or reserved."""
        with self.core.lock:
            return sum(int(((g.host.holds > 0) | (g.host.state == SlotState.STAGING)).sum()) for g in self.core.groups)


def _entry(session_id: str, record: dict[str, Any]) -> SessionEntry:
    """Raises ProtocolError for a record that is none."""
    try:
        entry = SessionEntry.from_record(session_id, record)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"session {session_id[:40]!r}: its record is not one: {error}") from error
    if not 0 <= entry.num_computed <= len(entry.token_ids) or not isinstance(entry.extra, dict):
        raise ProtocolError(
            f"session {session_id[:40]!r}: {entry.num_computed} of {len(entry.token_ids)} tokens computed"
        )
    return entry


def _share_generations(core: Core) -> int:
    """Put the slots' generations where clients can read them and cannot write; returns the descriptor."""
    counts = [len(group.host) for group in core.groups]
    rows, fd = make_rows(1, 8 * sum(counts), name="generations", read_only=True)
    generations, start = rows.reshape(-1).view(np.uint64), 0
    for group, count in zip(core.groups, counts, strict=True):
        group.host.generation = generations[start : start + count]
        start += count
    return fd
