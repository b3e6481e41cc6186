"""Lease: the only way to a block table. Its pages are resident, pinned, and their copies have been waited for.

The pager fills a lease; the engine reads tables and slot mapping from it, runs its kernels, and says `commit` when the
new tokens' K/V are written. Releasing records what the compute stream has submitted, so that no later copy overtakes it
(rules 2 and 3). A lease that is released without commit leaves the sequence as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .selecting import Picked, SliceSelection
from .states import IntArray
from .streaming import SliceStream, Staged

if TYPE_CHECKING:
    from .lease_keeping import LeaseKeeper


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) of a sequence that one step will compute, and how much of its context they see."""

    seq: int
    start: int
    end: int
    window: int | None = None  # in full-attention groups, see this many last tokens, and the first `sinks`
    sinks: int = 0


@dataclass(slots=True)
class GroupLease:
    """What a lease holds in one layer group."""

    tables: npt.NDArray[np.int32]  # [spans, max_blocks], compact; -1 behind the end
    kv_lens: npt.NDArray[np.int32]  # [spans], compact lengths, new tokens included
    slots: IntArray  # [new tokens]: page * block_size + offset
    listed: list[IntArray] = field(default_factory=list)  # per span: the logical blocks that its table lists
    pinned: list[IntArray] = field(default_factory=list)  # pages
    written: list[IntArray] = field(default_factory=list)  # pages
    new_blocks: list[tuple[int, int, IntArray]] = field(default_factory=list)  # (seq, first logical block, block ids)
    stream: SliceStream | None = None
    selection: SliceSelection | None = None

    @property
    def copies(self) -> list[SliceStream | SliceSelection]:
        """What copies past the host tier while the step runs."""
        return [one for one in (self.stream, self.selection) if one is not None]


class Lease:
    """Pinned, resident pages for one step over some spans.

    Shapes: cu_q int32 [spans + 1]; tables[g] int32 [spans, max_blocks]; kv_lens[g] int32 [spans]; slots[g] int64
    [cu_q[-1]]. Tables are compact: blocks that the group dropped or streams are left out and kv_lens count only what the
    table lists, so a kernel never meets a hole. Distances to the newest token stay true within the window.
    """

    def __init__(
        self, keeper: LeaseKeeper, spans: list[Span], *, is_write_only: bool = False, is_selected: bool = False
    ) -> None:
        self._keeper = keeper
        self.spans = spans
        self.is_write_only = is_write_only  # tables list only blocks that get new tokens
        self.is_selected = is_selected  # context stays where it is; the step picks what it reads
        self.cu_q = np.array([0, *accumulate([s.end - s.start for s in spans])], np.int32)
        self.groups: list[GroupLease] = []
        self.wait_s = 0.0  # how long the caller waited for blocks
        self.is_streamed = False
        self.holds_sequences = False
        self._is_released = False
        self._is_committed = False

    @property
    def tables(self) -> list[npt.NDArray[np.int32]]:
        return [g.tables for g in self.groups]

    @property
    def kv_lens(self) -> list[npt.NDArray[np.int32]]:
        return [g.kv_lens for g in self.groups]

    @property
    def slots(self) -> list[IntArray]:
        return [g.slots for g in self.groups]

    def stream(self, group: int, layer: int) -> Iterator[Staged]:
        """Context that is not resident, as staged layer slices; empty when everything is. `layer` counts in the group.

        Raises: BlockMissError when a block could not be read back; release the lease and compute from num_computed.
        """
        stream = self.groups[group].stream
        if stream is None:
            return iter(())
        return self._keeper.stream(self, group, stream, layer)

    def pick(self, group: int, layer: int, blocks: IntArray) -> Iterator[Picked]:
        """Slices of context blocks that are not resident, of a selected lease. Raises as `stream` does."""
        selection = self.groups[group].selection
        assert selection is not None
        return self._keeper.pick(self, group, selection, layer, blocks)

    def commit(self) -> None:
        """The K/V of all new tokens are submitted for writing: they count as computed from here on.

        Raises: BlockMissError when a streamed slice turns out not to have arrived; release the lease and compute again.
        """
        if self._is_released or self._is_committed:
            raise RuntimeError("lease: commit after release, or twice")
        self._keeper.commit(self)
        self._is_committed = True

    def release(self) -> None:
        """Unpin. Without a commit before it, the new tokens do not count as computed."""
        if not self._is_released:
            self._is_released = True
            self._keeper.release(self, committed=self._is_committed)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
