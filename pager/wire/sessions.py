"""Messages about what lasts: making blocks durable, and sessions.

Dataclasses only; messages.py checks them, docs/protocol.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .blocks import Done
from .limits import REPLY


@dataclass(frozen=True, slots=True)
class Flush:
    """Make durable what this client has committed so far; since version 2 also `keys` of a group, whoever committed them."""

    KIND: ClassVar[int] = 27
    epoch: int
    store: int
    timeout_ms: int = 60_000
    group: int = 0
    keys: bytes = b""


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
    released: bool = False  # with the feature "hints": nobody will ask for its blocks again


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
