"""Messages: every request and reply as a frozen dataclass with a number, checked field by field when it arrives.

docs/protocol.md says the same for people. A field without a default must be there; unknown fields are ignored, so that
a later version may add some; a field of another type is a ProtocolError that names it. No I/O, no state.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import ClassVar, TypeVar, get_type_hints

from ...tiers.errors import ProtocolError
from .frames import Fields

VERSION = 2  # spoken by this side; see docs/protocol.md for what each version brought
OLDEST_VERSION = 1
SLAB, BYTES = "slab", "bytes"  # features: blocks through shared memory; blocks over the socket
FEATURES = (SLAB, BYTES)
KEY_BYTES = 32
MAX_KEYS = 1 << 16  # in one request
MAX_READ_BYTES = 1 << 20  # of blocks in one reply to READ, or one block
REPLY = 0x80  # a reply has its request's number and this bit
ERROR = 0xFF
STORED, IS_HELD = 3, 4  # masks of the bytes in replies: result or place; held for this client
ABSENT, IN_MEMORY, ON_DISK = 0, 1, 2  # places, in Found
REFUSED, TAKEN, HELD_ALREADY = 0, 1, 2  # results, in Committed
NOT_THERE, HOLDS, OVER_LIMIT = 0, 1, 2  # flags, in Held
_LARGEST = 1 << 63


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message. `previous_*`: the attachment that this client had; none of its copies runs any more."""

    KIND: ClassVar[int] = 16
    min_version: int
    max_version: int
    features: list[object]
    client: str = ""
    token: str = ""
    previous_boot: bytes = b""
    previous_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Welcome:
    """`namespaces`: secrets of those that this client owns; with `owns_all` any other name too, without a secret."""

    KIND: ClassVar[int] = Hello.KIND | REPLY
    version: int
    features: list[object]
    boot: bytes
    epoch: int
    namespaces: dict[object, object]
    owns_all: bool
    max_requests: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Open:
    """A model's blocks: made where they are new. `want_slab` asks for the memory itself (descriptors come along)."""

    KIND: ClassVar[int] = 17
    layouts: list[object]
    model_fingerprint: str
    about: dict[object, object] = field(default_factory=dict)
    want_slab: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """One number per layer group: slots there are, slots that one client may lease, blocks that all tiers hold.

    Descriptors where `has_slab`: the slots of each layer group, then their generations (u64 each, groups in order).
    """

    KIND: ClassVar[int] = Open.KIND | REPLY
    store: int
    num_slots: list[object]
    lease_limits: list[object]
    capacity_blocks: list[object]
    is_durable: bool
    has_slab: bool


@dataclass(frozen=True, slots=True)
class Lookup:
    """Which of these keys are held. `prefix`: stop behind the first one that a full layer group lacks."""

    KIND: ClassVar[int] = 18
    store: int
    keys: bytes
    prefix: bool = True
    hold: bool = False  # since version 2: what is found is held, as by HOLD


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
class Done:
    """`flags` one byte per item where the request had items."""

    KIND: ClassVar[int] = Release.KIND | REPLY
    flags: bytes = b""


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
class Flush:
    """Make durable what this client has committed so far."""

    KIND: ClassVar[int] = 27
    epoch: int
    store: int
    timeout_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Flushed(Done):
    KIND: ClassVar[int] = Flush.KIND | REPLY


@dataclass(frozen=True, slots=True)
class PutSession:
    """Remember a session whose blocks are committed; answered once the record and they are durable. It is this client's."""

    KIND: ClassVar[int] = 28
    epoch: int
    store: int
    session_id: str
    record: dict[object, object]
    timeout_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class SessionPut(Done):
    KIND: ClassVar[int] = PutSession.KIND | REPLY


@dataclass(frozen=True, slots=True)
class GetSession:
    """The record of a session; `take` makes it this client's until it is given back or dropped, or the client ends."""

    KIND: ClassVar[int] = 29
    epoch: int
    store: int
    session_id: str
    take: bool = False


@dataclass(frozen=True, slots=True)
class Session:
    KIND: ClassVar[int] = GetSession.KIND | REPLY
    record: dict[object, object]


@dataclass(frozen=True, slots=True)
class DropSession:
    """Forget a session, or with `keep` only stop being the one who has it."""

    KIND: ClassVar[int] = 30
    epoch: int
    store: int
    session_id: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class SessionDropped(Done):
    KIND: ClassVar[int] = DropSession.KIND | REPLY


@dataclass(frozen=True, slots=True)
class ListSessions:
    """Sessions of this client's namespaces, in order of their ids, those behind `after`."""

    KIND: ClassVar[int] = 31
    store: int
    after: str = ""


@dataclass(frozen=True, slots=True)
class Sessions:
    """`sessions`: lists of id, namespace, tokens, computed tokens, is taken, is durable. Ask again while `more`."""

    KIND: ClassVar[int] = ListSessions.KIND | REPLY
    sessions: list[object]
    more: bool


@dataclass(frozen=True, slots=True)
class Goodbye:
    """No copy of ours runs any more: everything that this client holds may be let go now."""

    KIND: ClassVar[int] = 32
    epoch: int


@dataclass(frozen=True, slots=True)
class Bye(Done):
    KIND: ClassVar[int] = Goodbye.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Cancel:
    """The answer to that request is not wanted any more; no reply of its own."""

    KIND: ClassVar[int] = 33
    request: int


@dataclass(frozen=True, slots=True)
class FindModel:
    """How the blocks of a model are cut that this daemon knows already, so that clients cut them alike. Since version 2."""

    KIND: ClassVar[int] = 34
    model_fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelFound:
    """`block_size` is 0 where it knows none."""

    KIND: ClassVar[int] = FindModel.KIND | REPLY
    block_size: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The reply to a request that failed; `code` is that of tiers/errors.py."""

    KIND: ClassVar[int] = ERROR
    code: str
    message: str
    retry_ms: int = 0


REQUESTS = (
    Hello,
    Open,
    Lookup,
    Reserve,
    Commit,
    Lease,
    Release,
    Hold,
    Unhold,
    Read,
    Write,
    Flush,
    PutSession,
    GetSession,
    DropSession,
    ListSessions,
    Goodbye,
    Cancel,
    FindModel,
)
REQUEST_BY_KIND = {message.KIND: message for message in REQUESTS}
M = TypeVar("M")


def to_fields(message: object) -> Fields:
    return {name: getattr(message, name) for name in _kinds(type(message))}


def from_fields(kind: type[M], found: Fields) -> M:
    """Raises ProtocolError naming the field that is missing or of another type."""
    values: dict[str, object] = {}
    required = _required(kind)
    for name, wanted in _kinds(kind).items():
        if name not in found:
            if name in required:
                raise ProtocolError(f"{kind.__name__}: field {name!r} is missing")
            continue
        value = found[name]
        if type(value) is not wanted:
            raise ProtocolError(f"{kind.__name__}.{name} is a {type(value).__name__}, not a {wanted.__name__}")
        if type(value) is int and not 0 <= value < _LARGEST:
            raise ProtocolError(f"{kind.__name__}.{name}={value}: must be from 0 to 2^63 - 1")
        values[name] = value
    return kind(**values)


def _kinds(kind: type) -> dict[str, type]:
    """Type of every field, by name."""
    found = _KINDS.get(kind)
    if found is None:
        hints = get_type_hints(kind)
        found = _KINDS[kind] = {name: getattr(hints[name], "__origin__", hints[name]) for name in _fields(kind)}
    return found


def _required(kind: type) -> set[str]:
    return {name for name, f in _fields(kind).items() if f.default is MISSING and f.default_factory is MISSING}


def _fields(kind: type) -> dict[str, Field[object]]:
    found: dict[str, Field[object]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    return found


_KINDS: dict[type, dict[str, type]] = {}
