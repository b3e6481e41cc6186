"""Messages: every request and reply as a frozen dataclass with a number, checked field by field when it arrives.

Here is the check, and one name for all of them; they stand in attaching.py, blocks.py, copying.py and sessions.py, their
numbers in limits.py.
docs/protocol.md says the same for people. A field without a default must be there; unknown fields are ignored, so that
a later version may add some; a field of another type is a ProtocolError that names it. No I/O, no state.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TypeVar, get_type_hints

from ...tiers.errors import ProtocolError
from . import attaching, blocks, copying, sessions
from .attaching import *  # noqa: F403
from .blocks import *  # noqa: F403
from .copying import *  # noqa: F403
from .frames import Fields
from .limits import *  # noqa: F403
from .sessions import *  # noqa: F403

_LARGEST = 1 << 63

REQUESTS = (
    attaching.Hello,
    attaching.Open,
    blocks.Lookup,
    blocks.Reserve,
    blocks.Commit,
    blocks.Lease,
    blocks.Release,
    blocks.Hold,
    blocks.Unhold,
    blocks.Read,
    blocks.Write,
    sessions.Flush,
    sessions.PutSession,
    sessions.GetSession,
    sessions.DropSession,
    sessions.ListSessions,
    attaching.Goodbye,
    attaching.Cancel,
    attaching.FindModel,
    blocks.Hint,
    blocks.Used,
    copying.Export,
    copying.Register,
    copying.Copy,
    copying.Settle,
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
    found = _REQUIRED.get(kind)
    if found is None:
        found = _REQUIRED[kind] = {
            name for name, f in _fields(kind).items() if f.default is MISSING and f.default_factory is MISSING
        }
    return found


def _fields(kind: type) -> dict[str, Field[object]]:
    found: dict[str, Field[object]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    return found


_KINDS: dict[type, dict[str, type]] = {}
_REQUIRED: dict[type, set[str]] = {}
