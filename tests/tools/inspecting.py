"""What the inspector's tests share: a real pager in another process, and the program run as people run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.pager.inspection.snapshot import page_path, read_snapshot
from kvtier.pager.protocol import STATUS_SOCKET
from kvtier.tiers.errors import TierUnavailableError

from .. import warm
from ..daemon.running import wait_for

SCRIPT = Path(__file__).with_name("pager_process.py")
PROGRAM = [sys.executable, "-m", "kvtier.tools.inspect", "--timeout", "60"]  # a busy machine is no stuck pager
STOPS = 20  # tries to stop a pager that is not just publishing
BLOCK, BLOCK_BYTES = 16, 2 * 2 * 16 * 8 * 4


@dataclass
class Running:
    """A pager process. `do` runs Python in it and gives back what it called `result`."""

    process: warm.Process
    where: Path

    def do(self, code: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the pager process ended with {self.process.wait(60)}"
        told = json.loads(line)
        assert not (isinstance(told, dict) and "error" in told), told["error"]
        return told

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Nothing in the process runs meanwhile; it is not in the middle of publishing."""
        try:
            for _ in range(STOPS):
                os.kill(self.process.pid, signal.SIGSTOP)
                wait_for(lambda: is_stopped(self.process.pid))
                if is_published(self.where):
                    break
                os.kill(self.process.pid, signal.SIGCONT)
                time.sleep(0.05)
            else:
                raise AssertionError("stopped in the middle of publishing, again and again")
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


@contextmanager
def running(where: Path, **config: Any) -> Iterator[Running]:
    """A pager over a store at `where`, or (store=False) only with a socket in it."""
    settings = {"device_bytes": "128KiB", "host_bytes": "128KiB", "host_prefault": False} | config
    if settings.pop("store", True):
        settings |= {"nvme_path": str(where / "s"), "nvme_bytes": settings.get("nvme_bytes", "4MiB")}
    else:
        settings["status_socket"] = str(where / "s.sock")
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    process = warm.light.start(SCRIPT, json.dumps(settings), cwd="/", **pipes)
    found = Running(process, Path(settings.get("nvme_path") or settings["status_socket"]))
    try:
        assert found._answer() == "ready"
        wait_for(lambda: is_published(found.where))
        yield found
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def is_stopped(pid: int) -> bool:
    """Whether all its threads are."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return False  # one ended meanwhile
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def is_published(where: Path) -> bool:
    """Whether there is a snapshot to look at."""
    try:
        read_snapshot(page_path(where if where.is_socket() else where / STATUS_SOCKET))
    except TierUnavailableError:
        return False
    return True


def inspect(*words: object, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`pager-inspect` in a process of its own."""
    command = [*(PROGRAM[1:-2] if "--timeout" in words else PROGRAM[1:]), *words]
    environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "KVTIER_SOCKET", "RUNTIME_DIRECTORY")}
    return warm.light.run(*command, cwd="/", env=environ | (env or {}), input=stdin, timeout=240)


def asked(pager: Running | Path, *words: object) -> dict[str, Any]:
    """The JSON that a verb prints, whatever its findings."""
    where = pager.where if isinstance(pager, Running) else pager
    done = inspect("-s", where, "--json", *words)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return dict(json.loads(done.stdout))


def broken_rules(told: dict[str, Any]) -> list[str]:
    """Rules of a check that do not hold. How long it waited for the pager (P1) is the machine's and left out."""
    return [row["rule"] for row in told["checks"] if row["verdict"] != "ok" and row["rule"] != "P1"]
