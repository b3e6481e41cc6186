"""A real pagerd in a process of its own, for tests. Killed and started again as a test likes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvtier.pager.client.connection import DaemonConnection
from kvtier.pager.protocol import fetch_status

from .. import warm

START_S = 60.0  # of a start and of an answer: a bound on hanging, not an aim
DYING, FAILING = (Path(__file__).with_name(name) for name in ("dying.py", "failing.py"))


class Pagerd:
    """`start` returns once it answers. `starts_cold`: from nothing, as people start it.

    With `slow_copies`, copies that clients order take long enough to be died in. `failing`: a file; while it exists, the
    disk refuses with the error that it names."""

    def __init__(
        self,
        folder: Path,
        *,
        host_bytes: int,
        nvme_bytes: int | None = None,
        options: tuple[str, ...] = (),
        slow_copies: bool = False,
        starts_cold: bool = False,
        failing: Path | None = None,
    ):
        self.folder, self.socket = folder, folder / "pagerd.sock"
        self._slow_copies, self._failing = slow_copies, failing
        self.address = f"unix://{self.socket}"
        self._arguments = ["--socket", str(self.socket), "--host-bytes", str(host_bytes), *options]
        if nvme_bytes is not None:
            self._arguments += ["--nvme-path", str(folder / "nvme"), "--nvme-bytes", str(nvme_bytes)]
        self._starts_cold = starts_cold
        self.process: warm.Process | subprocess.Popen[bytes] | None = None

    def start(self, *, dies_at: int | None = None) -> Pagerd:
        """`dies_at`: it is killed in the middle of that copy; 0: never, and the copies that clients order are slow."""
        if dies_at is None and self._slow_copies:
            dies_at = 0
        program = ["-m", "kvtier.tools.pagerd"] if dies_at is None else [str(DYING), str(dies_at)]
        if self._failing is not None:
            program = [str(FAILING), str(self._failing)]
        with open(self.folder / "pagerd.log", "ab") as log:
            if self._starts_cold:
                self.process = subprocess.Popen([sys.executable, *program, *self._arguments], stdout=log, stderr=log)
            else:
                self.process = warm.light.start(*program, *self._arguments, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                DaemonConnection.open(self.address).close()
                return self
            except Exception:
                ended = self.process.poll()
                if dies_at is not None and ended == -signal.SIGKILL:
                    return self  # in the very first requests
                if ended is not None or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def status(self) -> dict[str, Any]:
        return fetch_status(self.address, START_S)

    @property
    def log(self) -> str:
        return (self.folder / "pagerd.log").read_text()

    def resident_bytes(self) -> int:
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def held_for_clients(self) -> tuple[int, int]:
        """Descriptors of sockets, processes and shared memory; and threads. Files of the store come and go with it."""
        assert self.process is not None
        folder, found = Path(f"/proc/{self.process.pid}"), []
        for link in (folder / "fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(link))
        kinds = ("socket:", "anon_inode:[pidfd]", "/memfd")
        return sum(name.startswith(kinds) for name in found), len(list((folder / "task").iterdir()))

    def __enter__(self) -> Pagerd:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def wait_for(what: Any, timeout_s: float = 60.0) -> Any:
    """Until what() is true; what it was then. Fails when it does not become so."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, "did not come true in time"
        time.sleep(0.01)
    return found
