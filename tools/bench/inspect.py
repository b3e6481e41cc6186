"""`kvtier bench inspect`: what looking costs. Every view at a million blocks of a pager and of pagerd (inspect_daemon.py), the
start of the program, the decision ring, and what it costs a pager or a daemon at work that somebody watches.

References are aims (0.3 s a view, 0.15 s a start, 100 ns a block) and the same work alone in the same rounds. Blocks are tiny,
so no figure contains moving bytes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span

from ...pager.directory import Directory
from ...pager.inspection.asking import Target
from ...pager.inspection.events import KIND, EventRing
from ...pager.states import HostSlots, Pages
from ...tiers.errors import ConfigError
from . import inspect_daemon
from .harness import Row, interleave
from .watching import TURN_S, VIEW_ROUNDS, questions, views, watched

START_S, EVENT_NS = 0.15, 100.0
LEAST_S = 1e-3  # a start beyond a bare one: less is noise of a busy machine
SEQUENCES = 100
STEPS_EACH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=1_000_000, metavar="N", help="blocks that the pager holds")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for fewer blocks than sequences."""
    if arguments.blocks < SEQUENCES or arguments.rounds < 1:
        raise ConfigError(
            f"--blocks {arguments.blocks}, --rounds {arguments.rounds}: need {SEQUENCES} blocks and one round"
        )
    rows = [_start(arguments.rounds), *_events(arguments.rounds)]
    with (
        tempfile.TemporaryDirectory() as directory,
        _filled(Path(directory), arguments.blocks) as (pager, target, prompt),
    ):
        asked = questions(target, f"seq:{SEQUENCES}", prompt)
        rows += views(target, asked, f"a pager, {arguments.blocks:,} blocks", min(arguments.rounds, VIEW_ROUNDS))
        rows += _watched(pager, Path(directory) / "sock.page", arguments.rounds)
    return [*rows, *inspect_daemon.rows(arguments.blocks, arguments.rounds)]


def _start(rounds: int) -> Row:
    """From the shell to the end of an answer that needs no pager."""
    command = [sys.executable, "-m", "kvtier.tools.inspect", "completion", "bash"]
    cases = {
        "ours": lambda: subprocess.run(command, capture_output=True, check=True),
        "bare": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    }
    seconds = interleave(cases, rounds)
    beyond = (ours - bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True))
    net_s = max(statistics.median(beyond), LEAST_S)
    return Row(
        "start, beyond a bare interpreter",
        "wall",
        net_s * 1e3,
        "ms",
        "aim: 150 ms",
        START_S * 1e3,
        START_S / net_s,
        rounds,
    )


def _events(rounds: int) -> Iterator[Row]:
    """A row in the decision ring, per block of its batch."""
    directory = Directory(Pages(1), HostSlots(1))
    blocks = directory.create(np.arange(4096), 1)
    ring = EventRing(time.monotonic)
    for size in (1, 32, 512):
        part = blocks[:size]

        def note(part: np.ndarray = part) -> None:
            for _ in range(200):
                ring.note(KIND["evicted"], 1, 0, directory, part, "pressure", policy="lru")

        ns = statistics.median(interleave({"ring": note}, rounds)["ring"]) / 200 / size * 1e9
        yield Row(f"event, batch of {size}", "cpu", ns, "ns/block", "aim: 100 ns", EVENT_NS, EVENT_NS / ns, rounds)


@contextmanager
def _filled(directory: Path, blocks: int) -> Iterator[tuple[Pager, Target, list[int]]]:
    """A pager that holds so many blocks in open sequences, a way to ask it, and the tokens of one of them."""
    layout = KVLayout(1, 1, head_dim=4, block_size=1, dtype="float32")
    each, socket = blocks // SEQUENCES, directory / "sock"
    room = int(blocks * 1.1) + SEQUENCES * 2
    config = PagerConfig(
        device_bytes=room * layout.block_bytes,
        host_bytes=0,
        staging_bytes=0,
        backend="cpu",
        status_socket=str(socket),
        low_watermark=0.0,
        high_watermark=0.0,
    )
    rng = random.Random(0)
    with Pager.open(layout, config) as pager:
        for _ in range(SEQUENCES):
            prompt = rng.choices(range(1 << 17), k=each)
            seq = pager.begin()
            pager.attach(seq, prompt[:-1])
            pager.append(seq, prompt)
            with pager.lease([Span(seq, 0, each)]) as lease:
                lease.commit()
        yield pager, Target.find(str(socket), timeout_s=60.0), prompt


def _watched(pager: Pager, page: Path, rounds: int) -> Iterator[Row]:
    """Steps of one token, alone and while a process watches the snapshot page."""
    return watched(page, os.getpid(), lambda: _steps(pager), rounds, "steps of one token while watched")


def _steps(pager: Pager) -> int:
    """Steps in one turn, by sequences that end after a hundred of them and leave nothing."""
    until_s, steps = time.monotonic() + TURN_S, 0
    while time.monotonic() < until_s:
        seq = pager.begin()
        for position in range(STEPS_EACH):
            pager.append(seq, [position])
            with pager.lease([Span(seq, position, position + 1)]) as lease:
                lease.commit()
            steps += 1
            if time.monotonic() >= until_s:
                break
        pager.release(seq)
    return steps
