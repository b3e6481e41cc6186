"""`kvtier bench sessions`: many long chats on a device tier that holds a few of them, asked over several turns and restarts.

The needle model answers exactly or not at all, so every answer is checked. The server's own parts run in this process
(EngineLoop, Conversations); a restart closes everything and opens it again from the store. Contiguous caches sized to the
maximum length, in the same memory, are the reference for how many chats fit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ...tiers.errors import ConfigError
from .harness import Row


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
    if not Path(arguments.path).is_dir():
        raise ConfigError(f"--path {arguments.path!r} is not a directory")
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        from .crowd import Crowd

        return Crowd(arguments, Path(folder) / "store").rows()
