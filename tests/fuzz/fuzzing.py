"""Runs a target on many inputs and judges it: no undocumented error, no input over a second of our time, none that waits
for much longer, no growing memory.

One batch again, by its seed:    python tests/fuzz/fuzzing.py TARGET SEED [INPUTS]
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from targets import TARGETS, Call, Target

BATCH = 1000  # inputs of one generator
SLOWEST_S = 1.0  # of the thread's time: a busy machine is no hang
LONGEST_S = 20.0  # of anybody's: what waits so long is stopped, and named
MOST_GROWTH_BYTES = 16 << 20
MEMORY = Path("/dev/shm")


class Hang(BaseException):
    """Nothing that is tested may take it for an error of its own."""


@dataclass
class Verdict:
    inputs: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    grown_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.inputs} inputs, {self.refused} refused, slowest {self.slowest_s * 1e3:.1f} ms, memory "
            f"{self.grown_bytes / (1 << 20):+.1f} MiB, {self.seconds:.1f} s"
        )


def run(target: Target, inputs: int, seed: int) -> Verdict:
    """Raises AssertionError with the batch's seed where the target fails."""
    verdict, started_s = Verdict(), time.perf_counter()
    gc.freeze()  # no input pays for looking through what the process had before
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder,
        target.make(Path(folder)) as call,
    ):
        before = 0
        for number in range(max(1, inputs // BATCH)):
            run_batch(target, call, seed + number, min(BATCH, inputs), verdict)
            if number == 0:  # what is loaded and cached once is not growth
                before = resident_bytes()
        verdict.grown_bytes = max(0, resident_bytes() - before)
    verdict.seconds = time.perf_counter() - started_s
    assert verdict.grown_bytes < MOST_GROWTH_BYTES, (
        f"{target.name}, seed {seed}: {verdict}{again(target, seed, inputs)}"
    )
    return verdict


def again(target: Target, seed: int, inputs: int = BATCH) -> str:
    return f"\nagain: python tests/fuzz/fuzzing.py {target.name} {seed} {inputs}"


def run_batch(target: Target, call: Call, seed: int, inputs: int, verdict: Verdict) -> None:
    choose, clock, errors = random.Random(seed), time.thread_time, target.errors
    for number in range(inputs):
        started_s = clock()
        try:
            with stopped_after(LONGEST_S):
                call(choose)
        except errors:
            verdict.refused += 1
        except BaseException as error:
            raise AssertionError(
                f"{target.name}: input {number} of seed {seed} raised {type(error).__name__}: {error}{again(target, seed)}"
            ) from error
        spent_s = clock() - started_s
        if spent_s > verdict.slowest_s:
            verdict.slowest_s = spent_s
            what = f"{target.name}: input {number} of seed {seed} took {spent_s:.1f} s"
            assert spent_s < SLOWEST_S, what + again(target, seed)
    verdict.inputs += inputs


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises Hang in what takes longer, by anybody's clock. The alarm of whoever set one before is set again."""

    def ring(*_: object) -> None:
        raise Hang(f"still under way after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left_s)


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is no growth
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> int:
    by_name = {target.name: target for target in TARGETS}
    if len(sys.argv) < 3 or sys.argv[1] not in by_name:
        print(f"{__doc__}\ntargets: {', '.join(by_name)}")
        return 2
    try:
        inputs = int(sys.argv[3]) if len(sys.argv) > 3 else BATCH
        print(run(by_name[sys.argv[1]], inputs, int(sys.argv[2])))
    except AssertionError:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
