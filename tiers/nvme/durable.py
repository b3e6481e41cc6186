"""What a store lists, and how that becomes durable.

Order: data, then the index pages, synced; then the journal that lists them, synced. Where a sync fails, what was written
since the last one that did not is in doubt: it leaves the listing, and is not trusted because a later sync succeeds. An
index that could not be written costs nobody anything but foreign readers: it is written again with the next commit. One
lock guards books, listing and journal; it is not held while segments are synced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import TierUnavailableError
from ..streams import IntArray
from .commit import Durability
from .files import ForeignSegmentError, Segment, SegmentFiles
from .manifest import Manifest
from .session_table import SessionTable
from .slots import SlotBook, segments_of

Stamps = npt.NDArray[Any]


class DurableListing:
    """The journal, the segments that wait for a sync, and the commits that settle both."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        books: list[SlotBook],
        files: SegmentFiles,
        durability: Durability,
        on_distrust: Callable[[int, IntArray], None],
    ) -> None:
        self._path, self._manifest, self._books, self._files = path, manifest, books, files
        self._syncs, self._on_distrust = durability != "none", on_distrust
        self._table = SessionTable(path, manifest.listing.sessions, files.calls)
        self.lock = threading.Lock()
        self._commit_lock = threading.Lock()  # one commit at a time
        self._unsynced: dict[Segment, list[IntArray]] = {}  # slots written since the segment was last synced
        self._stale_index: set[Segment] = set()  # their index pages say something else than the journal
        self.failed_syncs = self.failed_index_writes = self.torn_indexes = self.doubtful_blocks = 0
        self.num_refused = 0  # segments whose bytes a commit could not make durable

    # ------------------------------------------------------------------ changes
    def put(self, group: int, slots: IntArray, stamps: Stamps) -> None:
        """List blocks whose bytes are written. Raises OSError when the journal takes no more."""
        with self.lock:
            self._manifest.put(group, slots, stamps)
            self._changed(group, slots)
            self._wrote(group, slots)

    def move(
        self, group: int, left: IntArray, slots: IntArray, stamps: Stamps, generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """List blocks at other slots, but for those whose old slot was given to others since. Returns which.

        Raises OSError.
        """
        with self.lock:
            same: npt.NDArray[np.bool_] = self._books[group].listing.stamps["generation"][left] == generations
            self._manifest.move(group, left[same], slots[same], stamps[same])
            self._changed(group, left[same])
            self._changed(group, slots[same])
            return same

    def wrote(self, group: int, slots: IntArray) -> None:
        """Bytes went down that are not listed yet; the next commit syncs them."""
        with self.lock:
            self._wrote(group, slots)

    def drop_locked(self, group: int, slots: IntArray) -> None:
        """Take slots out of the journal; the lock is held. A journal that refuses costs nothing: the blocks fail their
        checks later."""
        try:
            self._manifest.drop(group, slots)
        except OSError:
            self._books[group].listing.drop(slots)
        self._changed(group, slots)

    def put_session(self, session_id: str, record: dict[str, Any]) -> None:
        """Raises TierUnavailableError when the journal takes no more."""
        with self._recording():
            self._manifest.put_session(session_id, record)
            self._table.put(session_id, record)

    def drop_session(self, session_id: str) -> None:
        with self._recording():
            self._manifest.drop_session(session_id)
            self._table.drop(session_id)

    def sessions(self) -> dict[str, dict[str, Any]]:
        with self.lock:
            return dict(self._manifest.listing.sessions)

    def distrust_indexes(self) -> None:
        """Have the next commit write the index of every segment that holds a block."""
        with self.lock:
            for group, book in enumerate(self._books):
                self._stale_index |= self._segments(group, book.listing.slots())

    @property
    def num_stale(self) -> int:
        """Segments whose index on disk says something else than the journal."""
        return len(self._stale_index)

    def forget_segment(self, segment: Segment) -> None:
        with self.lock:
            self._unsynced.pop(segment, None)
            self._stale_index.discard(segment)

    # ------------------------------------------------------------------ commit
    def commit(self) -> None:
        """Raises TierUnavailableError when anything refused; blocks whose bytes are in doubt are then listed no more."""
        with self._commit_lock:
            with self.lock:
                torn, self._files.torn = self._files.torn, set()
                self.torn_indexes += len(torn)
                stale, self._stale_index = self._stale_index | torn, set()
                unsynced: dict[Segment, list[IntArray]] = {}
                if self._syncs:
                    unsynced, self._unsynced = self._unsynced, {}
                pages = {segment: self._stored(segment) for segment in stale}
            gone: set[Segment] = set()
            late = {segment for segment in sorted(stale) if not self._write_index(segment, pages[segment], gone)}
            touched = sorted((stale | unsynced.keys()) - gone)
            refused = {segment for segment in touched if not self._sync(segment)}
            self.num_refused += len(refused | (gone & unsynced.keys()))
            for segment in refused:
                self._distrust(segment, unsynced.get(segment, []))
            with self.lock:
                self._stale_index |= late | refused
            refused |= gone & unsynced.keys()
            try:
                with self.lock:
                    table = self._table.snapshot()
                    try:
                        self._believe(touched, refused, unsynced)
                    except OSError:  # they are synced and nothing says so: the next commit has them to settle again
                        for segment in unsynced.keys() - refused:
                            self._unsynced.setdefault(segment, []).extend(unsynced[segment])
                        raise
                    if self._syncs:
                        self._manifest.sync()
                    if self._manifest.listing.is_settled:
                        self._manifest.shrink_if_possible()
            except OSError as error:
                self.failed_syncs += 1
                raise TierUnavailableError(
                    f"store {self._path}: {error.strerror}; what was written may not last"
                ) from error
            if table is not None:
                self._table.write(table)
            if refused:
                raise TierUnavailableError(f"store {self._path}: {len(refused)} segments could not be made durable")

    def commit_quietly(self) -> None:
        try:
            self.commit()
        except TierUnavailableError:
            pass  # counted in failed_syncs; what is in doubt is no longer listed

    def recover(self) -> None:
        """After a crash: blocks that a power loss may have taken go, and index pages that may lag behind are written.

        A power loss can keep a block's listing and take its bytes when they were never synced; a session that is parked
        on such a block must be able to rely on it, and nobody was told that it lasts. Who was only killed has lost
        nothing: the machine has not been started since. (`none` promises nothing: what it lists stays until it is read.)
        The journal is synced whatever it says: who was killed may have written it and not got so far.
        """
        boot, recorded = self._files.calls.boot_id(), self._manifest.listing.boot
        is_told = self._distrust_unsynced() if self._syncs and not (boot and boot == recorded) else True
        for group, book in enumerate(self._books):
            self._wrote(group, book.listing.doubts())
            self._changed(group, np.flatnonzero(book.listing.changed))
        if boot != recorded and is_told:
            self._begin_boot_quietly(boot)
        table = self._table.snapshot()
        if table is not None:
            self._table.write(table)
        if self._stale_index:
            self.commit_quietly()
            for book in self._books:
                book.free_unlisted()
        elif self._syncs:
            self._sync_journal_quietly()

    def shrink_journal(self) -> None:
        """Rewrite the journal without history, whatever its size. Raises TierUnavailableError."""
        with self._recording():
            self._manifest.shrink(always=True)

    @property
    def journal_gaps(self) -> int:
        """Damaged places that the journal had when it was opened."""
        return self._manifest.gaps

    @property
    def torn_journal_bytes(self) -> int:
        """What was cut off its end then."""
        return self._manifest.torn_bytes

    def close(self) -> None:
        """Commit once more; who closes in order finds everything again, whatever the durability."""
        self._syncs = True
        self.commit_quietly()
        self._manifest.close()

    # ------------------------------------------------------------------ inside
    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            with self.lock:
                yield
        except OSError as error:
            raise TierUnavailableError(f"store {self._path}: the journal takes no more: {error.strerror}") from error

    def _distrust_unsynced(self) -> bool:
        """List what was never synced no more. Whether the journal says so too."""
        is_told = True
        for group, book in enumerate(self._books):
            doubts = book.listing.doubts()
            self.doubtful_blocks += len(doubts)
            try:
                if len(doubts):
                    self._manifest.drop(group, doubts)
            except OSError:
                book.listing.drop(doubts)
                is_told = False
        return is_told

    def _begin_boot_quietly(self, boot: str) -> None:
        try:
            self._manifest.begin_boot(boot)
        except OSError:
            pass  # what follows counts as written in an earlier boot: a crash then costs what was not synced

    def _sync_journal_quietly(self) -> None:
        try:
            self._manifest.sync()
        except OSError:
            self.failed_syncs += 1

    def _segments(self, group: int, slots: IntArray) -> set[Segment]:
        return {(group, number) for number in segments_of(self._books[group].geometry, slots)}

    def _changed(self, group: int, slots: IntArray) -> None:
        self._stale_index |= self._segments(group, slots)

    def _wrote(self, group: int, slots: IntArray) -> None:
        for segment in self._segments(group, slots):
            self._unsynced.setdefault(segment, []).append(slots)

    def _believe(self, touched: list[Segment], refused: set[Segment], unsynced: dict[Segment, list[IntArray]]) -> None:
        """Record what a commit has settled; the lock is held. Raises OSError."""
        if not self._syncs:
            return
        if touched and not self._stale_index:  # nothing was written since
            self._manifest.commit()
            return
        for segment in sorted(unsynced.keys() - refused):
            written_again = self._in_segment(segment, self._unsynced.get(segment, []))
            slots = np.setdiff1d(self._in_segment(segment, unsynced[segment]), written_again)
            self._manifest.believe(segment[0], slots)

    def _write_index(self, segment: Segment, stored: npt.NDArray[np.uint64], gone: set[Segment]) -> bool:
        """Whether that need not be tried again. A segment that is none of ours any more lists nothing and is `gone`."""
        try:
            self._files.write_index(segment, stored)
        except FileNotFoundError:
            return True  # somebody deleted it; its blocks fail their checks, and a new file may be made
        except ForeignSegmentError:  # a power loss can cut a new one short; once it lists nothing it is made anew
            group, number = segment
            size = self._books[group].geometry.slots_per_segment
            self._distrust(segment, [np.arange(number * size, (number + 1) * size)])
            gone.add(segment)
        except OSError:
            self.failed_index_writes += 1
            return False
        return True

    def _sync(self, segment: Segment) -> bool:
        try:
            if self._syncs:
                self._files.sync(segment)
        except FileNotFoundError:
            return True
        except OSError:
            self.failed_syncs += 1
            return False
        return True

    def _distrust(self, segment: Segment, written: list[IntArray]) -> None:
        """What was written to this segment and never synced is not listed any more; its file is opened anew."""
        group, _ = segment
        book = self._books[group]
        with self.lock:
            slots = self._in_segment(segment, written)
            slots = slots[slots < len(book.listing.listed)]
            slots = slots[book.listing.listed[slots]]
            if len(slots):
                self.drop_locked(group, slots)
        self._on_distrust(group, slots)
        self._files.forget(segment)

    def _in_segment(self, segment: Segment, written: list[IntArray]) -> IntArray:
        """Those of the slots that lie in a segment, each once."""
        group, number = segment
        slots = np.unique(np.concatenate([*written, np.empty(0, np.int64)])).astype(np.int64)
        return slots[slots // self._books[group].geometry.slots_per_segment == number]

    def _stored(self, segment: Segment) -> npt.NDArray[np.uint64]:
        """Stored bytes of the slots of a segment, 0 for those that are not listed."""
        group, number = segment
        book = self._books[group]
        return book.listing.stored_in_segment(number, book.geometry.slots_per_segment)
