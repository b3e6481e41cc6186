"""How long a pagerd takes from its start until it serves, and until a store of a million blocks is there again.

Everything is real but the blocks: the journal lists them, and starting reads no block. The interpreter itself, started
with no program, is timed in the same rounds: what is left is ours. Bytecode is compiled before, as an installer does it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ...pager.client.attachment import Attachment
from ...pager.client.connection import Greeting
from ...pager.daemon.models import Budget, Models
from ...pager.daemon.tenants import OwnerOnly
from ...pager.protocol import fetch_status
from ...tiers.errors import TierUnavailableError
from ...tiers.nvme.identity import MANIFEST_FILE
from .daemon_process import START_S, DaemonProcess
from .harness import Row
from .recovery import LAYOUT, list_blocks

MODEL = "bench-start"
MOST_START_S, MOST_RESTART_S = 0.3, 2.0
HOST_BYTES = 64 << 20
STRIDE_BYTES = 3 * 4096  # of a slot on disk: a block of 8 KiB and what describes it


def rows(folder: Path, blocks: int, rounds: int) -> list[Row]:
    """Raises TierUnavailableError when a daemon does not come up."""
    env = _compiled(folder)
    empty, full = folder / "empty", folder / "full"
    nvme_bytes = 2 * blocks * STRIDE_BYTES + (64 << 20)
    _make_store(full, blocks, nvme_bytes)
    cases = {
        "python": lambda: _bare_s(env),
        "start": lambda: _start_s(folder, empty, nvme_bytes, env),
        "restart": lambda: _restart_s(folder, full, nvme_bytes, env, blocks),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(1 + rounds):
        for name, seconds in cases.items():
            times[name].append(seconds())
    python_s, start_s, restart_s = (statistics.median(taken[1:]) for taken in times.values())  # the first one compiles
    ready, there = "pagerd, nothing stored", f"pagerd, {blocks} blocks listed"
    bare = "the interpreter with no program, same rounds"
    return [
        Row(ready, "start_s", start_s, "s", "aim: at most", MOST_START_S, MOST_START_S / start_s, rounds),
        Row(ready, "start_s", start_s, "s", bare, python_s, python_s / start_s, rounds),
        Row(there, "restart_s", restart_s, "s", "aim: at most", MOST_RESTART_S, MOST_RESTART_S / restart_s, rounds),
    ]


def _compiled(folder: Path) -> dict[str, str]:
    """An environment in which bytecode is kept, outside the tree that runs."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return env | {"PYTHONPYCACHEPREFIX": str(folder / "pycache")}


def _make_store(path: Path, blocks: int, nvme_bytes: int) -> None:
    """What a daemon leaves behind that was killed when it had committed so many blocks."""
    models = Models(Budget(HOST_BYTES, path, nvme_bytes, settings={"host_prefault": False}))
    owner = OwnerOnly().find(os.getuid(), "")
    assert owner is not None
    number, _, client = models.attach((LAYOUT,), MODEL, {}, owner)
    models.detach(number, client)
    models.close()
    (manifest,) = path.glob(f"*/{MANIFEST_FILE}")
    list_blocks(manifest, blocks)


def _bare_s(env: dict[str, str]) -> float:
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=env, check=True)
    return time.perf_counter() - began_s


def _start_s(folder: Path, store: Path, nvme_bytes: int, env: dict[str, str]) -> float:
    """Until it says that it serves."""
    with _daemon(folder, store, nvme_bytes, env) as daemon:
        return daemon.ready_s


def _restart_s(folder: Path, store: Path, nvme_bytes: int, env: dict[str, str], blocks: int) -> float:
    """Until a client has opened the model, with all of those blocks in it."""
    with _daemon(folder, store, nvme_bytes, env) as daemon:
        client = Attachment.open(daemon.address, [LAYOUT], MODEL, {}, Greeting("bench"))
        spent_s = time.perf_counter() - daemon.started_s
        found = fetch_status(daemon.address, START_S)["tiers"]["nvme"]["blocks"]
        client.goodbye()
        if found != blocks:
            raise TierUnavailableError(f"{found} blocks came back, {blocks} were listed")
        return spent_s


def _daemon(folder: Path, store: Path, nvme_bytes: int, env: dict[str, str]) -> DaemonProcess:
    options = ["--host-bytes", str(HOST_BYTES), "--nvme-path", str(store), "--nvme-bytes", str(nvme_bytes)]
    return DaemonProcess(folder / f"{time.monotonic_ns()}.sock", options, env)
