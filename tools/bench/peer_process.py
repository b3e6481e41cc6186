"""Another interpreter that runs one of our peer programs and is asked for one case at a time, a JSON object per line.

A peer has an interpreter of its own because its dependencies differ from ours. The program imports nothing of kvtier,
greets with what it is, and answers until its input ends; an answer with `error` says what failed. Nothing waits for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...tiers.errors import ConfigError

TIMEOUT_S = 300.0


class PeerProcess:
    """Raises ConfigError, which names the option, when the interpreter cannot run the peer, or fails."""

    def __init__(self, option: str, python: str, script: Path, folder: Path, **sizes: int) -> None:
        interpreter = shutil.which(python)
        if interpreter is None:
            raise ConfigError(f"{option} {python!r} is not a program: name the Python that has {option[2:]} installed")
        folder.mkdir()
        self._option, self._python, self._log = option, python, (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [
                *(interpreter, "-I", str(script), str(folder)),
                *(f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ},  # memory in huge pages, as ours is
        )
        try:
            self.greeting = self._read()
        except ConfigError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # it ends when nobody asks any more
            self._process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, **request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: the answer says why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, self._process.kill)
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            self._log.seek(0)
            answer = {"error": (self._log.read().strip().splitlines() or ["it ended without a word"])[-1]}
        if "error" in answer:
            raise ConfigError(f"{self._option} {self._python!r}: {answer['error']}; how to install: README")
        return answer
