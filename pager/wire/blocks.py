"""Messages about blocks: found, stored, leased, held, hinted at, counted, and their bytes over the socket.

Dataclasses only; messages.py checks them, docs/protocol.md explains them. `Done` is the reply that says no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .limits import REPLY


@dataclass(frozen=True, slots=True)
class Done:
    """`flags` one byte per item where the request had items."""

    KIND: ClassVar[int] = 22 | REPLY  # of Release
    flags: bytes = b""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which of these keys are held. `prefix`: stop behind the first one that a full layer group lacks."""

    KIND: ClassVar[int] = 18
    store: int
    keys: bytes
    prefix: bool = True
    hold: bool = False  # since version 2: what is found is held, as by HOLD
    counts: bool = True  # with the feature "usage": it stands for a request; false where USED will tell of that


@dataclass(frozen=True, slots=True)
class Found:
    """One byte per layer group and key, groups in order: 0 no, 1 in the slab, 2 on nvme; +4 when it is now held."""

    KIND: ClassVar[int] = Lookup.KIND | REPLY
    held: bytes
    num_keys: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Slots to write new blocks to."""

    KIND: ClassVar[int] = 19
    epoch: int
    store: int
    group: int
    count: int


@dataclass(frozen=True, slots=True)
class Slots:
    """Reply to RESERVE and LEASE: i32 per block (-1 not held by anybody, -2 no room now) and u64 generations."""

    KIND: ClassVar[int] = Reserve.KIND | REPLY
    slots: bytes
    generations: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """Blocks that were written whole to reserved slots. `tokens` is 0 for a block that only its writer knows of."""

    KIND: ClassVar[int] = 20
    epoch: int
    store: int
    group: int
    slots: bytes  # i32
    keys: bytes
    parents: bytes  # keys, zeros where there is none
    tokens: bytes  # u32
    owners: bytes  # u32 tag of the namespace of each
    hold: bool = False  # since version 2


@dataclass(frozen=True, slots=True)
class Committed:
    """One byte per block: 0 refused, 1 taken (the slot is a read lease now), 2 held already (the slot stays reserved).

    +4 when the block is now held for this client.
    """

    KIND: ClassVar[int] = Commit.KIND | REPLY
    results: bytes
    generations: bytes


@dataclass(frozen=True, slots=True)
class Lease:
    """Slots to read these blocks from; the answer waits until those on nvme are up. Each lease counts."""

    KIND: ClassVar[int] = 21
    epoch: int
    store: int
    group: int
    keys: bytes
    wait_ms: int = 5000


@dataclass(frozen=True, slots=True)
class Leased(Slots):
    KIND: ClassVar[int] = Lease.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Release:
    """Give slots back, leased or reserved; no copy of ours touches them any more."""

    KIND: ClassVar[int] = 22
    epoch: int
    store: int
    group: int
    slots: bytes


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep these blocks in some tier while this client lives; a byte each: 0 not there, 1 held, 2 over the limit."""

    KIND: ClassVar[int] = 23
    epoch: int
    store: int
    group: int
    keys: bytes


@dataclass(frozen=True, slots=True)
class Held(Done):
    KIND: ClassVar[int] = Hold.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Unhold:
    KIND: ClassVar[int] = 24
    epoch: int
    store: int
    group: int
    keys: bytes


@dataclass(frozen=True, slots=True)
class Unheld(Done):
    KIND: ClassVar[int] = Unhold.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Read:
    """The bytes of leased slots; the reply is a RAW frame, slots in order."""

    KIND: ClassVar[int] = 25
    epoch: int
    store: int
    group: int
    slots: bytes


@dataclass(frozen=True, slots=True)
class Bytes:
    KIND: ClassVar[int] = Read.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Write:
    """A RAW frame: the bytes of one reserved slot."""

    KIND: ClassVar[int] = 26
    epoch: int
    store: int
    group: int
    slot: int


@dataclass(frozen=True, slots=True)
class Written(Done):
    KIND: ClassVar[int] = Write.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Hint:
    """What a client knows of a chain of blocks, keys root first; of every layer group. With the feature "hints".

    `release`: nobody will ask for these again; `prefetch`: somebody will soon. With the feature "marks", `demote`: nobody
    will soon; `pin`: keep them in every tier for `ttl_ms`, or until this process ends. Hints that are not known are ignored.
    """

    KIND: ClassVar[int] = 35
    epoch: int
    store: int
    keys: bytes
    hint: str
    ttl_ms: int = 0


@dataclass(frozen=True, slots=True)
class Hinted(Done):
    """`flags` is empty: what came of it is nobody's business."""

    KIND: ClassVar[int] = Hint.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Used:
    """A request came to this client: keys of the whole blocks that it asked for, root first, and the tokens found by tier, the
    client's own memory being `device`. Once per request, for the daemon's counters and advice. With the feature "usage".
    """

    KIND: ClassVar[int] = 40
    epoch: int
    store: int
    keys: bytes
    tokens: int
    device_tokens: int = 0
    host_tokens: int = 0
    nvme_tokens: int = 0
    is_turn: bool = False  # of a conversation that goes on


@dataclass(frozen=True, slots=True)
class Noted(Done):
    KIND: ClassVar[int] = Used.KIND | REPLY
