"""Messages of copies that the daemon drives (feature "ipc"): where a client's pages are, what to copy, and when it is over.

Dataclasses only; messages.py checks them, docs/protocol.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .limits import REPLY


@dataclass(frozen=True, slots=True)
class Export:
    """This client is about to register pools. Once per connection."""

    KIND: ClassVar[int] = 36
    epoch: int


@dataclass(frozen=True, slots=True)
class Exporting:
    """With two descriptors: a pidfd of the daemon, and a socket that descriptors of pools are sent through, one a message."""

    KIND: ClassVar[int] = Export.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Register:
    """The pool of a layer group: `num_pages` pages and one row behind them to try it with, `page_bytes` each.

    `kind` memfd: its descriptor waits in the socket of EXPORT; cuda: `handle` is an IPC handle and the GPU's PCI bus id.
    """

    KIND: ClassVar[int] = 37
    epoch: int
    store: int
    group: int
    kind: str
    handle: bytes
    num_pages: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class Registered:
    KIND: ClassVar[int] = Register.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy slot i to page i, or with `is_write_back` page i to slot i. Both u32; pages up to and with `num_pages`."""

    KIND: ClassVar[int] = 38
    epoch: int
    store: int
    group: int
    pages: bytes
    slots: bytes
    is_write_back: bool


@dataclass(frozen=True, slots=True)
class Copied:
    """All of it is done; nothing of this order will touch a page or a slot any more."""

    KIND: ClassVar[int] = Copy.KIND | REPLY
    count: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Answered when no copy runs that this process ordered over an earlier connection, which ends with this request."""

    KIND: ClassVar[int] = 39
    previous_epoch: int


@dataclass(frozen=True, slots=True)
class Settled:
    KIND: ClassVar[int] = Settle.KIND | REPLY
