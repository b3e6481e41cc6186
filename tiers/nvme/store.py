"""NvmeTier: blocks in the segments of a Zarr store, many per call, written and read by the backend's I/O workers.

A block is listed only after its bytes are written; a block is served only when its trailer names the key and generation
that the manifest lists and its bytes match the checksum. Whatever fails that is `ok=False` in the ticket, never an
exception and never served. How a listing becomes durable is durable.py's business, when is commit.py's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, TierUnavailableError
from ..formats import BlockFormat
from ..streams import AllDone, Backend, Event, IntArray, Rows
from . import SEGMENT_BYTES
from .blocks import BlockCall
from .codecs import NONE, check_codecs, warn_of_others
from .commit import Committer, Durability, check_durability
from .durable import DurableListing
from .files import SegmentFiles, SystemCalls
from .identity import MANIFEST_FILE, StoreIdentity, claim, grow_arrays, make_arrays, stored_codecs
from .layout import Geometry
from .manifest import STAMP, Manifest
from .movers import Movers
from .reading import IoTicket, Reader, bound
from .segment_io import SegmentIo
from .slots import NONE_OPEN, Run, SlotBook, plan_runs, segments_of

__all__ = ["STAMP", "IoTicket", "NvmeTier", "StoreIdentity"]


class NvmeTier:
    """Open with `NvmeTier.open`."""

    name = "nvme"
    is_ring = is_durable = takes_writes = True
    loss_counter = "corrupt_blocks"

    def __init__(
        self,
        path: Path,
        identity: StoreIdentity,
        geometries: list[Geometry],
        num_slots: list[int],
        backend: Backend,
        lock_fd: int,
        durability: Durability,
        codecs: list[str],
        calls: SystemCalls,
        with_checksums: bool,
        secrets: Mapping[int, bytes],
    ) -> None:
        self._path, self._identity, self._backend, self._lock_fd = path, identity, backend, lock_fd
        self._durability = durability
        manifest = Manifest.open(path / MANIFEST_FILE, calls)
        listing = manifest.listing
        self._books = [SlotBook(n, g, listing.group(i)) for i, (n, g) in enumerate(zip(num_slots, geometries))]
        self._files = SegmentFiles(path, identity.layouts, geometries, calls)
        self._io = SegmentIo(self._files)
        self._movers = Movers(
            self._io, self._files, identity.layouts, geometries, codecs, secrets, with_checksums=with_checksums
        )
        self._reader = Reader(backend.read_io, self._movers, self._books, identity.layouts)
        self._listing = DurableListing(path, manifest, self._books, self._files, durability, self._lost)
        self._lock = self._listing.lock  # of the books too
        self._generation = 1 + max((int(b.listing.stamps["generation"].max(initial=0)) for b in self._books), default=0)
        self._relocating = threading.Lock()
        self.corrupt_blocks = self.moved_bytes = 0
        self._committer = Committer(self._listing.commit_quietly) if self._commits_by_itself() else None
        self._listing.recover()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: StoreIdentity,
        *,
        num_slots: Sequence[int],
        backend: Backend,
        durability: str = "batch",
        codecs: Sequence[str] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        about: Mapping[str, Any] | None = None,
        calls: SystemCalls | None = None,
        with_checksums: bool = True,
        secrets: Mapping[int, bytes] | None = None,
    ) -> NvmeTier:
        """Create or reopen a store with room for num_slots[g] blocks of each layer group.

        `durability` is none, batch or always (commit.py); `codecs` names each group's codec (codecs.py; none by default)
        in a new store and is ignored, with a warning, where an array exists under another; `about` describes the model in
        a new store's Zarr attributes; `secrets` are those of namespaces, by owner tag, for an encrypted one; `calls` and
        `with_checksums` (of blocks not encoded) are for tests and measurements.
        Raises: ConfigError, StoreMismatchError, StoreLockedError; the directory is then as it was.
        """
        where, chosen, slots = Path(path), check_durability(durability), list(num_slots)
        asked = check_codecs(codecs, identity.layouts)
        fd, is_new = claim(where, identity)
        try:
            if is_new:
                made = make_arrays(where, identity, slots, asked or [NONE] * len(slots), about or {}, segment_bytes)
            else:
                made = grow_arrays(where, identity, slots)
            kept = stored_codecs(where, identity)
            warn_of_others(where, kept, asked)
            return cls(
                where,
                identity,
                made,
                slots,
                backend,
                fd,
                chosen,
                kept,
                calls or SystemCalls(),
                with_checksums,
                secrets or {},
            )
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

    def allocate(self, group: int, n: int, *, not_in: int = NONE_OPEN) -> IntArray:
        """n slots, neighbours where possible, none in segment `not_in`.

        Raises TierFullError and changes nothing when there are fewer.
        """
        with self._lock:
            return self._books[group].allocate(n, group, not_in=not_in)

    def free(self, group: int, slots: IntArray) -> None:
        """Give slots back; they are taken out of the journal first, out of the index pages with the next commit."""
        if not len(slots):
            return
        book = self._books[group]
        with self._lock:
            listed = slots[book.listing.listed[slots]]
            if len(listed):
                self._listing.drop_locked(group, listed)
            book.free(slots)
        self._movers.plain.forget(group, slots)

    def quarantine(self, group: int, slots: IntArray) -> None:
        """These slots hold something else than they should: count them and take them out of the listing."""
        self.corrupt_blocks += len(slots)
        self.free(group, slots)

    def is_near(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        return np.zeros(len(slots), bool)

    def block_bytes(self, group: int) -> int:
        return self._identity.layouts[group].block_bytes

    def format(self, group: int) -> BlockFormat | None:
        """What whole blocks are rounded to; None where they are kept as they are."""
        return self._movers.format(group)

    def usual_bytes(self, group: int) -> int:
        """Bytes of disk that a whole block is counted with; under a format those of a packed one."""
        return self._movers.usual_bytes(group)

    def spare_rows(self, group: int, count: int) -> Rows:
        """Rows to read blocks into and write them from again, to here or to a store of the same codec."""
        return self._movers.spare_rows(group, count)

    def stored_bytes(self, group: int) -> int:
        """Bytes of disk under the listed blocks of a group."""
        with self._lock:
            listing = self._books[group].listing
            return self._footprint(group, listing.stamps[listing.slots()])

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
        self._number(stamps)
        runs = list(plan_runs(self._books[group].geometry, slots))
        left = [len(runs)]

        def wrote(run: Run, is_whole: bool) -> None:
            ticket.ok[run.part] = is_whole
            with self._lock:
                left[0] -= 1
                is_last = left[0] == 0
            if is_last:
                ticket.checksums[:] = stamps["checksum"]
                self._publish(group, slots, stamps, ticket)

        def job(run: Run) -> None:
            wrote(run, self._write_run(group, run, source, source_rows, stamps))

        plain, queue = self._movers.plain, self._backend.write_io
        waits_for_syncs = self._durability == "always"  # a thread that computes for others should not
        if self._movers.of(group) is plain and not waits_for_syncs and plain.goes_straight(group, source, source_rows):
            events = [self._in_steps(group, run, source, source_rows, stamps, wrote) for run in runs]
        else:
            events = [queue.submit(bound(job, run)) for run in runs]
        ticket.event = AllDone(events)
        return ticket

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read blocks into target rows. A slot that fails any check is ok=False and its row means nothing."""
        return self._reader.read(group, slots, target, target_rows, stamps)

    def read_layer(
        self, group: int, slots: IntArray, layer: int, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> IoTicket:
        """Read one layer's slice of each block, proven by the trailer's layer sums. Under a codec, decodes whole blocks."""
        return self._reader.read_layer(group, slots, layer, target, target_rows, stamps)

    # ------------------------------------------------------------------ the ring
    def geometry(self, group: int) -> Geometry:
        return self._books[group].geometry

    def num_segments(self, group: int) -> int:
        """Whole segments that the group may fill."""
        return self._books[group].num_segments

    def num_clean(self, group: int) -> int:
        """Segments that can be filled from their front."""
        with self._lock:
            return self._books[group].num_clean()

    def sealed(self, group: int) -> tuple[IntArray, IntArray]:
        """Segments that hold blocks and are not being filled, oldest first, and how many slots of each are used."""
        with self._lock:
            segments = self._books[group].sealed()
            return segments, self._books[group].num_used_in(segments)

    def retain(self, group: int, segment: int) -> None:
        """Leave a segment as it is; it counts as the youngest from now on."""
        with self._lock:
            self._books[group].retain(segment)

    def relocate(self, group: int, slots: IntArray, targets: IntArray) -> IoTicket:
        """Copy listed blocks to other slots, durably, and list them there instead.

        Where the ticket says ok, give `slots` back afterwards, elsewhere `targets`; `unreadable` are not what is listed.
        """
        ticket = IoTicket(len(slots))

        def job() -> None:
            with self._relocating:
                self._relocate(group, slots, targets, ticket)

        ticket.event = AllDone([self._backend.write_io.submit(job)])
        return ticket

    # ------------------------------------------------------------------ sessions and durability
    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        """Raises TierUnavailableError when the journal takes no more."""
        self._listing.put_session(session_id, record)

    def drop_session(self, session_id: str) -> None:
        self._listing.drop_session(session_id)

    def sessions(self) -> dict[str, dict[str, Any]]:
        return self._listing.sessions()

    def flush(self, timeout_s: float | None = None) -> None:
        """What is listed survives a power loss once this returns (`none`: a crash of the process only).

        Raises: TierUnavailableError when the disk refused; blocks whose bytes are in doubt are no longer listed.
        """
        if self._durability != "none":
            self._listing.commit()

    # ------------------------------------------------------------------ maintenance
    def rewrite_indexes(self) -> None:
        """Write the index of every segment that holds a block anew. Raises TierUnavailableError."""
        self._listing.distrust_indexes()
        self._listing.commit()
        if self._listing.num_stale:
            raise TierUnavailableError(f"store {self._path}: {self._listing.num_stale} indexes could not be written")

    def drop_segment(self, group: int, number: int) -> None:
        """Forget a segment that holds no block; its file may be removed."""
        self._listing.forget_segment((group, number))
        self._files.forget((group, number))

    def punch_unused(self, group: int) -> None:
        """Give the disk under free slots of sparse segments back. Nothing else may be in flight."""
        book = self._books[group]
        size, stride = book.geometry.slots_per_segment, book.geometry.stride
        for number in segments_of(book.geometry, book.listing.slots()) if book.geometry.is_encoded else []:
            for slot, stored in enumerate(book.listing.stored_in_segment(number, size).tolist(), number * size):
                _, start = book.geometry.place(slot)
                used = book.geometry.footprint(stored) if stored else 0
                self._files.punch((group, number), start + used, start + stride)

    def shrink_journal(self) -> None:
        """Rewrite the journal without history, whatever its size."""
        self._listing.shrink_journal()

    def status(self) -> dict[str, Any]:
        return {
            "path": str(self._path),
            "used_slots": [book.num_used for book in self._books],
            "num_slots": [book.num_slots for book in self._books],
            "clean_segments": [book.num_clean() for book in self._books],
            "segments": [book.num_segments for book in self._books],
            "corrupt_blocks": self.corrupt_blocks,
            "bytes_written": self._io.bytes_written,
            "bytes_read": self._io.bytes_read,
            "moved_bytes": self.moved_bytes,
            "write_amplification": self.write_amplification,
            "last_write_error": self._io.last_write_error,
            "failed_syncs": self._listing.failed_syncs,
            "failed_index_writes": self._listing.failed_index_writes,
            "torn_indexes": self._listing.torn_indexes,
            "doubtful_blocks": self._listing.doubtful_blocks,
            "durability": self._durability,
            "codecs": self.codecs,
            "stored_bytes": [self.stored_bytes(group) for group in range(len(self._books))],
            "direct_io": self._files.is_direct,
            "sessions": len(self._listing.sessions()),
        }

    def learn(self, secrets: Mapping[int, bytes]) -> None:
        """Secrets of more namespaces, by owner tag. Those that are known stay: blocks are sealed with them."""
        self._movers.learn(secrets)

    @property
    def codecs(self) -> list[str]:
        """Of each layer group, as the store's arrays have them."""
        return self._movers.codecs

    @property
    def is_encrypted(self) -> bool:
        return self._movers.is_encrypted

    @property
    def last_write_error(self) -> str | None:
        return self._io.last_write_error

    @property
    def write_amplification(self) -> float:
        """Bytes written over bytes that were put; what is above 1 was written again to make segments clean."""
        put = self._io.bytes_written - self.moved_bytes
        return self._io.bytes_written / put if put else 1.0

    def close(self) -> None:
        """Commit and let go of the lock."""
        if self._lock_fd < 0:
            return
        if self._committer is not None:
            self._committer.close()
        self._listing.close()
        self._files.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # ------------------------------------------------------------------ inside
    def _number(self, stamps: npt.NDArray[Any]) -> None:
        """Give every write a generation of its own."""
        with self._lock:
            stamps["generation"] = np.arange(self._generation, self._generation + len(stamps))
            self._generation += len(stamps)

    def _write_run(self, group: int, run: Run, source: Rows, source_rows: IntArray, stamps: npt.NDArray[Any]) -> bool:
        part, is_empty = run.part, self._is_empty(group, run.segment)
        return self._movers.of(group).write(group, run, source, source_rows[part], stamps[part], is_empty=is_empty)

    def _in_steps(
        self,
        group: int,
        run: Run,
        source: Rows,
        source_rows: IntArray,
        stamps: npt.NDArray[Any],
        wrote: Callable[[Run, bool], None],
    ) -> Event:
        """Queue the write of one run."""
        mover, part = self._movers.plain, run.part
        prepared: BlockCall
        is_whole = False

        def before() -> None:
            nonlocal prepared
            prepared = mover.before_write(group, run, source, source_rows[part], stamps[part])

        def call() -> None:
            nonlocal is_whole
            is_whole = mover.call_write(prepared, is_empty=self._is_empty(group, run.segment))

        def after() -> None:
            mover.after_write(prepared)
            wrote(run, is_whole)

        return self._backend.write_io.submit_steps((before, call, after))

    def _is_empty(self, group: int, segment: int) -> bool:
        """Whether nothing is listed in the segment."""
        book = self._books[group]
        with self._lock:
            return not book.listing.in_segment(segment, book.geometry.slots_per_segment).any()

    def _publish(self, group: int, slots: IntArray, stamps: npt.NDArray[Any], ticket: IoTicket) -> None:
        """List what was written whole; under `always`, make it durable before the call counts as done."""
        good = ticket.ok.copy()
        if not good.any():
            return
        try:
            self._listing.put(group, slots[good], stamps[good])
            if self._durability == "always":
                self._listing.commit()
        except (OSError, TierUnavailableError):
            ticket.ok[:] = False
            return
        if self._committer is not None:
            self._committer.wrote(self._footprint(group, stamps[good]))

    def _relocate(self, group: int, slots: IntArray, targets: IntArray, ticket: IoTicket) -> None:
        """New bytes are durable before the journal says so, and the journal before the old slots are used again."""
        book, geometry = self._books[group], self._books[group].geometry
        stamps = book.listing.stamps[slots].copy()
        rows = self.spare_rows(group, len(slots))
        places, good = np.arange(len(slots)), np.zeros(len(slots), bool)
        for run in plan_runs(geometry, slots):
            good[run.part] = self._movers.of(group).read(group, run, rows, places[run.part], stamps[run.part])
        ticket.unreadable = ~good
        self._number(stamps)
        for run in plan_runs(geometry, targets):
            good[run.part] &= self._write_run(group, run, rows, places, stamps)
        try:
            if self._durability != "none":
                self._listing.wrote(group, targets)
                self._listing.commit()
            self._listing.move(group, slots[good], targets[good], stamps[good])
        except (OSError, TierUnavailableError):
            return
        if self._durability != "none":
            self._listing.commit_quietly()
        self.moved_bytes += self._footprint(group, stamps[good])
        ticket.ok[:] = good

    def _lost(self, group: int, slots: IntArray) -> None:
        """A segment cannot be relied upon: what it held is corrupt as far as anybody can tell."""
        self.corrupt_blocks += len(slots)
        self._movers.plain.forget(group, slots)

    def _footprint(self, group: int, stamps: npt.NDArray[Any]) -> int:
        """Bytes of disk under these blocks."""
        return int(self._books[group].geometry.footprint(stamps["stored_bytes"]).sum())

    def _commits_by_itself(self) -> bool:
        return self._durability == "batch" and self._backend.name != "simulated"
