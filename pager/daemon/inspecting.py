"""What pagerd tells inspectors: the views of its models' pagers, by model, and what it publishes for those who only read.

Answers run on a thread, never on the loop that serves clients, and only for the daemon's own user: they name the sessions of
every tenant. Nothing here changes anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgpack

from ...tiers.errors import ConfigError, KvTierError, ProtocolError
from .. import protocol

if TYPE_CHECKING:
    from ..core import Core
    from ..inspection.service import Snapshots
    from .models import Models


def may_inspect(uid: int) -> bool:
    """Root and the daemon's own user."""
    return uid in (0, os.geteuid())


class DaemonInspector:
    """Of one daemon. `status` is the service's own."""

    def __init__(self, models: Models, status: Callable[[], dict[str, Any]]) -> None:
        self._models, self._status = models, status
        self._snapshots: Snapshots | None = None

    def reply(self, request_id: int, packed: bytes) -> bytes:
        """The frame that answers a question; what it cannot mean is an error that says so."""
        try:
            return protocol.encode(protocol.INSPECT_REPLY, request_id, self.answer(_unpacked(packed)))
        except KvTierError as error:
            return protocol.encode(protocol.ERROR_REPLY, request_id, {"code": error.code, "message": str(error)})

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Of the model that `model` numbers, else of the one opened last. Raises: ConfigError."""
        from ..inspection.inspector import SCHEMA, Inspector

        cores = self._models.cores()
        wanted = body.pop("model", 0)
        if not cores and body.get("verb") == "status":
            return {"schema": SCHEMA, "verb": "status"} | self._status()
        number, core = _chosen(cores, wanted)
        told = Inspector(core).answer(body) | {"model": number, "models": sorted(cores)}
        if body.get("verb") == "status":
            told["daemon"] = self._status()["daemon"]
        return told

    def published(self) -> dict[str, Any] | None:
        """What the snapshot page holds: the model opened last; None while none is open."""
        from ..inspection.service import Snapshots

        self._snapshots = self._snapshots or Snapshots()
        cores = self._models.cores()
        return self._snapshots.take(_chosen(cores, 0)[1]) if cores else None


def _chosen(cores: dict[int, Core], wanted: object) -> tuple[int, Core]:
    if not cores:
        raise ConfigError("no model is open: a client of the daemon opens one")
    if wanted == 0:
        return max(cores), cores[max(cores)]
    if not isinstance(wanted, int) or wanted not in cores:
        raise ConfigError(f"model={wanted!r} is not open; choose {', '.join(map(str, sorted(cores)))}")
    return wanted, cores[wanted]


def _unpacked(packed: bytes) -> dict[str, Any]:
    try:
        body = msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"inspect: the request is not msgpack: {error}") from error
    if not isinstance(body, Mapping):
        raise ProtocolError("inspect: the request is not a table of verb and arguments")
    return dict(body)
