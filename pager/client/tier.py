"""RemoteTier: the daemon as the tier below a client's pager, behind the same calls as a Zarr store.

Writing a block is COMMIT of the slot that it was copied to; reading one is LEASE of a slot to copy it from. Where the daemon's
memory is not ours to map, the bytes go over the socket into and out of a host tier of our own. Calls run on the backend's I/O
workers, one request for many blocks. Without a daemon every call fails at once: reads are misses, writes stay above.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...tiers.errors import BlockMissError, Busy, KvTierError, TierFullError, TierUnavailableError
from ...tiers.nvme.reading import IoTicket
from ...tiers.streams import AllDone, Backend, IntArray, Rows
from ...tiers.workers import Workers
from ..wire.messages import HELD_ALREADY, IS_HELD, STORED, TAKEN
from .attachment import NO_ROOM, Attachment, requests_of
from .handles import Handles
from .session_claims import SessionClaims
from .slab import LeasedSlab

if TYPE_CHECKING:
    from ..prefix import Match
    from .daemon_copies import DaemonCopies

LEASE_WAIT_S = 10.0  # for room in the daemon's memory; then it is a miss and is computed again
RESERVE_WAIT_S = 1.0
PUT_S = 60.0
REFUSED_PAUSE_S = 0.2  # after the daemon had no room for so long
SPARE_HANDLES = 1024  # blocks that we know of and nobody has any more
CLOSE_S = 5.0
_NO_ATTACHMENT = "the daemon is gone; going on without it"


class RemoteTier:
    """`slabs` where the daemon's memory is mapped; else None, and rows are those of a host tier of our own."""

    name = "daemon"
    is_ring = is_encrypted = False  # what the daemon keeps on a disk is sealed there
    loss_counter = "missed_blocks"

    def __init__(
        self, attachment: Attachment, backend: Backend, slabs: Sequence[LeasedSlab] | None, is_up: Callable[[], bool]
    ) -> None:
        self._backend, self._slabs, self._is_up = backend, slabs, is_up
        self.handles = [Handles(2 * capacity + SPARE_HANDLES) for capacity in attachment.capacity_blocks]
        self.attachment = attachment
        self.claims = SessionClaims()
        self.copies: DaemonCopies | None = None  # where we asked for them; for the status
        self.last_write_error: str | None = None
        self._refused_until_s = [0.0] * len(self.handles)
        self._nonce = os.urandom(32)  # private blocks of ours have keys that nobody can guess
        self._privates = itertools.count()
        self._giver: Workers | None = None  # made when it is first needed
        self._starting, self._is_closed = threading.Lock(), False

    # ------------------------------------------------------------------ what it is
    @property
    def takes_writes(self) -> bool:
        return self._is_up()

    @property
    def is_durable(self) -> bool:
        return self.attachment.is_durable

    def num_slots(self, group: int) -> int:
        return self.handles[group].limit

    def free_slots(self, group: int) -> int:
        return self.handles[group].num_free

    def allocate(self, group: int, n: int) -> IntArray:
        return self.handles[group].allocate(n)

    def free(self, group: int, slots: IntArray) -> None:
        """Forget these; what the daemon held for us there may go."""
        handles = self.handles[group]
        slots = slots[slots >= 0]
        held = slots[handles.is_held[slots]]
        if len(held):
            self.unhold(group, handles.keys(held))
        handles.free(slots)

    def quarantine(self, group: int, slots: IntArray) -> None:
        self.free(group, slots)

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]:
        return self.handles[group].stamps[slots]

    def is_listed(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        """The daemon sees to it, when it is told to flush."""
        return np.ones(len(slots), bool)

    def is_near(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        known = self.handles[group].is_near
        return known[slots] if len(known) else np.zeros(len(slots), bool)

    # ------------------------------------------------------------------ blocks
    def write(
        self,
        group: int,
        slots: IntArray,
        source: Rows,
        source_rows: IntArray,
        stamps: npt.NDArray[Any],
        parents: list[bytes] | None = None,
    ) -> IoTicket:
        ticket, handles, attachment = IoTicket(len(slots)), self.handles[group], self.attachment
        stamps = self._with_private_keys(stamps)
        handles.stamps[slots] = stamps
        parents = parents or [b""] * len(slots)
        own = np.array(source_rows)
        rows = own if self._slabs is None else self._slabs[group].place(own)

        def job() -> None:
            since = handles.unholds_over
            try:
                if self._slabs is not None:
                    results = self._commit(attachment, group, self._slabs[group], own, rows, stamps, parents)
                else:
                    results = self._send(attachment, group, source, source_rows, stamps, parents)
            except KvTierError as error:
                self.last_write_error = str(error)
                raise
            handles.note_held(slots[(results & IS_HELD) > 0], since)
            ticket.ok[:] = (results & STORED) > 0
            handles.note_written(slots, ticket.ok)

        ticket.event = AllDone([self._backend.write_io.submit(job)])
        return ticket

    def _commit(
        self,
        attachment: Attachment,
        group: int,
        slab: LeasedSlab,
        slots: IntArray,
        rows: IntArray,
        stamps: npt.NDArray[Any],
        parents: list[bytes],
    ) -> npt.NDArray[np.uint8]:
        """Name what we wrote to reserved rows; a row that is leased to us is the daemon's block already. A failure in the
        middle is that of the rest."""
        results = np.zeros(len(slots), np.uint8)
        ours = np.flatnonzero(slab.is_reserved(slots))
        if len(ours):
            done, generations = attachment.commit(group, rows[ours], stamps[ours], [parents[i] for i in ours.tolist()])
            results[ours], taken = done, done & STORED == TAKEN
            slab.committed(attachment.epoch, slots[ours[taken]], generations[taken])
        theirs = np.setdiff1d(np.arange(len(slots)), ours)
        try:
            flags = attachment.hold(group, np.ascontiguousarray(stamps["key"][theirs]).tobytes())
        except KvTierError as error:
            if not results.any():
                raise
            self.last_write_error = str(error)
            return results
        results[theirs] = (flags > 0) * HELD_ALREADY + (flags == 1) * IS_HELD
        return results

    def _send(
        self,
        attachment: Attachment,
        group: int,
        source: Rows,
        source_rows: IntArray,
        stamps: npt.NDArray[Any],
        parents: list[bytes],
    ) -> npt.NDArray[np.uint8]:
        """Reserve, write the bytes, commit, release: as many at a time as the daemon has slots for. A failure in the middle
        is that of the rest."""
        results = np.zeros(len(stamps), np.uint8)
        done = 0
        while done < len(stamps):
            try:
                rows, _ = attachment.reserve(group, len(stamps) - done, LEASE_WAIT_S)
                try:
                    part = slice(done, done + len(rows))
                    attachment.write_rows(group, rows, source, source_rows[part])
                    results[part], _ = attachment.commit(group, rows, stamps[part], parents[part])
                finally:
                    attachment.release(group, rows)
            except KvTierError as error:
                if not results.any():
                    raise
                self.last_write_error = str(error)
                return results
            done += len(rows)
        return results

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        ticket, attachment = IoTicket(len(slots)), self.attachment
        keys, target_rows = np.ascontiguousarray(stamps["key"]), np.array(target_rows)

        def take(index: IntArray, rows: IntArray, generations: npt.NDArray[np.uint64]) -> None:
            if self._slabs is not None:
                ticket.ok[index] = self._slabs[group].lend(attachment.epoch, target_rows[index], rows, generations)
                return
            try:
                attachment.read_rows(group, rows, target, target_rows[index])
                ticket.ok[index] = True
            finally:
                attachment.release(group, rows)

        def job() -> None:
            self._lease_all(attachment, group, keys, take, at_once=len(keys))

        ticket.event = AllDone([self._backend.read_io.submit(job)])
        return ticket

    def read_layer(
        self, group: int, slots: IntArray, layer: int, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """One layer's slice of each block. The daemon brings whole blocks up for it."""
        ticket, attachment = IoTicket(len(slots)), self.attachment
        keys, target_rows = np.ascontiguousarray(stamps["key"]), np.array(target_rows)
        size = attachment.layouts[group].layer_bytes
        span = slice(layer * size, (layer + 1) * size)
        at_once = self._slabs[group].stream_limit if self._slabs is not None else attachment.lease_limits[group]

        def take(index: IntArray, rows: IntArray, generations: npt.NDArray[np.uint64]) -> None:
            try:
                if attachment.has_slab:
                    target[target_rows[index]] = attachment.rows[group][rows, span]
                    ticket.ok[index] = attachment.generations[group][rows] == generations  # rule 11
                    return
                whole = np.empty((len(rows), attachment.layouts[group].block_bytes), np.uint8)
                attachment.read_rows(group, rows, whole, np.arange(len(rows)))
                target[target_rows[index]] = whole[:, span]
                ticket.ok[index] = True
            finally:
                attachment.release(group, rows)

        def job() -> None:
            self._lease_all(attachment, group, keys, take, at_once=max(1, at_once // 2))

        ticket.event = AllDone([self._backend.read_io.submit(job)])
        return ticket

    def _lease_all(
        self,
        attachment: Attachment,
        group: int,
        keys: npt.NDArray[Any],
        take: Callable[[IntArray, IntArray, npt.NDArray[np.uint64]], None],
        *,
        at_once: int,
    ) -> None:
        """Lease blocks by key, ask again for those without room until the time is up; hand over what came."""
        left, deadline_s = np.arange(len(keys)), time.monotonic() + LEASE_WAIT_S
        while len(left):
            index, later = left[:at_once], left[at_once:]
            wait_s = max(0.05, deadline_s - time.monotonic())
            rows, generations = attachment.lease(group, keys[index].tobytes(), wait_s)
            came = rows >= 0
            if came.any():
                take(index[came], rows[came], generations[came])
            again = index[rows == NO_ROOM] if time.monotonic() < deadline_s else index[:0]
            if len(again) == len(index):
                time.sleep(0.01)
            left = np.concatenate([again, later])

    # ------------------------------------------------------------------ room to write to
    def ask_for_room(self, group: int, count: int) -> None:
        """Reserve slots in the background; the slab hears of it either way."""
        attachment = self.attachment
        assert self._slabs is not None
        slab = self._slabs[group]
        if not self._is_up() or time.monotonic() < self._refused_until_s[group]:
            slab.is_asking = False  # whoever waits shall not wait for this
            return

        def job() -> None:
            rows, generations = np.empty(0, np.int64), np.empty(0, np.uint64)
            try:
                rows, generations = attachment.reserve(group, count, RESERVE_WAIT_S)
            except Busy:
                self._refused_until_s[group] = time.monotonic() + REFUSED_PAUSE_S
            finally:
                slab.add_spare(attachment.epoch, rows, generations)

        try:
            self._backend.write_io.submit(job)
        except KvTierError:  # closing
            slab.is_asking = False

    def release(self, group: int, rows: IntArray) -> None:
        """Give leased or reserved rows back, in the background."""
        self._later(lambda attachment: attachment.release(group, rows))

    def unhold(self, group: int, keys: bytes) -> None:
        handles = self.handles[group]

        def call(attachment: Attachment) -> None:
            try:
                for part in requests_of(keys):
                    attachment.unhold(group, part)
            finally:
                handles.end_unhold()

        handles.begin_unhold()
        if not self._later(call):
            handles.end_unhold()

    def hold(self, group: int, keys: bytes, then: Callable[[Attachment, npt.NDArray[np.uint8]], None]) -> None:
        """Hold these, in the background; `then` hears the flags of HOLD, of the first of them where not all were answered."""

        def call(attachment: Attachment) -> None:
            flags = np.empty(0, np.uint8)
            try:
                for part in requests_of(keys):
                    flags = np.concatenate([flags, attachment.hold(group, part)])
            finally:
                then(attachment, flags)

        if not self._later(call):
            then(self.attachment, np.empty(0, np.uint8))

    def hint(self, keys: list[bytes], hint: str, ttl_ms: int = 0) -> None:
        self._later(lambda attachment: attachment.hint(keys, hint, ttl_ms))

    def used(self, keys: list[bytes], num_tokens: int, found: Match, *, is_turn: bool) -> None:
        """See USED in the protocol. A daemon that has gone counts nothing."""
        with contextlib.suppress(KvTierError):
            self.attachment.used(keys, num_tokens, found, is_turn=is_turn)

    def _later(self, call: Callable[[Attachment], None]) -> bool:
        """One after the other, in the order of our books: a HOLD that overtakes an UNHOLD holds nothing. False: nobody is
        there to call."""
        attachment = self.attachment
        with self._starting:
            if attachment.is_lost or self._is_closed:
                return False
            self._giver = self._giver or Workers("giver", 1, self._backend.notify)
        try:
            self._giver.submit(lambda: call(attachment))
        except KvTierError:  # closing
            return False
        return True

    # ------------------------------------------------------------------ sessions and durability
    def _require(self) -> Attachment:
        if not self._is_up():
            raise TierUnavailableError(_NO_ATTACHMENT)
        return self.attachment

    def flush(self, timeout_s: float | None = None, blocks: Sequence[IntArray] = ()) -> None:
        """Others may have committed `blocks`, and the daemon has them in memory alone.

        Raises: TierFullError where the daemon has lost one; it is looked for anew. TierUnavailableError.
        """
        named = [(h, np.unique(slots)) for h, slots in zip(self.handles, blocks, strict=False) if self.is_durable]
        try:
            self._require().flush(60.0 if timeout_s is None else timeout_s, [h.keys(slots) for h, slots in named])
        except BlockMissError as error:
            for handles, slots in named:
                handles.doubt(slots)
            raise TierFullError(f"the daemon could not keep it all: {error}", retry_after_s=1.0) from error

    def learn(self, secrets: Mapping[int, bytes]) -> None:
        """The daemon has them."""

    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        """Raises as SessionClaims.put does; TierFullError where the daemon could not keep all of its blocks."""
        try:
            self.claims.put(self._require(), session_id, dict(record), PUT_S)
        except BlockMissError as error:
            raise TierFullError(f"the daemon could not keep it all: {error}", retry_after_s=1.0) from error

    def drop_session(self, session_id: str, *, released: bool = False) -> None:
        self._require().drop_session(session_id, keep=False, released=released)
        self.claims.forget(session_id)

    def sessions(self) -> dict[str, dict[str, Any]]:
        return {}  # asked for one by one, when they are resumed

    def recovered(self) -> list[tuple[IntArray, npt.NDArray[Any]]]:
        return [(np.empty(0, np.int64), handles.stamps[:0]) for handles in self.handles]

    def status(self) -> dict[str, Any]:
        return {
            "is_attached": self._is_up(),
            "boot": self.attachment.connection.welcome.boot.hex(),
            "epoch": self.attachment.epoch,
            "protocol": self.attachment.version,
            "shares_memory": self._slabs is not None,
            "known_blocks": sum(handles.limit - handles.num_free for handles in self.handles),
            "held_blocks": sum(int(handles.is_held.sum()) for handles in self.handles),
            "last_write_error": self.last_write_error,
            **({} if self.copies is None else self.copies.status()),
        }

    def close(self) -> None:
        """Its pager has said goodbye, if no copy ran any more."""
        with self._starting:
            self._is_closed = True
        if self._giver is not None:
            self._giver.close(CLOSE_S)

    # ------------------------------------------------------------------ inside
    def _with_private_keys(self, stamps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Another one for each write: the daemon may still have what an earlier block of the same number was."""
        stamps = stamps.copy()
        for i in np.flatnonzero(stamps["tokens"] == 0).tolist():
            number = next(self._privates).to_bytes(16, "little")
            name = hashlib.blake2b(stamps["key"][i].tobytes(), digest_size=32, key=self._nonce, salt=number)
            stamps["key"][i] = name.digest()
        return stamps
