"""NvmeTier: blocks in the segments of a Zarr store, many per call, written and read by the backend's I/O workers.

A block is listed only after its bytes are written; a block is served only when its trailer names the key and generation
that the manifest lists and its bytes match the checksum. Whatever fails that is `ok=False` in the ticket, never an
exception and never served. Order of durability: data and index pages, then the journal that lists them (commit.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, TierUnavailableError
from ..streams import AllDone, Backend, IntArray, Rows
from .blocks import BlockIo
from .commit import Committer, Durability, check_durability
from .files import Segment, SegmentFiles, SystemCalls
from .identity import MANIFEST_FILE, StoreIdentity, claim, grow_arrays, make_arrays
from .layout import Geometry
from .manifest import STAMP, Manifest
from .slots import Run, SlotBook, plan_runs, segments_of

__all__ = ["STAMP", "IoTicket", "NvmeTier", "StoreIdentity"]


class IoTicket:
    """One call under way. `ok[i]` says whether slot i is good, once `event` is done."""

    def __init__(self, n: int) -> None:
        self.ok: npt.NDArray[np.bool_] = np.zeros(n, bool)
        self.checksums = np.zeros(n, np.uint64)
        self.event: AllDone = AllDone([])


class NvmeTier:
    """Open with `NvmeTier.open`."""

    def __init__(
        self,
        path: Path,
        identity: StoreIdentity,
        num_slots: list[int],
        backend: Backend,
        lock_fd: int,
        durability: Durability,
        calls: SystemCalls,
        with_checksums: bool,
    ) -> None:
        self._path, self._identity, self._backend, self._lock_fd = path, identity, backend, lock_fd
        self._durability = durability
        self._manifest = Manifest.open(path / MANIFEST_FILE, calls)
        listing = self._manifest.listing
        geometries = [Geometry.of(layout) for layout in identity.layouts]
        self._books = [SlotBook(n, g, listing.group(i)) for i, (n, g) in enumerate(zip(num_slots, geometries))]
        self._files = SegmentFiles(path, identity.layouts, calls)
        self._io = BlockIo(self._files, identity.layouts, with_checksums=with_checksums)
        self._lock = threading.Lock()  # of the books and the journal; never held during a sync
        self._commit_lock = threading.Lock()  # one commit at a time
        self._generation = 1 + max((int(b.listing.stamps["generation"].max(initial=0)) for b in self._books), default=0)
        self._unsynced: set[Segment] = set()  # written since the last commit
        self._stale_index: set[Segment] = set()  # their index pages say something else than the journal
        self.corrupt_blocks = self.failed_syncs = 0
        self._committer = Committer(self._commit_quietly) if self._commits_by_itself() else None
        self._recover(listing.uncommitted)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: StoreIdentity,
        *,
        num_slots: Sequence[int],
        backend: Backend,
        durability: str = "batch",
        calls: SystemCalls | None = None,
        with_checksums: bool = True,
    ) -> NvmeTier:
        """Create or reopen a store with room for num_slots[g] blocks of each layer group.

        `durability` is none, batch or always (commit.py). `calls` and `with_checksums` are for tests and measurements.
        Raises: ConfigError, StoreMismatchError, StoreLockedError; the directory is then as it was.
        """
        where, chosen = Path(path), check_durability(durability)
        fd, is_new = claim(where, identity)
        try:
            (make_arrays if is_new else grow_arrays)(where, identity, list(num_slots))
            return cls(where, identity, list(num_slots), backend, fd, chosen, calls or SystemCalls(), with_checksums)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"nvme_path={str(where)!r} cannot be used: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    # ------------------------------------------------------------------ slots
    def num_slots(self, group: int) -> int:
        return self._books[group].num_slots

    def free_slots(self, group: int) -> int:
        return self._books[group].num_free

    def allocate(self, group: int, n: int) -> IntArray:
        """n slots, neighbours where possible. Raises TierFullError and changes nothing when there are fewer."""
        with self._lock:
            return self._books[group].allocate(n, group)

    def free(self, group: int, slots: IntArray) -> None:
        """Give slots back; they are taken out of the journal first, out of the index pages with the next commit."""
        if not len(slots):
            return
        book = self._books[group]
        with self._lock:
            listed = slots[book.listing.listed[slots]]
            if len(listed):
                self._record_drop(group, listed)
            book.free(slots)
        self._io.forget(group, slots)

    def quarantine(self, group: int, slots: IntArray) -> None:
        """These slots hold something else than they should: count them and take them out of the listing."""
        self.corrupt_blocks += len(slots)
        self.free(group, slots)

    def block_bytes(self, group: int) -> int:
        return self._identity.layouts[group].block_bytes

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]:
        """What the manifest says of these slots."""
        return self._books[group].listing.stamps[slots]

    def recovered(self) -> list[tuple[IntArray, npt.NDArray[Any]]]:
        """Slots and stamps per group that the manifest lists."""
        found = []
        for book in self._books:
            slots = book.listing.slots()
            found.append((slots, book.listing.stamps[slots]))
        return found

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
        runs = list(plan_runs(self._books[group].geometry, slots))
        left = [len(runs)]

        def job(run: Run) -> None:
            part = slice(run.start, run.start + run.count)
            ticket.ok[part] = self._io.write(group, run, source, source_rows[part], stamps[part])
            with self._lock:
                left[0] -= 1
                is_last = left[0] == 0
            if is_last:
                ticket.checksums[:] = stamps["checksum"]
                self._publish(group, slots, stamps, ticket)

        ticket.event = AllDone([self._backend.write_io.submit(_bound(job, run)) for run in runs])
        return ticket

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read blocks into target rows. A slot that fails any check is ok=False and its row means nothing."""
        ticket = IoTicket(len(slots))

        def job(run: Run) -> None:
            part = slice(run.start, run.start + run.count)
            ticket.ok[part] = self._io.read(group, run, target, target_rows[part], stamps[part])

        runs = plan_runs(self._books[group].geometry, slots)
        ticket.event = AllDone([self._backend.read_io.submit(_bound(job, run)) for run in runs])
        return ticket

    def read_layer(
        self, group: int, slots: IntArray, layer: int, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read one layer's slice of each block, proven by the trailer's layer sums."""
        ticket = IoTicket(len(slots))
        size = self._identity.layouts[group].layer_bytes
        step = max(1, _SLICE_JOB_BYTES // size)

        def job(first: int) -> None:
            for i in range(first, min(first + step, len(slots))):
                ticket.ok[i] = self._io.read_slice(group, int(slots[i]), layer, target[target_rows[i]], stamps[i])

        firsts = range(0, len(slots), step)
        ticket.event = AllDone([self._backend.read_io.submit(_bound(job, first)) for first in firsts])
        return ticket

    # ------------------------------------------------------------------ sessions and durability
    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        """Raises TierUnavailableError when the journal takes no more."""
        with self._lock:
            self._journal(lambda: self._manifest.put_session(session_id, record))

    def drop_session(self, session_id: str) -> None:
        with self._lock:
            self._journal(lambda: self._manifest.drop_session(session_id))

    def sessions(self) -> dict[str, dict[str, Any]]:
        with self._lock:
            return dict(self._manifest.listing.sessions)

    def flush(self, timeout_s: float | None = None) -> None:
        """What is listed survives a power loss once this returns (`none`: a crash of the process only).

        Raises: TierUnavailableError when the disk refused; blocks whose bytes are in doubt are no longer listed.
        """
        if self._durability != "none":
            self._commit()

    # ------------------------------------------------------------------ maintenance
    def rewrite_indexes(self) -> None:
        """Write the index page of every segment that holds a block anew. Raises TierUnavailableError."""
        with self._lock:
            for group, book in enumerate(self._books):
                numbers = segments_of(book.geometry, book.listing.slots())
                self._stale_index |= {(group, number) for number in numbers}
        self._commit()

    def drop_segment(self, group: int, number: int) -> None:
        """Forget a segment that holds no block; its file may be removed."""
        with self._lock:
            self._unsynced.discard((group, number))
            self._stale_index.discard((group, number))
        self._files.forget((group, number))

    def shrink_journal(self) -> None:
        """Rewrite the journal without history, whatever its size."""
        with self._lock:
            self._manifest.shrink(always=True)

    def status(self) -> dict[str, Any]:
        return {
            "path": str(self._path),
            "used_slots": [book.num_used for book in self._books],
            "num_slots": [book.num_slots for book in self._books],
            "corrupt_blocks": self.corrupt_blocks,
            "bytes_written": self._io.bytes_written,
            "bytes_read": self._io.bytes_read,
            "failed_syncs": self.failed_syncs,
            "durability": self._durability,
            "direct_io": self._files.is_direct,
            "sessions": len(self._manifest.listing.sessions),
        }

    def close(self) -> None:
        """Commit and let go of the lock."""
        if self._lock_fd < 0:
            return
        if self._committer is not None:
            self._committer.close()
        self._commit_quietly()
        self._files.close()
        self._manifest.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # ------------------------------------------------------------------ listing
    def _publish(self, group: int, slots: IntArray, stamps: npt.NDArray[Any], ticket: IoTicket) -> None:
        """List what was written whole; under `always`, make it durable before the call counts as done."""
        good = ticket.ok.copy()
        if not good.any():
            return
        segments = {(group, number) for number in segments_of(self._books[group].geometry, slots[good])}
        try:
            with self._lock:
                self._manifest.put(group, slots[good], stamps[good])
                self._unsynced |= segments
                self._stale_index |= segments
            if self._durability == "always":
                self._commit()
        except (OSError, TierUnavailableError):
            ticket.ok[:] = False
            return
        if self._committer is not None:
            self._committer.wrote(int(good.sum()) * self._books[group].geometry.stride)

    def _record_drop(self, group: int, slots: IntArray) -> None:
        """Take slots out of the journal. A journal that refuses costs nothing: their blocks fail their checks later."""
        try:
            self._manifest.drop(group, slots)
        except OSError:
            self._books[group].listing.drop(slots)
        geometry = self._books[group].geometry
        self._stale_index |= {(group, number) for number in segments_of(geometry, slots)}

    def _journal(self, record: Callable[[], None]) -> None:
        try:
            record()
        except OSError as error:
            raise TierUnavailableError(f"store {self._path}: the journal takes no more: {error.strerror}") from error

    def _commits_by_itself(self) -> bool:
        return self._durability == "batch" and self._backend.name != "simulated"

    def _commit_quietly(self) -> None:
        try:
            self._commit()
        except TierUnavailableError:
            pass  # counted in failed_syncs; what is in doubt is no longer listed

    def _commit(self) -> None:
        """Index pages and data down, then the journal. Raises TierUnavailableError when anything refused."""
        with self._commit_lock:
            with self._lock:
                stale, self._stale_index = self._stale_index, set()
                unsynced, self._unsynced = self._unsynced | stale, set()
                pages = {segment: self._listed(segment) for segment in stale}
            refused = [segment for segment in sorted(unsynced) if not self._settle(segment, pages.get(segment))]
            for segment in refused:
                self._distrust(segment)
            try:
                with self._lock:
                    if unsynced and not self._stale_index:
                        self._manifest.commit()
                    if self._durability != "none":
                        self._manifest.sync()
                    if not self._manifest.listing.uncommitted:
                        self._manifest.shrink()
            except OSError as error:
                self.failed_syncs += 1
                raise TierUnavailableError(
                    f"store {self._path}: {error.strerror}; what was written may not last"
                ) from error
            if refused:
                raise TierUnavailableError(f"store {self._path}: {len(refused)} segments could not be made durable")

    def _settle(self, segment: Segment, listed: npt.NDArray[np.bool_] | None) -> bool:
        """Write the index page and sync one segment. A failed sync is never repeated and trusted."""
        try:
            if listed is not None:
                self._files.write_index(segment, listed)
            if self._durability != "none":
                self._files.sync(segment)
        except FileNotFoundError:
            return True  # somebody deleted it; its blocks fail their checks, and a new file may be made
        except OSError:
            self.failed_syncs += 1
            return False
        return True

    def _distrust(self, segment: Segment) -> None:
        """Nothing in this segment can be relied upon any more: its blocks are not listed, its file is opened anew."""
        group, number = segment
        size = self._books[group].geometry.slots_per_segment
        with self._lock:
            slots = number * size + np.flatnonzero(self._listed(segment))
            if len(slots):
                self.corrupt_blocks += len(slots)
                self._record_drop(group, slots)
        self._io.forget(group, slots)
        self._files.forget(segment)

    def _listed(self, segment: Segment) -> npt.NDArray[np.bool_]:
        group, number = segment
        book = self._books[group]
        size = book.geometry.slots_per_segment
        book.listing.reach((number + 1) * size)
        return book.listing.listed[number * size : (number + 1) * size].copy()

    def _recover(self, uncommitted: list[tuple[int, IntArray]]) -> None:
        """After a crash, index pages may lag behind the journal: write those anew that changed since the last commit."""
        for group, slots in uncommitted:
            if group < len(self._books) and len(slots):
                numbers = segments_of(self._books[group].geometry, slots)
                self._stale_index |= {(group, number) for number in numbers}
        if self._stale_index:
            self._commit_quietly()


_SLICE_JOB_BYTES = 1 << 20  # slices of small blocks share a job


def _bound(job: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    def call() -> None:
        job(argument)

    return call
