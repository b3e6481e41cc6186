"""Keeping: what of one model's blocks outlives the daemon. Flushes, sessions, and writing everything down at the end.

Flushes and puts wait, so they run on threads of the service and hold the lock for books only. Guards: what is acknowledged
is durable; a session is in one process at a time; one of another tenant is as unknown as one that never was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...tiers.errors import (
    BlockMissError,
    Busy,
    ProtocolError,
    TierFullError,
    UnknownSessionError,
)
from ..core import Core
from ..group import MAX_MOVE_BYTES, BlockGroup
from ..parking import Parking
from ..prefix import adopt, take_tail
from ..sessions import SessionEntry, check_session_id
from ..states import IntArray, SlotState
from . import session_names
from .client import Client
from .holdings import Holdings

_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Flushing:
    """Blocks that a flush refers to, so that none of them leaves before it is down."""

    group: BlockGroup
    blocks: IntArray


class Keeper:
    """Of one store. `clients`: those that are attached, in order of their coming."""

    def __init__(self, core: Core, clients: Mapping[Client, None]) -> None:
        self.core, self.clients = core, clients
        self.flushing: list[_Flushing] = []
        self.putting: dict[str, str] = {}  # sessions that are being stored, and their namespaces
        self.parking = Parking(core, max_id_bytes=session_names.MAX_NAME_BYTES)

    # ------------------------------------------------------------------ blocks
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

        core.wait_until(is_down, timeout_s, while_ending=True)

    def _only_in_slab(self, index: int) -> IntArray:
        """Blocks that a crash would lose, those that others refer to first."""
        group = self.core.groups[index]
        d, blocks = group.directory, group.host.block[group.host.state == SlotState.VALID]
        blocks = blocks[d.is_named[blocks] & (d.nvme_slot[blocks] < 0)]
        return blocks[np.argsort(-d.refs[blocks], kind="stable")]

    def flush(
        self, client: Client, timeout_s: float, index: int = 0, named: Callable[[], IntArray] = lambda: _NOTHING
    ) -> None:
        """Make durable what the client committed and still holds, and the blocks of a group that `named` finds. Of a client
        that holds in a step of its own it is all that it holds: nothing says which of that it committed.

        Raises: TierFullError, TierUnavailableError, and what `named` raises.
        """
        core = self.core
        with core.lock:
            taken = [holdings.unflushed() for holdings in client.holdings]
            also = _Flushing(core.groups[index], np.unique(named()))
            also.group.ref(also.blocks)
            self.flushing.append(also)
            wanted = [np.fromiter(blocks, np.int64, len(blocks)) for blocks in taken]
            if client.holds_apart:
                wanted = [np.union1d(blocks, _held(one)) for blocks, one in zip(wanted, client.holdings, strict=True)]
            wanted[index] = np.union1d(wanted[index], also.blocks)
        try:
            if core.nvme is not None:
                self.parking.make_durable(
                    lambda: self._push_down(wanted, timeout_s), timeout_s, "what is to be durable"
                )
        finally:
            with core.locked():
                self.flushing.remove(also)
                also.group.unref(also.blocks)
        with core.lock:
            for holdings, blocks in zip(client.holdings, taken, strict=True):
                holdings.flushed(blocks)

    def _push_down(self, wanted: list[IntArray], timeout_s: float) -> list[IntArray]:
        """Wait until those of these blocks that live are on nvme; by group. Returns them all. Raises TierFullError."""

        def all_down() -> bool:
            missing = 0
            for group, blocks in zip(self.core.groups, wanted, strict=True):
                missing += self.parking.push_down(group, blocks[group.directory.is_live[blocks]], "persist")
            return missing == 0

        if not self.core.wait_until(all_down, timeout_s, may_wait_for_pins=True):
            raise TierFullError(f"not everything could be written to nvme within {timeout_s:.0f} s", retry_after_s=1.0)
        return wanted

    # ------------------------------------------------------------------ sessions
    def put_session(self, client: Client, session_id: str, record: dict[str, Any], timeout_s: float) -> None:
        """Remember a session; durable when this returns. It is the client's then, if its socket is still there.

        Raises: BlockMissError when some of its blocks are gone; Busy while another client has it, or it is being stored.
        """
        entry = _entry(session_id, record)
        if not client.tenant.owns(entry.namespace):
            raise UnknownSessionError(f"namespace {entry.namespace!r} is not of this client")
        name = session_names.name_for(client.tenant, entry.namespace, check_session_id(session_id))
        with self.core.lock:
            before = session_names.find(client.tenant, session_id, self.core.sessions)
            names = [name] if before is None else list(dict.fromkeys([name, before.session_id]))
            for one in names:
                self._require_not_taken(client, one)
            self._require_at_rest(client, session_id)
            had_it = name in client.sessions
            client.take(name)
            self.putting.update(dict.fromkeys(names, entry.namespace))
        try:
            self._put(name, entry, timeout_s)
            if before is not None and before.session_id != name:  # it moved to another namespace of the tenant
                client.sessions.discard(before.session_id)
                self.parking.forget(before.session_id)
        except BaseException:
            if not had_it:
                client.sessions.discard(name)
            raise
        finally:
            with self.core.lock:
                for one in names:
                    self.putting.pop(one, None)

    def _put(self, name: str, entry: SessionEntry, timeout_s: float) -> None:
        core = self.core
        with core.locked():
            seq = core.begin(entry.namespace)
            seq.token_ids = list(entry.token_ids)
            if entry.branch is not None:
                seq.branch_at(*entry.branch)
            full, rest = divmod(entry.num_computed, core.block_size)
            adopt(core, seq, entry.num_computed)
            if rest and seq.num_computed == full * core.block_size:
                take_tail(core, seq, rest)
        try:
            if seq.num_computed < entry.num_computed:
                raise BlockMissError(
                    f"session {entry.session_id!r}: {seq.num_computed} of its {entry.num_computed} tokens are held "
                    "here; write the others again"
                )
            self.parking.park(name, seq, entry.extra, timeout_s)
        except BaseException:
            with core.locked():
                core.drop_tables(seq, released=False)
                core.sequences.pop(seq.id, None)
            raise

    def get_session(self, client: Client, session_id: str, *, take: bool) -> dict[str, Any]:
        """Raises UnknownSessionError, also for a session of somebody else; to take it, Busy while another client has it or
        it is being stored.
        """
        with self.core.lock:
            if take:
                self._require_at_rest(client, session_id)
            entry = self._session(client, session_id)
            if take:
                self._require_not_taken(client, entry.session_id)
                client.take(entry.session_id)
            return entry.to_record() | {"is_durable": entry.is_durable}

    def drop_session(self, client: Client, session_id: str, *, keep: bool, released: bool = False) -> None:
        """Raises: UnknownSessionError; to forget it, Busy while another client has it or it is being stored."""
        with self.core.lock:
            if keep:  # also what its put, which it does not wait for any more, is still to store
                client.sessions.difference_update(session_names.names_of(client.tenant, session_id))
                self._session(client, session_id)
                return
            self._require_at_rest(client, session_id)
            name = self._session(client, session_id).session_id
            self._require_not_taken(client, name)
            client.sessions.discard(name)
        self.parking.forget(name, released=released)

    def list_sessions(self, client: Client, after: str, limit: int) -> tuple[list[SessionEntry], bool]:
        """Those of this tenant's namespaces behind `after`, in order; and whether there are more."""
        with self.core.lock:
            own = {session_names.id_of(e): e for e in self.core.sessions.values() if client.tenant.owns(e.namespace)}
            ids = sorted(i for i in own if i > after)
            return [own[i] for i in ids[:limit]], len(ids) > limit

    def is_taken(self, entry: SessionEntry) -> bool:
        return any(entry.session_id in client.sessions for client in self.clients)

    def _session(self, client: Client, session_id: str) -> SessionEntry:
        entry = session_names.find(client.tenant, session_id, self.core.sessions)
        if entry is None:
            raise UnknownSessionError(f"session {session_id!r} is unknown")
        return entry

    def _require_not_taken(self, client: Client, name: str) -> None:
        if any(name in other.sessions for other in self.clients if other is not client):
            raise Busy(f"session {name!r} is active in another process", retry_after_s=0.1)

    def _require_at_rest(self, client: Client, session_id: str) -> None:
        """A put outlives its socket, and what it stores is not to come down on what others stored meanwhile."""
        for name in session_names.names_of(client.tenant, session_id):
            if name in self.putting and client.tenant.owns(self.putting[name]):
                raise Busy(f"session {session_id!r} is being stored", retry_after_s=0.1)


def _held(holdings: Holdings) -> IntArray:
    """Blocks that it holds and that were not lost."""
    held = np.fromiter(holdings.held, np.int64, len(holdings.held))
    return held[holdings.group.directory.is_valid(held)]


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
