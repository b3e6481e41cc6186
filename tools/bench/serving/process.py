"""`kvtier serve --needle` as a process of its own, as an operator would start it, for the time of a run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_S, END_S = 120.0, 60.0


@contextmanager
def served(folder: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Yields the URL once it listens; SIGTERM at the end. What it logs goes to a file in `folder`.

    Raises: RuntimeError when it does not start.
    """
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "kvtier.tools.cli", "serve", "--needle", "--port", "0", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    try:
        yield _url(process, log)
        process.send_signal(signal.SIGTERM)
        process.wait(END_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        has_ended = process.poll() is not None
        found = re.search(r"on (http://[^ ,]+),", log.read_text())
        if found:
            return found[1]
        if has_ended:
            break
        time.sleep(0.05)
    lines = log.read_text().splitlines() or ["it said nothing"]
    raise RuntimeError(f"kvtier serve did not start: {lines[-1]}")
