"""`kvtier bench kernels --aot`: what the compiler makes of every Triton kernel, without a GPU.

Registers, shared memory and spilled words per kernel and architecture, read from the machine code. The limit is a
kernel's 255 registers, and no spills at all; a kernel that fails to compile is an error and not a row. The compiler runs
in a process of its own, since Triton decides at import whether it interprets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from ...tiers.errors import ConfigError
from .harness import Row

MOST_REGISTERS = 255
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # what one thread block may have, by compute capability


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--aot", action="store_true", help="compile ahead of time and report (the only mode so far)")
    parser.add_argument("--archs", default="90,80", metavar="N,N", help="compute capabilities (default 90,80)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose name matches")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows per kernel. Raises ConfigError without --aot, without triton, or where a kernel does not compile."""
    if not arguments.aot:
        raise ConfigError("kernels: say --aot; speed is measured by `kvtier bench attention`")
    archs = [part for part in arguments.archs.split(",") if part]
    if not archs or not all(part.isdecimal() for part in archs):
        raise ConfigError(f"--archs {arguments.archs!r}: need numbers such as 90,80")
    rows = _compile(archs, arguments.only)
    if broken := [row for row in rows if "error" in row]:
        raise ConfigError(f"{len(broken)} kernels do not compile, first {broken[0]['case']}: {broken[0]['error']}")
    return [row for one in rows for row in _rows(one)]


def _compile(archs: list[str], only: str) -> list[dict[str, Any]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kvtier.kernels.aot", "--json", "--only", only]
    for arch in archs:
        command += ["--arch", arch]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    except (ValueError, KeyError):
        raise ConfigError(f"the compiler gave no report: {done.stderr.strip()[-400:] or 'no output'}") from None
    return found


def _rows(one: dict[str, Any]) -> list[Row]:
    """Registers against the most there can be, spills against none, shared memory against what a block may have."""
    case, shared = f"{one['case']} sm_{one['arch']}", one["shared_bytes"]
    found = []
    if shared:
        limit = SHARED_BYTES.get(one["arch"], min(SHARED_BYTES.values()))
        found.append(Row(case, "shared memory", shared, "bytes", "a block's most", limit, limit / shared))
    if one["registers"] is None:
        return [*found, Row(case, "compiled", one["seconds"], "s", "no disassembler in this triton: code not read")]
    used, spills = one["registers"], one["local_accesses"]
    return [
        *found,
        Row(case, "registers", used, "per thread", "the most there are", MOST_REGISTERS, MOST_REGISTERS / used),
        Row(case, "spills", spills, "instructions", "none", 0, 1.0 if spills == 0 else 0.0),
    ]
