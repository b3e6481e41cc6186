"""Replies as a client reads them: a message of the wanted kind, or the error that the daemon answered with.

Shared by the blocking and the async client. No I/O.
"""

from __future__ import annotations

from typing import TypeVar

from ...tiers import errors
from ...tiers.errors import Busy, KvTierError, ProtocolError
from . import messages
from .frames import Fields

M = TypeVar("M")


def reply_of(kind: type[M], number: int, fields: Fields) -> M:
    """Raises what the daemon answered (see tiers/errors.py), or ProtocolError for a reply to something else."""
    if number == messages.ERROR:
        raise error_of(messages.from_fields(messages.Failure, fields))
    if number != kind.KIND:  # type: ignore[attr-defined]
        raise ProtocolError(f"reply {number} where {kind.__name__} was awaited")
    return messages.from_fields(kind, fields)


def error_of(failure: messages.Failure) -> KvTierError:
    """The error of ours that has this code; unknown ones, of a later version, are plain."""
    kind = _BY_CODE.get(failure.code, KvTierError)
    if issubclass(kind, Busy):
        return kind(failure.message, retry_after_s=failure.retry_ms / 1000)
    return kind(failure.message)


_BY_CODE: dict[str, type[KvTierError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KvTierError)
}
