"""A daemon in this process that may copy for its clients, a gate in its copy streams that holds copies back as a test likes,
and pagers that order.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from kvtier.tiers.cpu import CpuBackend

from ..pager.harness import Rig
from .inside import InsideDaemon
from .raw import SIZE
from .running import wait_for

TOKENS = list(range(100, 140))


class Gate:
    """Holds a copy stream of the daemon: what is queued from now on waits until it opens."""

    def __init__(self, daemon: InsideDaemon, stream: str) -> None:
        self._event = threading.Event()
        self.stream = getattr(daemon.store.core.backend, stream)
        self.stream.run(self.wait)

    def wait(self) -> None:
        self._event.wait(60)

    def open(self) -> None:
        self._event.set()


def serving(tmp_path: Path, **options) -> InsideDaemon:
    options = {"host_bytes": 64 * SIZE, "allow_ipc": True} | options
    return InsideDaemon(tmp_path, **options)


def stored(daemon: InsideDaemon, tokens: list[int] = TOKENS, layouts=None) -> None:
    """What another engine, which copies by itself, has computed of these tokens."""
    rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32, layouts=layouts)
    rig.prefill(rig.start(tokens))
    wait_for(lambda: all_in_daemon(rig))
    rig.close()


def all_in_daemon(rig: Rig) -> bool:
    rig.pager.poll()
    with rig.pager._core.lock:
        books = [group.directory for group in rig.pager._core.groups]
        return all(d.nvme_valid[d.is_named & d.is_live].all() for d in books)


def ordering_rig(address: str, **options) -> Rig:
    rig = Rig(daemon=address, backend=CpuBackend(poison=True), **({"pages": 32, "transfer": "ipc"} | options))
    assert copies_of(rig)["copies"] == "daemon", copies_of(rig)
    return rig


def copies_of(rig: Rig) -> dict:
    return rig.pager._core.nvme.status()


def break_sockets(daemon: InsideDaemon) -> None:
    """As a network or a bug would: no word, and both processes live on."""
    for connection in list(daemon.service.attachments.by_connection):
        daemon.loop.call_soon_threadsafe(connection.close)


def write_tail_back(rig: Rig, seq: int) -> int:
    """Start a copy-out of the block that the next token goes to; its page."""
    core = rig.pager._core
    group, block_id = core.groups[0], int(core.sequences[seq].tables[0].ids[-1])

    def is_begun() -> bool:
        with core.lock:  # the row that the daemon lends may go to a full block first
            return core.write_back_blocks(group, np.array([block_id]), "test") == 1

    wait_for(is_begun)
    return int(group.directory.page[block_id])
