"""A pagerd in a process of its own for benchmarks: started, waited for until it says that it serves, and ended.

It says so as it would to a service manager (READY=1), so nothing polls while its start is measured.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...tiers.errors import TierUnavailableError

START_S, END_S = 60.0, 60.0


class DaemonProcess:
    """A context. `ready_s`: seconds from its start until it served."""

    def __init__(self, where: Path, options: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Raises TierUnavailableError when it does not come up."""
        self.address = f"unix://{where}"
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(f"{where}.notify")
        self._manager.settimeout(0.2)
        command = [sys.executable, "-m", "kvtier.tools.pagerd", "--socket", str(where), *options]
        settings = {**(os.environ if env is None else env), "NOTIFY_SOCKET": f"{where}.notify"}
        self.started_s = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=settings)
        try:
            self._wait_ready(" ".join(command[2:]))
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.perf_counter() - self.started_s

    def _wait_ready(self, command: str) -> None:
        until_s = self.started_s + START_S
        while self.process.poll() is None and time.perf_counter() < until_s:
            try:
                if b"READY=1" in self._manager.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                continue
        raise TierUnavailableError(f"pagerd did not start: {command}")

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._manager.close()
