"""Attachment: one connection with one model open in it, and the memory that came along. It ends with the connection.

Small blocking calls in the daemon's words, batched to its limits; retries while it is busy. No state of the pager is here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...tiers.errors import Busy, TierUnavailableError
from ...tiers.layout import KVLayout
from ...tiers.prefault import Prefault
from ...tiers.shared import is_allocated, map_rows
from ...tiers.streams import IntArray, Rows
from ..wire import messages as m
from .connection import DaemonConnection, Greeting, Reply, wait_all

if TYPE_CHECKING:
    from ..prefix import Match

OPEN_TIMEOUT_S = 30.0  # a large store is recovered first
NO_ROOM = -2


class Attachment:
    """Open with `Attachment.open`."""

    def __init__(self, connection: DaemonConnection, layouts: Sequence[KVLayout], opened: m.Opened) -> None:
        self.connection, self.layouts, self.store = connection, tuple(layouts), opened.store
        self.epoch, self.version = connection.epoch, connection.version
        self.lease_limits = _ints(opened.lease_limits)
        self.capacity_blocks = _ints(opened.capacity_blocks)
        self.num_slots = _ints(opened.num_slots)
        self.is_durable = opened.is_durable
        self.sessions: set[str] = set()  # that are ours over this connection
        self.rows: list[Rows] = []  # of the daemon's memory, empty where we do not see it
        self.generations: list[npt.NDArray[np.uint64]] = []
        self._unheard: list[Reply[m.Noted]] = []  # to USED
        self._may_populate = False
        self._populating: Prefault | None = None

    @classmethod
    def open(
        cls,
        address: str,
        layouts: Sequence[KVLayout],
        model_fingerprint: str,
        about: Mapping[str, Any],
        greeting: Greeting,
    ) -> Attachment:
        """Raises: ConfigError, TierUnavailableError, ProtocolError, and what the daemon refuses the model with."""
        connection = DaemonConnection.open(address, greeting)
        try:
            want_slab = m.SLAB in connection.welcome.features
            said: dict[object, object] = {name: value for name, value in about.items()}
            message = m.Open([layout.to_dict() for layout in layouts], model_fingerprint, said, want_slab)
            opened, fds = connection.call_for_fds(message, m.Opened, timeout_s=OPEN_TIMEOUT_S)
            made = cls(connection, layouts, opened)
            try:
                if opened.has_slab:
                    made._map(fds)
            finally:
                for fd in fds:
                    os.close(fd)
            return made
        except BaseException:
            connection.close()
            raise

    def _map(self, fds: list[int]) -> None:
        if len(fds) != len(self.layouts) + 1:
            raise TierUnavailableError(
                f"{len(fds)} descriptors came with the slab; {len(self.layouts) + 1} were awaited"
            )
        parts = zip(fds, self.num_slots, self.layouts, strict=False)
        self.rows = [map_rows(fd, slots, layout.block_bytes) for fd, slots, layout in parts]
        table = map_rows(fds[-1], 1, 8 * sum(self.num_slots), read_only=True).reshape(-1).view(np.uint64)
        self.generations = np.split(table, np.cumsum(self.num_slots)[:-1])
        self._may_populate = all(map(is_allocated, fds[:-1]))

    def populate(self) -> Prefault | None:
        """Fault our mapping in, in the background, where the daemon has faulted in all of its memory; else do nothing.

        A first copy into a slot, or out of one, pays a fault per page otherwise. It takes page tables and no memory.
        """
        if self._may_populate and self._populating is None:
            self._populating = Prefault(self.rows, room=lambda: sys.maxsize)
        return self._populating

    @property
    def has_slab(self) -> bool:
        return bool(self.rows)

    @property
    def is_lost(self) -> bool:
        return self.connection.is_lost

    # ------------------------------------------------------------------ what is there
    def lookup(self, keys: list[bytes], *, prefix: bool, hold: bool) -> npt.NDArray[np.uint8]:
        """[layer groups, keys]; see Found in the protocol. With an older daemon, holding is a second step."""
        parts = []
        for start in range(0, len(keys), m.MAX_KEYS):
            batch = keys[start : start + m.MAX_KEYS]
            found = self.connection.call_patiently(
                m.Lookup(self.store, b"".join(batch), prefix, hold and self.version >= 2, counts=False), m.Found
            )
            parts.append(np.frombuffer(found.held, np.uint8).reshape(len(self.layouts), found.num_keys).copy())
            if prefix and found.num_keys < len(batch):
                break
        result = np.concatenate(parts, axis=1) if parts else np.zeros((len(self.layouts), 0), np.uint8)
        if hold and self.version < 2:
            self._hold_found(keys, result)
        return result

    def _hold_found(self, keys: list[bytes], found: npt.NDArray[np.uint8]) -> None:
        for group in range(len(self.layouts)):
            index = np.flatnonzero(found[group])
            flags = self.hold(group, b"".join(keys[i] for i in index.tolist()))
            found[group, index[flags == 1]] += 4
            found[group, index[flags == 0]] = 0  # it left between the two steps

    def hold(self, group: int, keys: bytes) -> npt.NDArray[np.uint8]:
        """Per key 0 not there, 1 held, 2 there but over our limit."""
        if not keys:
            return np.zeros(0, np.uint8)
        done = self.connection.call_patiently(m.Hold(self.epoch, self.store, group, keys), m.Held)
        return np.frombuffer(done.flags, np.uint8)

    def unhold(self, group: int, keys: bytes) -> None:
        if keys:
            self.connection.call_patiently(m.Unhold(self.epoch, self.store, group, keys), m.Unheld)

    def hint(self, keys: list[bytes], hint: str, ttl_ms: int = 0) -> None:
        """Of the last MAX_KEYS of a chain. An older daemon is told nothing."""
        feature = m.MARKS if hint in (m.PIN, m.DEMOTE) else m.HINTS
        if keys and feature in self.connection.welcome.features:
            blob = b"".join(keys[-m.MAX_KEYS :])
            self.connection.call_patiently(m.Hint(self.epoch, self.store, blob, hint, ttl_ms), m.Hinted)

    def used(self, keys: list[bytes], num_tokens: int, found: Match, *, is_turn: bool) -> None:
        """A request came, of at most MAX_KEYS whole blocks. An older daemon counts look-ups instead.

        Begun here and now, so that the daemon hears of what missed before it gets it anew; nobody waits for the answer, and
        a daemon that owes many is told no more: requests that nobody gives up would take the places of those that count.
        """
        self._unheard = [reply for reply in self._unheard if not reply.is_over]
        most = max(1, self.connection.welcome.max_requests // 4)
        if m.USAGE in self.connection.welcome.features and len(self._unheard) < most:
            blob, tiers = b"".join(keys[: m.MAX_KEYS]), (found.device_tokens, found.host_tokens, found.nvme_tokens)
            message = m.Used(self.epoch, self.store, blob, num_tokens, *tiers, is_turn)
            self._unheard.append(self.connection.begin(message, m.Noted))

    # ------------------------------------------------------------------ slots
    def reserve(self, group: int, count: int, timeout_s: float) -> tuple[IntArray, npt.NDArray[np.uint64]]:
        """At least one slot, at most `count`. Raises Busy when there was none for so long."""
        slots = self.connection.call_patiently(
            m.Reserve(self.epoch, self.store, group, count), m.Slots, timeout_s=timeout_s
        )
        return _slots(slots.slots), np.frombuffer(slots.generations, np.uint64)

    def lease(self, group: int, keys: bytes, timeout_s: float) -> tuple[IntArray, npt.NDArray[np.uint64]]:
        """Rows by key, negative where there is none; asks once. Every row must be released."""
        wait_ms = int(timeout_s * 1000)
        message = m.Lease(self.epoch, self.store, group, keys, wait_ms)
        leased = self.connection.call_patiently(message, m.Leased, timeout_s=timeout_s + 5.0)
        return _slots(leased.slots), np.frombuffer(leased.generations, np.uint64)

    def release(self, group: int, rows: IntArray) -> None:
        if len(rows):
            self.connection.call_patiently(self._release(group, rows), m.Done)

    def commit(
        self, group: int, rows: IntArray, stamps: npt.NDArray[Any], parents: Sequence[bytes]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
        """Results (see Committed in the protocol), with holds, and generations."""
        message = self._commit(group, rows, stamps, parents, hold=self.version >= 2)
        done = self.connection.call_patiently(message, m.Committed)
        results = np.frombuffer(done.results, np.uint8).copy()
        if self.version < 2:
            stored = np.flatnonzero(results & 3)
            flags = self.hold(group, np.ascontiguousarray(stamps["key"][stored]).tobytes())
            results[stored[flags == 1]] += 4
        return results, np.frombuffer(done.generations, np.uint64)

    # ------------------------------------------------------------------ the same, begun now and asked for later
    def begin_reserve(self, group: int, count: int) -> Reply[m.Slots]:
        return self.connection.begin(m.Reserve(self.epoch, self.store, group, count), m.Slots)

    def begin_lease(self, group: int, keys: bytes, timeout_s: float) -> Reply[m.Leased]:
        return self.connection.begin(m.Lease(self.epoch, self.store, group, keys, int(timeout_s * 1000)), m.Leased)

    def begin_release(self, group: int, rows: IntArray) -> Reply[m.Done]:
        return self.connection.begin(self._release(group, rows), m.Done)

    def begin_commit(
        self, group: int, rows: IntArray, stamps: npt.NDArray[Any], parents: Sequence[bytes]
    ) -> Reply[m.Committed]:
        """Without holds: cache, once it is released."""
        return self.connection.begin(self._commit(group, rows, stamps, parents, hold=False), m.Committed)

    def _release(self, group: int, rows: IntArray) -> m.Release:
        return m.Release(self.epoch, self.store, group, rows.astype("<u4").tobytes())

    def _commit(
        self, group: int, rows: IntArray, stamps: npt.NDArray[Any], parents: Sequence[bytes], *, hold: bool
    ) -> m.Commit:
        return m.Commit(
            self.epoch,
            self.store,
            group,
            rows.astype("<u4").tobytes(),
            np.ascontiguousarray(stamps["key"]).tobytes(),
            b"".join(parent or bytes(m.KEY_BYTES) for parent in parents),
            stamps["tokens"].astype("<u4").tobytes(),
            stamps["owner"].astype("<u4").tobytes(),
            hold,
        )

    # ------------------------------------------------------------------ bytes, where we do not see the memory
    def read_rows(self, group: int, rows: IntArray, target: Rows, target_rows: IntArray) -> None:
        """Many requests at once: over a network the way there and back is paid once."""
        step = max(1, m.MAX_READ_BYTES // self.layouts[group].block_bytes)
        replies = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            message = m.Read(self.epoch, self.store, group, rows[part].astype("<u4").tobytes())
            into = [memoryview(target[row]) for row in target_rows[part].tolist()]
            replies.append(self.connection.begin_read(message, into))
        wait_all(replies)

    def write_rows(self, group: int, rows: IntArray, source: Rows, source_rows: IntArray) -> None:
        """Likewise."""
        replies = []
        for row, at in zip(rows.tolist(), source_rows.tolist(), strict=True):
            message = m.Write(self.epoch, self.store, group, row)
            replies.append(self.connection.begin(message, m.Written, memoryview(source[at])))
        wait_all(replies)

    # ------------------------------------------------------------------ durability and sessions
    def flush(self, timeout_s: float, keys: Sequence[bytes] = ()) -> None:
        """What we committed, and the blocks of these keys, per group one behind the other, is durable when this returns.

        An older daemon knows no keys here: of those it is what we hold. Raises: TierFullError, TierUnavailableError,
        BlockMissError where a block is not there.
        """
        named = enumerate(keys if self.version >= 2 else ())
        batches = [(group, part) for group, blob in named for part in requests_of(blob)]
        for group, batch in batches or [(0, b"")]:
            message = m.Flush(self.epoch, self.store, int(timeout_s * 1000), group, batch)
            self.connection.call_patiently(message, m.Flushed, timeout_s=timeout_s + 5.0)

    def put_session(self, session_id: str, record: dict[Any, Any], timeout_s: float) -> None:
        """Whatever is there; asks once. It is ours from now on."""
        message = m.PutSession(self.epoch, self.store, session_id, record, int(timeout_s * 1000))
        self.connection.call(message, m.SessionPut, timeout_s=timeout_s + 5.0)
        self.sessions.add(session_id)

    def take_session(self, session_id: str) -> dict[str, Any]:
        """Its record; it is ours from now on. Raises: UnknownSessionError, Busy."""
        found = self.connection.call(m.GetSession(self.epoch, self.store, session_id, True), m.Session)
        self.sessions.add(session_id)
        return {str(name): value for name, value in found.record.items()}

    def drop_session(self, session_id: str, *, keep: bool, released: bool = False) -> None:
        message = m.DropSession(self.epoch, self.store, session_id, keep, released)
        self.sessions.discard(session_id)
        self.connection.call_patiently(message, m.SessionDropped)

    def list_sessions(self) -> list[list[Any]]:
        rows: list[list[Any]] = []
        more = True
        while more:
            after = str(rows[-1][0]) if rows else ""
            page = self.connection.call_patiently(m.ListSessions(self.store, after), m.Sessions)
            rows += [row for row in page.sessions if isinstance(row, list)]
            more = page.more and bool(page.sessions)
        return rows

    def goodbye(self) -> bool:
        """Whether the daemon has let everything go. Raises nothing: it finds out anyway when this process ends."""
        if self._populating is not None:
            self._populating.close()
        try:
            self.connection.call(m.Goodbye(self.epoch), m.Bye)
            return True
        except (TierUnavailableError, Busy):
            return False
        finally:
            self.connection.close()


def requests_of(keys: bytes) -> list[bytes]:
    """Keys, one behind the other, cut into as many as one request may name."""
    step = m.MAX_KEYS * m.KEY_BYTES
    return [keys[at : at + step] for at in range(0, len(keys), step)]


def _ints(found: list[object]) -> list[int]:
    return [int(value) for value in found if isinstance(value, int)]


def _slots(blob: bytes) -> IntArray:
    return np.frombuffer(blob, "<i4").astype(np.int64)
