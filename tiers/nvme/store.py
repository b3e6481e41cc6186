"""NvmeTier: blocks in the segments of a Zarr store, many per call, written and read by the backend's I/O workers.

A block is listed only after its bytes are written; a block is served only when its trailer names the key and generation
that the manifest lists and its bytes match the checksum. Whatever fails that is `ok=False` in the ticket, never an
exception and never served.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..checksum import block_sum, layer_sums
from ..errors import TierFullError, TierUnavailableError
from ..streams import Backend, Event, IntArray, Rows
from .identity import MANIFEST_FILE, StoreIdentity, claim, grow_arrays, make_arrays, read_identity, segment_path
from .layout import Geometry, Trailer
from .manifest import STAMP, Manifest, replay

__all__ = ["STAMP", "IoTicket", "NvmeTier", "StoreIdentity", "read_store_status"]
_PIECE_SLOTS = 8  # slots per job: enough jobs for all workers, few enough to cost nothing


class IoTicket:
    """One call under way. `ok[i]` says whether slot i is good, once `event` is done."""

    def __init__(self, n: int) -> None:
        self.ok: npt.NDArray[np.bool_] = np.zeros(n, bool)
        self.checksums = np.zeros(n, np.uint64)
        self.event: AllDone = AllDone([])


class AllDone:
    """Done when all of these are."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    @property
    def error(self) -> BaseException | None:
        return next((event.error for event in self._events if event.error is not None), None)

    def is_done(self) -> bool:
        return all(event.is_done() for event in self._events)

    def wait(self, timeout_s: float | None = None) -> bool:
        return all(event.wait(timeout_s) for event in self._events)


class _Group:
    """Slots of one layer group: what is listed, what is free."""

    def __init__(self, num_slots: int, geometry: Geometry) -> None:
        self.num_slots, self.geometry = num_slots, geometry
        self.stamps = np.zeros(0, STAMP)
        self.listed = np.zeros(0, bool)
        self.returned: list[int] = []  # a heap: the lowest free slot first
        self.fresh = 0  # slots from here on were never used
        self.num_used = 0

    def reach(self, slot: int) -> None:
        if slot >= len(self.stamps):
            size = max(slot + 1, 2 * len(self.stamps), 64)
            self.stamps = np.concatenate([self.stamps, np.zeros(size - len(self.stamps), STAMP)])
            self.listed = np.concatenate([self.listed, np.zeros(size - len(self.listed), bool)])


class NvmeTier:
    """Open with `NvmeTier.open`."""

    def __init__(
        self, path: Path, identity: StoreIdentity, num_slots: list[int], backend: Backend, lock_fd: int
    ) -> None:
        self._path, self._identity, self._backend, self._lock_fd = path, identity, backend, lock_fd
        self._groups = [_Group(n, Geometry.of(g)) for n, g in zip(num_slots, identity.layouts, strict=True)]
        self._manifest = Manifest.open(path / MANIFEST_FILE)
        self._lock = threading.Lock()
        self._generation = 1
        self._unsynced: set[Path] = set()
        self._made: set[Path] = set()
        self.corrupt_blocks = self.bytes_written = self.bytes_read = 0
        self._recovered = [self._take_over(i) for i in range(len(self._groups))]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: StoreIdentity,
        *,
        num_slots: Sequence[int],
        backend: Backend,
    ) -> NvmeTier:
        """Create or reopen a store with room for num_slots[g] blocks of each layer group.

        Raises: ConfigError, StoreMismatchError, StoreLockedError; the directory is then as it was.
        """
        where = Path(path)
        fd, is_new = claim(where, identity)
        try:
            (make_arrays if is_new else grow_arrays)(where, identity, list(num_slots))
            return cls(where, identity, list(num_slots), backend, fd)
        except BaseException:
            os.close(fd)
            raise

    # ------------------------------------------------------------------ slots
    def num_slots(self, group: int) -> int:
        return self._groups[group].num_slots

    def free_slots(self, group: int) -> int:
        held = self._groups[group]
        return max(0, held.num_slots - held.num_used)

    def allocate(self, group: int, n: int) -> IntArray:
        """n slots, the lowest free ones. Raises TierFullError and changes nothing when there are fewer."""
        held = self._groups[group]
        with self._lock:
            if n > held.num_slots - held.num_used:
                raise TierFullError(
                    f"nvme tier full: {held.num_used} of {held.num_slots} slots of group {group} used, {n} more wanted; "
                    "raise nvme_bytes or forget sessions",
                    retry_after_s=0.1,
                )
            slots = [heapq.heappop(held.returned) for _ in range(min(n, len(held.returned)))]
            fresh = n - len(slots)
            slots += range(held.fresh, held.fresh + fresh)
            held.fresh += fresh
            held.num_used += n
            if slots:
                held.reach(max(slots))
        return np.array(slots, np.int64)

    def free(self, group: int, slots: IntArray) -> None:
        """Give slots back; their records and index entries go first."""
        if not len(slots):
            return
        held = self._groups[group]
        with self._lock:
            listed = slots[held.listed[slots]]
            held.listed[slots] = False
            for slot in slots.tolist():
                heapq.heappush(held.returned, slot)
            held.num_used -= len(slots)
            if len(listed):
                self._manifest.drop(group, listed)
                self._write_index(group, listed)

    def quarantine(self, group: int, slots: IntArray) -> None:
        """These slots hold something else than they should: count them and take them out of the listing."""
        self.corrupt_blocks += len(slots)
        self.free(group, slots)

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]:
        """What the manifest says of these slots."""
        return self._groups[group].stamps[slots]

    def recovered(self) -> list[tuple[IntArray, npt.NDArray[Any]]]:
        """Slots and stamps per group that the manifest listed at open."""
        return self._recovered

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
        """Write blocks; each is listed once all of this call's bytes are down. Source rows must not change meanwhile."""
        ticket, stamps = IoTicket(len(slots)), stamps.copy()
        with self._lock:
            stamps["generation"] = np.arange(self._generation, self._generation + len(slots))
            self._generation += len(slots)
        pieces = _pieces(len(slots))
        left = [len(pieces)]

        def job(piece: range) -> None:
            for i in piece:
                ticket.ok[i] = self._write_one(group, int(slots[i]), source[source_rows[i]], stamps[i : i + 1])
            with self._lock:
                left[0] -= 1
                if left[0] == 0:
                    ticket.checksums[:] = stamps["checksum"]
                    self._publish(group, slots[ticket.ok], stamps[ticket.ok])

        ticket.event = AllDone([self._backend.write_io.submit(_bound(job, piece)) for piece in pieces])
        return ticket

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read blocks into target rows. A slot that fails any check is ok=False and its row means nothing."""
        return self._read(len(slots), lambda i: self._read_one(group, int(slots[i]), target[target_rows[i]], stamps[i]))

    def read_layer(
        self, group: int, slots: IntArray, layer: int, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read one layer's slice of each block, proven by the trailer's layer sums."""
        return self._read(
            len(slots), lambda i: self._read_slice(group, int(slots[i]), layer, target[target_rows[i]], stamps[i])
        )

    def _read(self, n: int, read_one: Callable[[int], bool]) -> IoTicket:
        ticket = IoTicket(n)

        def job(piece: range) -> None:
            for i in piece:
                ticket.ok[i] = read_one(i)

        ticket.event = AllDone([self._backend.read_io.submit(_bound(job, piece)) for piece in _pieces(n)])
        return ticket

    # ------------------------------------------------------------------ sessions and durability
    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        with self._lock:
            self._manifest.put_session(session_id, record)

    def drop_session(self, session_id: str) -> None:
        with self._lock:
            self._manifest.drop_session(session_id)

    def sessions(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            return dict(self._manifest.listing.sessions)

    def flush(self, timeout_s: float | None = None) -> None:
        """What is listed survives a power loss once this returns: data first, then the manifest."""
        with self._lock:
            paths, self._unsynced = self._unsynced, set()
        try:
            for path in paths:
                _sync_file(path)
            self._manifest.sync()
        except OSError as error:
            raise TierUnavailableError(
                f"store {self._path}: {error.strerror}; what was written may not last"
            ) from error

    def status(self) -> dict[str, Any]:
        return {
            "path": str(self._path),
            "used_slots": [g.num_used for g in self._groups],
            "num_slots": [g.num_slots for g in self._groups],
            "corrupt_blocks": self.corrupt_blocks,
            "bytes_written": self.bytes_written,
            "bytes_read": self.bytes_read,
            "sessions": len(self._manifest.listing.sessions),
        }

    def close(self) -> None:
        """Flush and let go of the lock."""
        if self._lock_fd < 0:
            return
        self.flush()
        self._manifest.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # ------------------------------------------------------------------ one slot
    def _write_one(self, group: int, slot: int, row: npt.NDArray[np.uint8], stamp: npt.NDArray[Any]) -> bool:
        geometry, layout = self._groups[group].geometry, self._identity.layouts[group]
        sums = layer_sums(layout, row)
        stamp["checksum"] = block_sum(sums)
        trailer = Trailer(
            stamp["key"][0].tobytes(),
            int(stamp["generation"][0]),
            int(stamp["checksum"][0]),
            int(stamp["tokens"][0]),
            sums,
        )
        segment, offset = geometry.place(slot)
        try:
            fd = os.open(self._segment(group, segment), os.O_RDWR)
            try:
                written = os.pwritev(fd, [row.data, geometry.tail(row, trailer)], offset)
            finally:
                os.close(fd)
        except OSError:
            return False
        self.bytes_written += written
        return written == geometry.stride

    def _read_one(self, group: int, slot: int, row: npt.NDArray[np.uint8], stamp: Any) -> bool:
        geometry = self._groups[group].geometry
        tail = bytearray(geometry.tail_bytes)
        if not self._pread(group, slot, 0, [row, tail]):
            return False
        trailer = geometry.read_tail(bytes(tail))
        if trailer is None or not _same(trailer, stamp):
            return False
        return bool(np.array_equal(layer_sums(self._identity.layouts[group], row), trailer.layer_sums))

    def _read_slice(self, group: int, slot: int, layer: int, row: npt.NDArray[np.uint8], stamp: Any) -> bool:
        geometry, size = self._groups[group].geometry, self._identity.layouts[group].layer_bytes
        tail = bytearray(geometry.tail_bytes)
        if not self._pread(group, slot, geometry.block_bytes, [tail]):
            return False
        trailer = geometry.read_tail(bytes(tail))
        if trailer is None or not _same(trailer, stamp) or not self._pread(group, slot, layer * size, [row]):
            return False
        return xxhash.xxh3_64_intdigest(row.data) == int(trailer.layer_sums[layer])

    def _pread(self, group: int, slot: int, start: int, buffers: list[Any]) -> bool:
        segment, offset = self._groups[group].geometry.place(slot)
        wanted = sum(memoryview(b).nbytes for b in buffers)
        try:
            fd = os.open(segment_path(self._path, self._identity.layouts[group], group, segment), os.O_RDONLY)
            try:
                got = os.preadv(fd, buffers, offset + start)
            finally:
                os.close(fd)
        except OSError:
            return False
        self.bytes_read += got
        return got == wanted

    # ------------------------------------------------------------------ segments and listing
    def _segment(self, group: int, segment: int) -> Path:
        """The file of a segment, preallocated with an empty index on first use."""
        path = segment_path(self._path, self._identity.layouts[group], group, segment)
        with self._lock:
            if path in self._made or path.exists():
                self._made.add(path)
                return path
            geometry = self._groups[group].geometry
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(fd, 0, geometry.segment_bytes)
                os.pwrite(fd, geometry.index_page(np.zeros(geometry.slots_per_segment, bool)), 0)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
            self._made.add(path)
        return path

    def _publish(self, group: int, slots: IntArray, stamps: npt.NDArray[Any]) -> None:
        if not len(slots):
            return
        held = self._groups[group]
        held.stamps[slots] = stamps
        held.listed[slots] = True
        self._manifest.put(group, slots, stamps)
        self._write_index(group, slots)

    def _write_index(self, group: int, slots: IntArray) -> None:
        held, layout = self._groups[group], self._identity.layouts[group]
        size = held.geometry.slots_per_segment
        for segment in np.unique(slots // size).tolist():
            path = segment_path(self._path, layout, group, segment)
            held.reach((segment + 1) * size - 1)
            page = held.geometry.index_page(held.listed[segment * size : (segment + 1) * size])
            try:
                fd = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # somebody deleted it: its blocks fail their checks, a new file may be made
                self._made.discard(path)
                continue
            try:
                os.pwrite(fd, page, 0)
            finally:
                os.close(fd)
            self._unsynced.add(path)

    def _take_over(self, group: int) -> tuple[IntArray, npt.NDArray[Any]]:
        held, found = self._groups[group], self._manifest.listing.group(group)
        slots = np.array(sorted(found), np.int64)
        stamps = np.array([found[slot] for slot in slots.tolist()], STAMP)
        found.clear()  # from here on the arrays below are the truth
        if len(slots):
            held.reach(int(slots.max()))
            held.stamps[slots] = stamps
            held.listed[slots] = True
            held.fresh = int(slots.max()) + 1
            held.num_used = len(slots)
            held.returned = np.setdiff1d(np.arange(held.fresh), slots).tolist()
            self._generation = max(self._generation, int(stamps["generation"].max()) + 1)
        return slots, stamps


def read_store_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a store at rest holds, without a lock and without writing. Raises ConfigError when it is none."""
    where = Path(path)
    identity = read_identity(where)
    listing = replay(where / MANIFEST_FILE)
    groups = []
    for index, fields in enumerate(identity.get("layouts", [])):
        from ..layout import KVLayout

        layout = KVLayout.from_dict(fields)
        blocks = len(listing.group(index))
        groups.append(
            {"name": layout.name, "blocks": blocks, "bytes": blocks * layout.block_bytes, "dtype": layout.dtype}
        )
    return {
        "path": str(where),
        "format": identity.get("format"),
        "model_fingerprint": str(identity.get("model_fingerprint", ""))[:16],
        "groups": groups,
        "sessions": len(listing.sessions),
        "used_bytes": sum(group["bytes"] for group in groups),
    }


def _sync_file(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return  # nothing of it is left to keep; its blocks fail their checks when read
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _same(trailer: Trailer, stamp: Any) -> bool:
    return (
        trailer.key == stamp["key"].tobytes()
        and trailer.generation == int(stamp["generation"])
        and trailer.checksum == int(stamp["checksum"])
    )


def _pieces(n: int) -> list[range]:
    return [range(i, min(i + _PIECE_SLOTS, n)) for i in range(0, n, _PIECE_SLOTS)]


def _bound(job: Callable[[range], None], piece: range) -> Callable[[], None]:
    def call() -> None:
        job(piece)

    return call
