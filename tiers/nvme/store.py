"""NvmeTier: blocks in the segments of a Zarr store, many per call, written and read by the backend's I/O workers.

A block is listed only after its bytes are written; a block is served only when its trailer names the key and generation
that the manifest lists and its bytes match the checksum. Whatever fails that is `ok=False` in the ticket, never an
exception and never served. How a listing becomes durable is durable.py's business, when is commit.py's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, TierUnavailableError
from ..formats import BlockFormat
from ..streams import Backend, IntArray, Rows
from . import SEGMENT_BYTES
from .calls import SystemCalls
from .codecs import NONE, check_codecs, warn_of_others
from .commit import Committer, Durability, check_durability
from .durable import DurableListing
from .files import SegmentFiles
from .identity import MANIFEST_FILE, StoreIdentity, claim, grow_arrays, make_arrays, stored_codecs
from .layout import Geometry
from .manifest import STAMP, Manifest
from .movers import Movers
from .reading import IoTicket, Reader
from .segment_io import SegmentIo
from .slots import NONE_OPEN, SlotBook, segments_of
from .writing import Writer

__all__ = ["STAMP", "IoTicket", "NvmeTier", "StoreIdentity"]
CLOSE_SECONDS = 30.0  # for writes under way
_LOG = logging.getLogger("kvtier.nvme")


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
        self.corrupt_blocks = 0
        self._committer = Committer(self._listing.commit_quietly) if self._commits_by_itself() else None
        told = self._committer.wrote if self._committer is not None else _nobody
        self._writer = Writer(backend.write_io, self._files, self._movers, self._books, self._listing, durability, told)
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
        calls = calls or SystemCalls()
        fd, is_new = claim(where, identity, calls)
        try:
            if is_new:
                chosen_codecs = asked or [NONE] * len(slots)
                made = make_arrays(where, identity, slots, chosen_codecs, about or {}, segment_bytes, calls)
            else:
                made = grow_arrays(where, identity, slots, calls)
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
                calls,
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

    def is_listed(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether these blocks, which were written once, would be found again: a sync that was refused since may say no.

        Without the lock, which a commit keeps while the journal is synced: callers ask again behind their own commit.
        """
        found: npt.NDArray[np.bool_] = self._books[group].listing.listed[slots]
        return found

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
            return self._books[group].footprint(listing.stamps[listing.slots()])

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]:
        """What the manifest says of these slots."""
        return self._books[group].listing.stamps[slots]

    def keys_at(self, group: int, slots: IntArray) -> list[bytes]:
        """The keys that the manifest lists in these slots, empty where it lists nothing or there is no such slot."""
        listing = self._books[group].listing
        is_listed, stamps = listing.listed, listing.stamps
        there = (slots >= 0) & (slots < min(len(is_listed), len(stamps)))
        there[there] = is_listed[slots[there]]
        keys = iter(stamps["key"][slots[there]])
        return [next(keys).tobytes() if one else b"" for one in there.tolist()]

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
        return self._writer.write(group, slots, source, source_rows, stamps)

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
        return self._writer.relocate(group, slots, targets)

    # ------------------------------------------------------------------ sessions and durability
    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        """Raises TierUnavailableError when the journal takes no more."""
        self._listing.put_session(session_id, record)

    def drop_session(self, session_id: str) -> None:
        self._listing.drop_session(session_id)

    def sessions(self) -> dict[str, dict[str, Any]]:
        return self._listing.sessions()

    def flush(self, timeout_s: float | None = None, blocks: Sequence[IntArray] = ()) -> None:
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
            "journal_gaps": self.journal_gaps,
            "torn_journal_bytes": self.torn_journal_bytes,
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
    def journal_gaps(self) -> int:
        """Damaged places that the journal had when it was opened."""
        return self._listing.journal_gaps

    @property
    def torn_journal_bytes(self) -> int:
        """What was cut off its end then."""
        return self._listing.torn_journal_bytes

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
    def moved_bytes(self) -> int:
        """Bytes written again to make segments clean."""
        return self._writer.moved_bytes

    @property
    def write_amplification(self) -> float:
        """Bytes written over bytes that were put; what is above 1 was written again to make segments clean."""
        put = self._io.bytes_written - self.moved_bytes
        return self._io.bytes_written / put if put else 1.0

    def close(self, timeout_s: float = CLOSE_SECONDS) -> None:
        """Commit and let go of the lock, once what is being written is down.

        Where a disk takes longer, lock and journal stay with this process, so that no other gets slots that bytes are still
        on their way to; a later call tries again.
        """
        if self._lock_fd < 0:
            return
        if not self._writer.wait(timeout_s):
            _LOG.error("event=store_not_closed path=%s reason=writes under way: it stays locked", self._path)
            return
        if self._committer is not None:
            self._committer.close()
        self._listing.close()
        self._files.close()
        os.close(self._lock_fd)
        self._lock_fd = -1

    # ------------------------------------------------------------------ inside
    def _lost(self, group: int, slots: IntArray) -> None:
        """A segment cannot be relied upon: what it held is corrupt as far as anybody can tell."""
        self.corrupt_blocks += len(slots)
        self._movers.plain.forget(group, slots)

    def _commits_by_itself(self) -> bool:
        return self._durability == "batch" and self._backend.name != "simulated"


def _nobody(nbytes: int) -> None:
    """Hears of listed bytes where no thread commits them."""
