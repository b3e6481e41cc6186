"""Run seeds of the simulation, alone or many:    python tests/simulation/replay.py SEED [OPERATIONS] [--until SEED]"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

for folder in ("simulation", "pager"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from sim_workload import Workload  # noqa: E402
from sim_world import World  # noqa: E402

OPERATIONS = 1020  # of a seed, about 5,400 events
MEMORY = Path("/dev/shm")


def scratch() -> str | None:
    """A folder in memory, where the system has one."""
    return str(MEMORY) if MEMORY.is_dir() else None


def run(seed: int, operations: int = OPERATIONS, events: int | None = None) -> World:
    """One whole run, or its beginning that has so many events.

    Whatever goes wrong comes out with the seed, the last events and how to see it again.
    """
    with tempfile.TemporaryDirectory(prefix="kvtier-sim-", dir=scratch()) as folder:
        world = World(seed, Path(folder))  # opens a new store under faults, too
        workload = Workload(world)
        try:
            workload.run(operations, events)
        except BaseException as error:
            shown = "".join(world.trace.last)
            again = f"python tests/simulation/replay.py {seed} {workload.begun}"
            raise AssertionError(
                f"seed {seed}: {type(error).__name__}: {error}\nafter {world.report()}\n{shown}again: {again}"
            ) from error
    return world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("operations", type=int, nargs="?", default=OPERATIONS)
    parser.add_argument("--until", type=int, help="run all seeds below this one too, and go on after failures")
    asked = parser.parse_args()
    events, failed, started_s = 0, [], time.perf_counter()
    for seed in range(asked.seed, asked.until or asked.seed + 1):
        try:
            world = run(seed, asked.operations)
        except AssertionError as error:
            failed.append(seed)
            print(f"seed {seed} FAILED")
            if asked.until is None:
                traceback.print_exc()
            else:
                print(str(error).splitlines()[0], flush=True)
        else:
            events += world.trace.total
            if asked.until is None:
                print(f"seed {seed}: {world.report()}\n{world.shape}")
    seconds = time.perf_counter() - started_s
    print(f"{events} events, {seconds:.1f} s, {len(failed)} failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
