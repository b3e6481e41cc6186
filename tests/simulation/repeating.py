"""Whether a simulation does the same again under the same seed, also in other processes. For the tests of each kind of run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def run_again_and_elsewhere(runner: ModuleType, operations: int) -> Any:
    """The world of seed 7, as told alike by processes whose sets and dictionaries are ordered otherwise; not seed 8's."""
    script = Path(str(runner.__file__))
    told = {
        subprocess.run(
            [sys.executable, script, "7", str(operations)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": salt},
        ).stdout.splitlines()[0]
        for salt in ("1", "2")
    }
    world = runner.run(7, operations)
    assert told == {f"seed 7: {world.report()}"}
    assert runner.run(8, operations).trace.digest() != world.trace.digest()
    return world
