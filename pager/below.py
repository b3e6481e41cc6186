"""What lies below the device: the two seams at which a pager of its own and a client of pagerd differ.

A `Slab` holds the host tier's slots: our own memory, or slots of a daemon's memory that are leased to us. A `LowerTier` takes
blocks from there and gives them back by slot: a Zarr store, or the daemon. Everything above the two is the same code. Nothing
here runs; the classes say what both kinds promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..tiers.streams import Event, IntArray, Rows


class Slab(Protocol):
    """Host slots. A slot is a number of ours; `place` says which row of `rows` it is now."""

    rows: Rows

    @property
    def num_slots(self) -> int: ...

    @property
    def nodes(self) -> IntArray | None:
        """Per slot the NUMA node of its row, the nearest is 0; None where rows are not kept apart by nodes."""

    @property
    def node_rates(self) -> tuple[float, ...]:
        """What the links to those nodes carry, against each other."""

    @property
    def is_asking(self) -> bool:
        """Whether more room to write to is on its way."""

    def place(self, slots: IntArray) -> IntArray:
        """Rows of slots that hold, or are about to hold, a block."""

    def room_to_write(self, wanted: int) -> int:
        """How many free slots may be written to now, at most `wanted`; starts asking for what is short."""

    def begin_write(self, slots: IntArray) -> None:
        """These free slots are about to be written to; `room_to_write` said that they can."""

    def let_go(self, slots: IntArray) -> None:
        """These slots are free again."""

    def intact(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether the rows of these slots still are what they were when the slots were filled (rule 11)."""


class Ticket(Protocol):
    """One call under way; `ok[i]` says whether slot i is good, once `event` is done. `unreadable`: of a relocation."""

    ok: npt.NDArray[np.bool_]
    unreadable: npt.NDArray[np.bool_]

    @property
    def event(self) -> Event: ...


class LowerTier(Protocol):
    """Blocks by slot, many per call; what fails is `ok=False`, never an exception and never served."""

    @property
    def name(self) -> str:
        """For people: nvme, daemon."""

    @property
    def is_ring(self) -> bool:
        """Whether it has segments that a pager must keep clean."""

    @property
    def is_durable(self) -> bool:
        """Whether what is flushed survives this process."""

    @property
    def is_encrypted(self) -> bool:
        """Whether what it keeps is sealed with secrets that we give it."""

    def learn(self, secrets: Mapping[int, bytes]) -> None:
        """Secrets of more namespaces, by owner tag."""

    @property
    def takes_writes(self) -> bool: ...

    @property
    def loss_counter(self) -> str:
        """What a block counts as that could not be read back."""

    @property
    def last_write_error(self) -> str | None: ...

    def num_slots(self, group: int) -> int: ...

    def free_slots(self, group: int) -> int: ...

    def allocate(self, group: int, n: int) -> IntArray:
        """Raises TierFullError."""

    def free(self, group: int, slots: IntArray) -> None: ...

    def quarantine(self, group: int, slots: IntArray) -> None: ...

    def stamps(self, group: int, slots: IntArray) -> npt.NDArray[Any]: ...

    def is_listed(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether these blocks, which were written once, would be found again: a sync that was refused since may say no."""

    def is_near(self, group: int, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Whether these blocks lie in memory there, not on a disk."""

    def write(
        self,
        group: int,
        slots: IntArray,
        source: Rows,
        source_rows: IntArray,
        stamps: npt.NDArray[Any],
        parents: list[bytes] | None = None,
    ) -> Ticket: ...

    def read(
        self, group: int, slots: IntArray, target: Rows, target_rows: IntArray, stamps: npt.NDArray[Any]
    ) -> Ticket: ...

    def read_layer(
        self,
        group: int,
        slots: IntArray,
        layer: int,
        target: Rows,
        target_rows: IntArray,
        stamps: npt.NDArray[Any],
    ) -> Ticket: ...

    def put_session(self, session_id: str, record: dict[str, Any]) -> None: ...

    def drop_session(self, session_id: str) -> None: ...

    def sessions(self) -> dict[str, dict[str, Any]]: ...

    def recovered(self) -> list[tuple[IntArray, npt.NDArray[Any]]]: ...

    def flush(self, timeout_s: float | None = None, blocks: Sequence[IntArray] = ()) -> None:
        """What was written is durable when this returns; `blocks`: slots per group, also where others wrote them."""

    def status(self) -> dict[str, Any]: ...

    def close(self) -> None: ...
