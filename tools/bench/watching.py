"""What the inspector's benchmarks share: its questions, timed one by one, and work that is watched every other turn.

Whoever watches is a process that reads the snapshot page twice a second, as `pager-inspect top` does. It is there all the time
and stopped while the work is to be alone, so that no turn pays for its start. What watching costs is told in CPU time of the
watched process per unit of work, each way in each round: how much got done a second would say more of the machine. A third
turn has the same reader read a page that nobody writes: what that costs, a further process on the machine costs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...pager.inspection.asking import Target
from ...pager.inspection.snapshot import stop_watching
from .harness import Row, interleave

VIEW_S = 0.3
VIEW_ROUNDS = 5  # at most
TURN_S = 1.0
_WATCH = """
import sys, time
from pathlib import Path
from kvtier.pager.inspection.snapshot import read_snapshot
print(flush=True)
while True:
    try:
        read_snapshot(Path(sys.argv[1]), watch=True)
    except Exception:
        pass
    time.sleep(0.5)
"""


def questions(target: Target, session: str, prompt: list[int]) -> dict[str, dict[str, Any]]:
    """Every verb that asks, with its arguments."""
    key = target.ask("blocks", limit=1)["blocks"][0]["key"]
    return {
        "status": {},
        "sessions": {},
        "session": {"session": session},
        "blocks": {},
        "prefix": {"tokens": np.array(prompt, "<u4").tobytes()},
        "why": {},
        "explain": {"about": key},
        "trace": {},
        "thrash": {},
        "doctor": {},
        "check": {},
        "advise": {},
    }


def views(target: Target, asked: Mapping[str, dict[str, Any]], case: str, rounds: int) -> Iterator[Row]:
    cases = {verb: (lambda verb=verb, words=words: target.ask(verb, **words)) for verb, words in asked.items()}
    for verb, times in interleave(cases, rounds).items():  # type: ignore[arg-type]
        spent_s = statistics.median(times)
        what = f"{verb} of {case}"
        yield Row(what, "answer", spent_s * 1e3, "ms", "aim: 300 ms", VIEW_S * 1e3, VIEW_S / spent_s, rounds)


def watched(page: Path, pid: int, work: Callable[[], int], rounds: int, case: str) -> Iterator[Row]:
    """`work` is done for TURN_S and says how many units that was; `pid` is who is watched. Turns of a round in random order."""
    spent: dict[str, list[float]] = {"alone": [], "watched": [], "beside": []}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        other = Path(shutil.copy(page, folder))
        readers = {"watched": stack.enter_context(_reader(page)), "beside": stack.enter_context(_reader(other))}
        for _ in range(rounds):
            turns = list(spent)
            order.shuffle(turns)
            for turn in turns:
                for name, reader in readers.items():
                    os.kill(reader.pid, signal.SIGCONT if turn == name else signal.SIGSTOP)
                if turn != "watched":
                    time.sleep(0.01)  # it stops
                    stop_watching(page)  # or the writer would go on for a while
                time.sleep(0.15)  # the writer notices before it matters
                before_s = cpu_s(pid)
                units = work()
                spent[turn].append((cpu_s(pid) - before_s) / units)
    middle_us = {turn: statistics.median(times) * 1e6 for turn, times in spent.items()}
    for turn, name in (("watched", case), ("beside", f"{case}: the reader alone, of another page")):
        ratio = statistics.median(a / w for a, w in zip(spent["alone"], spent[turn], strict=True))
        yield Row(name, "cpu", middle_us[turn], "us each", "the same, alone", middle_us["alone"], ratio, rounds)


@contextmanager
def _reader(page: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", _WATCH, str(page)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        try:
            yield reader
        finally:
            reader.kill()


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, those that ended too."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
