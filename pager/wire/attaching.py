"""Messages of coming and going: who a client is, which model it opens, and what ends a request or all of them.

Dataclasses only; messages.py checks them, docs/protocol.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .blocks import Done
from .limits import ERROR, REPLY


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
class Cancel:
    """The answer to that request is not wanted any more; no reply of its own."""

    KIND: ClassVar[int] = 33
    request: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """No copy of ours runs any more: everything that this client holds may be let go now."""

    KIND: ClassVar[int] = 32
    epoch: int


@dataclass(frozen=True, slots=True)
class Bye(Done):
    KIND: ClassVar[int] = Goodbye.KIND | REPLY


@dataclass(frozen=True, slots=True)
class Failure:
    """The reply to a request that failed; `code` is that of tiers/errors.py."""

    KIND: ClassVar[int] = ERROR
    code: str
    message: str
    retry_ms: int = 0
