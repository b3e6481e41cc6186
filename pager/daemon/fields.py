"""Fields of requests as arrays: blobs of keys, slots and words become what the store takes, or a ProtocolError."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...tiers.errors import ConfigError, ProtocolError
from ...tiers.layout import KVLayout
from ..states import IntArray
from ..wire import messages as m

if TYPE_CHECKING:
    from .client import Client
    from .reading import LeaseRequest


def keys_in(blob: bytes) -> list[bytes]:
    count, rest = divmod(len(blob), m.KEY_BYTES)
    if rest or count > m.MAX_KEYS:
        raise ProtocolError(f"keys: {len(blob)} bytes; need a multiple of {m.KEY_BYTES}, at most {m.MAX_KEYS} keys")
    found: list[bytes] = np.frombuffer(blob, f"V{m.KEY_BYTES}").tolist()
    return found


def slots_in(blob: bytes, client: Client, group: int) -> IntArray:
    slots = words_in(blob, "slots")
    if len(slots) and not slots.max() < len(client.holdings[group].reserved):
        raise ProtocolError(f"slot {slots.max()}: layer group {group} has {len(client.holdings[group].reserved)}")
    return slots


def words_in(blob: bytes, name: str) -> IntArray:
    if len(blob) % 4 or len(blob) > 4 * m.MAX_KEYS:
        raise ProtocolError(f"{name}: {len(blob)} bytes; need a multiple of 4, at most {m.MAX_KEYS} items")
    return np.frombuffer(blob, "<u4").astype(np.int64)


def layout_in(fields: object) -> KVLayout:
    if not isinstance(fields, dict):
        raise ConfigError(f"layouts: {type(fields).__name__} is not a layout")
    return KVLayout.from_dict(fields)


def leased(request: LeaseRequest) -> m.Leased:
    return m.Leased(request.slots.astype("<i4").tobytes(), request.generations.tobytes())
