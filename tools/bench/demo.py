"""`kvtier bench demo`: the first token of the demo's chat after the restart, from a cold disk, against its prefill and,
with `--before`, against another checkout of kvtier (an older one, say) in rounds in turn.

Each round is a process of its own, as `kvtier demo` is. What the rounds of `--before` read is made cold by emptying the
kernel's page cache over and over while they and ours run, which needs root: an older version reads through it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...tiers.errors import ConfigError
from .harness import Row

_DROP = Path("/proc/sys/vm/drop_caches")
_EVERY_S = 0.1
TIMEOUT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=131072, metavar="N", help="tokens (default 131072)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of --before and ours in turn")
    parser.add_argument(
        "--before", metavar="DIR", help="another checkout, run with this interpreter's packages; needs root"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in seconds. Raises ConfigError when a demo fails, or gives a wrong answer."""
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds {arguments.rounds}: need a positive number")
    if arguments.before is not None and not (Path(arguments.before) / "kvtier").is_dir():
        raise ConfigError(f"--before {arguments.before!r} is no checkout of kvtier")
    here = Path(__file__).resolve().parents[2]
    for checkout in (here, *([Path(arguments.before)] if arguments.before is not None else [])):
        _check_is_imported(checkout)
    case = f"{arguments.context} tokens"
    whole = _demo(here, arguments.context)
    if whole["needles_exact_after_restart"] != whole["needles_asked"] or whole["recomputed_tokens_after_restart"]:
        raise ConfigError(f"kvtier demo: {whole} holds wrong answers or tokens that were computed again")
    found = [
        Row(
            case,
            "answers right before and after",
            float(whole["needles_exact"]),
            "",
            "asked",
            float(whole["needles_asked"]),
        ),
        Row.of_times(
            case, "first token after the restart", "s", whole["resume_ttft_s"], "prefill", whole["prefill_s"], 1.0, 1
        ),
    ]
    if arguments.before is not None:
        found.append(_before_row(case, here, Path(arguments.before), arguments))
    return found


def _before_row(case: str, here: Path, other: Path, arguments: argparse.Namespace) -> Row:
    seconds: dict[Path, list[float]] = {other: [], here: []}
    with _cold():
        for _ in range(arguments.rounds):
            for checkout, spent in seconds.items():
                spent.append(_demo(checkout, arguments.context, "--fast-fill", "--needles", "2")["resume_ttft_s"])
    ours, theirs = statistics.median(seconds[here]), statistics.median(seconds[other])
    return Row.of_times(
        case, "the same, page cache empty", "s", ours, f"checkout {_head(other)}", theirs, 1.0, arguments.rounds
    )


def _demo(checkout: Path, context: int, *more: str) -> dict[str, Any]:
    """What `kvtier demo --json` of a checkout prints last. Raises ConfigError."""
    result: dict[str, Any] = json.loads(
        _python_of(checkout, "-m", "kvtier.tools.cli", "demo", "--context", str(context), "--json", *more)
    )
    return result


def _python_of(checkout: Path, *arguments: str) -> str:
    """The last line that this interpreter prints with the checkout's kvtier. Raises ConfigError."""
    # without the second the directory that we are in would be first
    env = os.environ | {"PYTHONPATH": str(checkout.resolve()), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise ConfigError(f"kvtier of {checkout.name} failed: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]


def _check_is_imported(checkout: Path) -> None:
    """Raises ConfigError when another kvtier would run in its place."""
    file = _python_of(checkout, "-c", "import kvtier; print(kvtier.__file__)")
    if checkout.resolve() not in Path(file).parents:
        raise ConfigError(f"--before {str(checkout)!r}: this interpreter imports {file} in its place")


def _head(checkout: Path) -> str:
    """Its commit, if git knows it."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or checkout.name
    return checkout.name


@contextlib.contextmanager
def _cold() -> Iterator[None]:
    """The kernel's page cache is emptied every tenth of a second. Raises ConfigError where that is not allowed."""
    is_over = threading.Event()

    def drop() -> None:
        os.sync()
        _DROP.write_text("1")

    def work() -> None:
        while not is_over.wait(_EVERY_S):
            drop()

    try:
        drop()
    except OSError as error:
        raise ConfigError(f"--before empties the page cache, which needs root: {error}") from error
    thread = threading.Thread(target=work, name="kvtier-bench-cold", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
