"""`kvtier bench sessions`: many long chats on a device tier that holds a few of them, asked over several turns and restarts.

The needle model answers exactly or not at all, so every answer is checked. Each turn is a process of its own with the
server's own parts (EngineLoop, Conversations; no HTTP), which finds its sessions in the store that the one before left.
Contiguous caches sized to the maximum length, in the same memory, are the reference for how many chats fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...tiers.errors import ConfigError
from .harness import Row, check_folder

BLOCK_SIZE, VALUES = 256, 4
DEVICE_PARTS, HOST_PARTS = 1, 2  # of the K/V of the sessions that shall be resident


@dataclass(frozen=True)
class Work:
    """What a life of the server is for."""

    path: str  # of the store
    sessions: int
    context: int  # tokens of each
    resident: int  # sessions that the device tier holds
    needles: int  # of each session, all asked for
    room: int  # tokens of the longest session at the end of the last life
    is_first: bool  # sessions are begun


@dataclass
class Result:
    """What came of it: needles asked for and answered right, tokens computed and new ones, share of slots without a token."""

    asked: int = 0
    exact: int = 0
    computed: int = 0
    wanted: int = 0
    waste: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sessions", type=int, default=200, metavar="N")
    parser.add_argument("--context", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--resident", type=int, default=4, metavar="N", help="sessions that the device tier holds")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="each asks every needle, after a restart")
    parser.add_argument("--needles", type=int, default=4, metavar="N", help="of each session")
    parser.add_argument("--path", default=".", metavar="DIR", help="where the store is made for the run")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for numbers that make no run, and for a directory that is none."""
    for name in ("sessions", "resident", "turns", "needles"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: need at least 1")
    check_folder(arguments.path)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        return _rows(arguments, str(Path(folder) / "store"))


def _rows(arguments: argparse.Namespace, store: str) -> list[Row]:
    room = arguments.context + arguments.turns * arguments.needles * (VALUES + 1) + BLOCK_SIZE
    started_s, whole = time.perf_counter(), Result()
    for turn in range(arguments.turns):
        numbers = {name: getattr(arguments, name) for name in ("sessions", "context", "resident", "needles")}
        life = Result(**_live(asdict(Work(path=store, room=room, is_first=turn == 0, **numbers))))
        for name in ("asked", "exact", "computed", "wanted"):
            setattr(whole, name, getattr(whole, name) + getattr(life, name))
        whole.waste = life.waste
    spent_s = time.perf_counter() - started_s
    case = f"{arguments.sessions} sessions of {arguments.context} tokens, {arguments.resident} resident"
    contiguous = max(1, (DEVICE_PARTS + HOST_PARTS) * arguments.resident)  # in as many bytes, one of `room` tokens each
    fit = arguments.sessions / contiguous
    return [
        Row(case, "needles exact", whole.exact, "", "asked", whole.asked, whole.exact / whole.asked, 1),
        Row(case, "tokens computed", whole.computed, "", "new tokens", whole.wanted, whole.wanted / whole.computed, 1),
        Row(
            case,
            "sessions served from device and host memory, on disk between turns",
            arguments.sessions,
            "",
            f"contiguous caches of {room} tokens in as much",
            contiguous,
            fit,
            1,
        ),
        Row(case, "token slots unused", 100 * whole.waste, "%", "aim: at most", 4.0, None, 1),
        Row(case, "restarts, each in a new process", arguments.turns - 1, "", "nothing to compare with", None, None, 1),
        Row(case, "whole run", spent_s, "s", "nothing to compare with", None, None, 1),
    ]


def _live(work: dict[str, Any]) -> dict[str, Any]:
    """Run one life of the server. Raises ConfigError when it fails."""
    command = [sys.executable, "-m", f"{__package__}.crowd"]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"--context {work['context']}, --needles {work['needles']}: {done.stderr.strip()[-300:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
