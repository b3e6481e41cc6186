"""`kvtier bench serve`: the server over real HTTP, under a recorded trace and under many chats of several turns.

The trace is an open loop: requests come at their times, however long answers take. The chats are a closed loop over a
sweep of contexts and concurrency. Every case also runs with nothing to reuse, which is the reference. The model is the
built-in one, so that every answer can be checked and what is measured is the cache and the server around it.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from ...tiers.errors import ConfigError
from .harness import Row, check_folder, report

NEEDS = ("httpx", "fastapi", "uvicorn", "prometheus_client")
TRACE = Path(__file__).resolve().parents[2] / "benchmarks" / "traces" / "mooncake-conversation.jsonl.gz"
TRACE_BLOCK, LEAST_BLOCK = 512, 4  # tokens: of the trace, and of a prompt made from it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default="512,2048", metavar="N,N", help="tokens of each chat's first message")
    parser.add_argument("--concurrency", default="1,4,16", metavar="N,N", help="turns at a time")
    parser.add_argument("--sessions", type=int, default=16, metavar="N", help="chats of each case (default 16)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="of each chat (default 4)")
    parser.add_argument("--answer", type=int, default=16, metavar="TOKENS", help="of each turn (default 16)")
    parser.add_argument("--trace", type=Path, default=TRACE, metavar="FILE", help="gzip of Mooncake's JSON lines")
    parser.add_argument("--requests", type=int, metavar="N", help="of the trace (default: all; 0: no replay)")
    parser.add_argument("--scale", type=int, default=8, metavar="N", help="tokens of the trace to one of ours")
    parser.add_argument("--speed", type=float, default=80.0, metavar="N", help="times as fast as recorded")
    parser.add_argument("--device-bytes", default="64MiB", metavar="SIZE", help="of each server (default 64MiB)")
    parser.add_argument("--host-bytes", default="256MiB", metavar="SIZE", help="of each server (default 256MiB)")
    parser.add_argument("--nvme-bytes", default="2GiB", metavar="SIZE", help="of the store (default 2GiB)")
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="tokens (default 64: one of the trace)")
    parser.add_argument("--path", default=".", metavar="DIR", help="where the store is made for the run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="charts and table as a page that loads nothing")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="the charts as an image, where matplotlib is installed"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for numbers that make no run, and for what is not installed."""
    contexts, concurrency = _numbers(arguments, "contexts"), _numbers(arguments, "concurrency")
    _check(arguments)
    from .serving.chart import check_png, save_html, save_png
    from .serving.run import Bench

    if arguments.png is not None:
        check_png()
    bench = Bench(arguments, contexts, concurrency)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        bench.run(Path(folder).resolve())
    if arguments.html is not None:
        save_html(arguments.html, bench.panels, report("serve", bench.rows))
    if arguments.png is not None:
        save_png(arguments.png, bench.panels)
    return bench.rows


def _numbers(arguments: argparse.Namespace, name: str) -> list[int]:
    text = getattr(arguments, name)
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"--{name} {text!r}: need positive numbers with commas between them")
    return numbers


def _check(arguments: argparse.Namespace) -> None:
    for name in ("sessions", "turns", "answer", "scale", "speed"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: need more than 0")
    if arguments.requests is not None and arguments.requests < 0:
        raise ConfigError(f"--requests {arguments.requests}: need 0 or more")
    if TRACE_BLOCK % arguments.scale or TRACE_BLOCK // arguments.scale < LEAST_BLOCK:
        most = TRACE_BLOCK // LEAST_BLOCK
        raise ConfigError(f"--scale {arguments.scale}: need a power of two up to {most}, a divisor of {TRACE_BLOCK}")
    check_folder(arguments.path)
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed; this needs: pip install 'kvtier[serve]' httpx")
