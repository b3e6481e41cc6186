"""Status: the pager's state as plain values, and the small server that hands it to inspectors.

Everything is a counter or a level, never a ratio; readers divide. No token ids, no whole keys, nothing of a user's text.
The server answers one frame per request on a Unix socket of mode 0600 and changes nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..tiers.errors import KvTierError, ProtocolError
from . import protocol
from .inspection.events import OF_MOVE
from .states import PageState, SlotState

if TYPE_CHECKING:
    from .core import Core
    from .group import BlockGroup

_LOG = logging.getLogger("kvtier.status")
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


def pager_status(core: Core) -> dict[str, Any]:
    """Tiers, transfers, sessions and counters. Sizes in bytes."""
    tiers = {"device": _device(core), "host": _host(core)}
    if core.nvme is not None:
        tiers[core.nvme.name] = _nvme(core) if core.nvme.is_ring else _daemon(core)
    for name, tier in tiers.items():
        label = name if name in ("device", "host") else "nvme"
        tier |= {
            "hit_tokens": int(core.counters.get("hit_tokens", tier=label)),
            "evicted_blocks": int(core.counters.get("evicted_blocks", tier=label)),
            "bytes_in": _moved(core, f"_to_{label}"),
            "bytes_out": _moved(core, f"{label}_to_", prefix=True),
        }
    return {
        "version": protocol.VERSION,
        "source": "pager",
        "pid": os.getpid(),
        "backend": core.backend.name,
        "pinned_memory": core.backend.pinned,
        "block_size": core.block_size,
        "layer_groups": [layout.to_dict() for layout in core.layouts],
        "tiers": tiers,
        "lookups": core.observer.num_lookups,
        "miss_tokens": int(core.counters.get("miss_tokens")),
        "ghost_tokens": int(core.counters.get("ghost_tokens")),
        "transfers_in_flight": sum(len(group.moves) for group in core.groups),
        "queues": _queues(core),
        "sequences": len(core.sequences),
        "sessions": len(core.sessions),
        "policy": core.config.policy,
        "namespaces": core.quotas.to_dict(),
        "counters": core.counters.to_list(),
    }


def _queues(core: Core) -> dict[str, dict[str, float]]:
    """Moves that are under way, by direction: how many, of how many blocks, and how long the oldest has been."""
    now_s, queues = core.clock(), {way: {"moves": 0, "blocks": 0, "oldest_s": 0.0} for way in OF_MOVE}
    for move in (move for group in core.groups for move in group.moves):
        queue = queues[move.kind]
        queue["moves"] += 1
        queue["blocks"] += len(move.blocks)
        queue["oldest_s"] = max(queue["oldest_s"], now_s - move.started_s)
    return queues


def _device(core: Core) -> dict[str, Any]:
    total: dict[str, Any] = dict.fromkeys(_LEVELS, 0)
    for group, ring in zip(core.groups, core.rings, strict=True):
        size, pages = group.layout.block_bytes, group.pages
        staging = ring.nbytes if ring is not None else 0
        cache = core.slice_caches[group.index]
        staging += core.summary_rows[group.index].nbytes + (cache.nbytes if cache is not None else 0)
        used = len(pages) - pages.num_free
        total["capacity_bytes"] += len(pages) * size + staging
        total["staging_bytes"] += staging
        total["used_bytes"] += used * size
        total["peak_bytes"] += pages.peak_used * size + staging
        total["pinned_bytes"] += _count(pages.pins) * size
        total["dirty_bytes"] += _count(pages.state == PageState.DIRTY) * size
        total["in_flight_bytes"] += _count(pages.copies) * size
        total["blocks"] += used
    total["formats"] = [group.layout.format_text for group in core.groups]
    return total


def _host(core: Core) -> dict[str, Any]:
    total: dict[str, Any] = dict.fromkeys(_LEVELS, 0)
    for group, ring in zip(core.groups, core.rings, strict=True):
        size, host = group.forms.slot_bytes, group.host
        staging = ring.bounce_nbytes if ring is not None else 0
        used = len(host) - host.num_free
        total["capacity_bytes"] += len(host) * size + staging
        total["staging_bytes"] += staging
        total["used_bytes"] += used * size
        total["peak_bytes"] += host.peak_used * size + staging
        total["pinned_bytes"] += _count(host.holds) * size
        total["dirty_bytes"] += _host_only(group) * size
        total["in_flight_bytes"] += _count(host.state == SlotState.STAGING) * size
        total["blocks"] += used - _count(host.state == SlotState.LINKED)
    total["memory"] = core.memory.status()
    total["formats"] = [group.forms.text for group in core.groups]
    return total


def _count(values: npt.NDArray[Any]) -> int:
    """How many are not zero. A sum of booleans takes twenty times as long."""
    return int(np.count_nonzero(values))


def _host_only(group: BlockGroup) -> int:
    """Blocks that the tier below should have and has not."""
    if group.cold is None:
        return 0
    blocks = group.host.block[group.host.state == SlotState.VALID]
    return len(blocks) - _count(group.directory.nvme_valid[blocks])


def _nvme(core: Core) -> dict[str, Any]:
    total: dict[str, Any] = dict.fromkeys(_LEVELS, 0)
    assert core.nvme is not None
    for group in core.groups:
        size, d = group.tier_bytes("nvme"), group.directory
        slots, valid = core.nvme.num_slots(group.index), _count(d.nvme_valid)
        total["capacity_bytes"] += slots * size
        total["used_bytes"] += valid * size
        total["pinned_bytes"] += _count(d.nvme_valid & (d.refs > 0)) * size
        total["in_flight_bytes"] += _count(d.nvme_holds) * size
        total["blocks"] += valid
    total["corrupt_blocks"] = int(core.counters.get("corrupt_blocks", tier="nvme"))
    below = core.nvme.status()
    total |= {name: below[name] for name in _COLD_ONLY}
    total["formats"] = [
        g.layout.format_text if g.cold is None or g.cold.fmt is None else g.cold.fmt.text for g in core.groups
    ]
    total["codecs"], total["stored_bytes"] = below["codecs"], sum(below["stored_bytes"])
    total["namespaces"] = core.quotas.to_dict()
    total["takes_writes"] = all(group.can_write_nvme for group in core.groups)
    total["path"] = str(core.config.nvme_path)
    return total


def _daemon(core: Core) -> dict[str, Any]:
    """What this client knows of the daemon's blocks; what the daemon holds altogether is its own status to say."""
    total = dict.fromkeys(_LEVELS, 0)
    assert core.nvme is not None
    for group in core.groups:
        size, d = group.layout.block_bytes, group.directory
        valid = _count(d.nvme_valid)
        total["capacity_bytes"] += core.nvme.num_slots(group.index) * size
        total["used_bytes"] += valid * size
        total["pinned_bytes"] += _count(d.nvme_valid & (d.refs > 0)) * size
        total["in_flight_bytes"] += _count(d.nvme_holds) * size
        total["blocks"] += valid
    missed = int(core.counters.get("missed_blocks", tier="nvme"))
    return total | core.nvme.status() | {"missed_blocks": missed, "takes_writes": core.nvme.takes_writes}


_LEVELS = (
    "capacity_bytes",
    "staging_bytes",
    "used_bytes",
    "peak_bytes",
    "pinned_bytes",
    "dirty_bytes",
    "in_flight_bytes",
    "blocks",
)


def _moved(core: Core, part: str, *, prefix: bool = False) -> int:
    moved = (row for row in core.counters.to_list() if row["name"] == "moved_bytes")
    match = str.startswith if prefix else str.endswith
    return int(sum(row["value"] for row in moved if match(row["labels"]["direction"], part)))


_COLD_ONLY = (
    "clean_segments",
    "segments",
    "write_amplification",
    "direct_io",
    "failed_syncs",
    "failed_index_writes",
    "last_write_error",
)


class StatusServer:
    """Answers status requests, and an inspector's questions where `inspect` is given, from a thread of its own."""

    def __init__(
        self,
        path: Path,
        listener: socket.socket,
        status: Callable[[], dict[str, Any]],
        inspect: Callable[[Any], dict[str, Any]] | None,
    ) -> None:
        self._path, self._listener, self._status, self._inspect = path, listener, status, inspect
        self._thread = threading.Thread(target=self._serve, name="kvtier-status", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        path: str,
        status: Callable[[], dict[str, Any]],
        inspect: Callable[[Any], dict[str, Any]] | None = None,
    ) -> StatusServer | None:
        """None, with a notice, where the socket cannot be made: being looked at is not worth failing for."""
        target = Path(path)
        if len(str(target).encode()) > _MAX_SOCKET_PATH:
            _LOG.warning("event=no_status_socket reason=path_too_long limit_bytes=%d", _MAX_SOCKET_PATH)
            return None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            target.unlink(missing_ok=True)
            listener.bind(str(target))
            target.chmod(0o600)
            listener.listen(8)
        except OSError as error:
            listener.close()
            _LOG.warning("event=no_status_socket reason=%s", error.strerror)
            return None
        return cls(target, listener, status, inspect)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        self._thread.join(2.0)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with connection:
                connection.settimeout(2.0)
                try:
                    connection.sendall(self._reply(*protocol.read_frame(connection)))
                except (OSError, EOFError, ProtocolError) as error:
                    _LOG.info("event=status_request_failed reason=%s", error)

    def _reply(self, kind: int, request_id: int, body: Any) -> bytes:
        """The frame that answers one request; what it cannot mean is an error that says so."""
        if kind == protocol.STATUS_REQUEST:
            return protocol.encode(protocol.STATUS_REPLY, request_id, self._status())
        if kind == protocol.INSPECT_REQUEST and self._inspect is not None:
            try:
                return protocol.encode(protocol.INSPECT_REPLY, request_id, self._inspect(body))
            except KvTierError as error:
                return _refusal(request_id, error)
        return _refusal(
            request_id, ProtocolError(f"frame type {kind} is no question; this socket only answers questions")
        )


def _refusal(request_id: int, error: KvTierError) -> bytes:
    return protocol.encode(protocol.ERROR_REPLY, request_id, {"code": error.code, "message": str(error)})
