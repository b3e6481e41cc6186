"""Load clients as processes, and the check of everything that they were told is durable."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from kvtier.tiers.cpu import CpuBackend

from .. import warm
from ..pager.harness import BLOCK, Rig
from .load import PAGES, STAGING, prompt_of
from .running import Pagerd, wait_for

PROGRAM = Path(__file__).with_name("load.py")
KEPT = "/kept"


class LoadClient:
    """One load.py; `lines` as they come. `kind`: the options beside when it dies."""

    def __init__(self, daemon: Pagerd, seed: int, *options: str) -> None:
        self.lines: list[str] = []
        self.kind = tuple(option for option in options if not option.startswith("dies="))
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115, nobody would read a pipe meanwhile
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self.process = warm.light.start(PROGRAM, daemon.address, seed, *options, **pipes, stderr=self._stderr)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # the last one of a killed client may be cut short
                self.lines.append(line.rstrip("\n"))

    def wait_ready(self) -> None:
        wait_for(lambda: "ready" in self.lines or self.process.poll() is not None, 120.0)
        assert self.process.poll() is None, self.errors()

    def wait_killed(self, timeout_s: float = 120.0) -> None:
        """By its own hand, in the middle of a copy. Fails with where its threads are when it does not get there."""
        try:
            ended = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            ended = self.process.wait(60)
        assert ended == -signal.SIGKILL, (self.lines[-5:], self.errors())
        self._reader.join(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)

    def end(self) -> None:
        """Let it finish what it does. Fails when it ended badly."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(180) == 0, self.errors()
        self._reader.join(60)

    def errors(self) -> str:
        """Once it has ended: where it writes is where we read."""
        self._stderr.seek(0)
        return self._stderr.read()

    @property
    def done(self) -> dict[str, Any]:
        """How much it did, once it has ended."""
        found: dict[str, Any] = json.loads(self.lines[-1].removeprefix("end "))
        return found

    @property
    def wrong(self) -> list[str]:
        return [line for line in self.lines if line.startswith("wrong")]

    @property
    def acknowledged(self) -> dict[str, int]:
        """Tokens of each session when it was last said to be durable; and of each prefix, by its session's name and KEPT."""
        found: dict[str, int] = {}
        for what, name, *tokens in (line.split() for line in self.lines if line.startswith(("ack", "kept", "gone"))):
            found[name if what == "ack" else name + KEPT] = int(tokens[0]) if tokens else 0
        return found


def check_prefix(rig: Rig, tokens: list[int]) -> None:
    whole = len(tokens) // BLOCK * BLOCK
    assert rig.pager.match(tokens).tokens >= whole, f"{rig.pager.match(tokens).tokens} of {whole} tokens are left"
    seq = rig.start([*tokens, 1])
    rig.prefill(seq)
    rig.pager.finish(seq)


def check_acknowledged(daemon: Pagerd, acknowledged: dict[str, int]) -> int:
    """Every session and prefix that was acknowledged is there whole, and every value of it is right. Returns how many."""
    rig = Rig(daemon=daemon.address, backend=CpuBackend(poison=True), pages=PAGES, staging=STAGING)
    try:
        for name, num_tokens in acknowledged.items():
            if name.endswith(KEPT):
                check_prefix(rig, prompt_of(name.removesuffix(KEPT), num_tokens))
                continue
            seq, parked = rig.pager.resume(name)
            assert parked.num_computed >= num_tokens, f"{name}: {parked.num_computed} of {num_tokens} tokens"
            assert rig.pager.num_computed(seq) >= num_tokens, f"{name}: {rig.pager.num_computed(seq)} of {num_tokens}"
            assert parked.token_ids[:num_tokens] == prompt_of(name, num_tokens)
            before = rig.pager.counters.get("computed_tokens")
            rig.say(seq, [1, 2, 3])
            assert rig.pager.counters.get("computed_tokens") == before + 3, f"{name}: blocks were lost"
            rig.pager.release(seq)
        assert not rig.wrong, rig.wrong[:3]
    finally:
        rig.close()
    return len(acknowledged)
