"""Run as a program: writers on one store, killed with SIGKILL at random moments; after each, the store is checked whole.

Prints one JSON object: loops, acknowledged blocks, blocks lost after they were acknowledged, wrong blocks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback

import numpy as np
from blocks_of import LARGE, LAYOUT, CpuBackend, KVLayout, key_of, open_tier, put, wrong_blocks


def opened(path: str, layout: KVLayout, codec: str | None = None):
    """Large blocks go past the page cache, few at a time, so that other threads compute for the one that calls."""
    if layout is LARGE:
        return open_tier(path, CpuBackend(io_depth=1), slots=64, codec=codec, layout=layout)
    return open_tier(path, CpuBackend(), codec=codec)


def writer(path: str, layout: KVLayout, first: int, seed: int, pipe: int) -> None:
    """Write, free, rewrite; report each number once its commit has returned, and before a block is given up."""
    choose, most = random.Random(seed), 16 if layout is LARGE else 8
    tier = opened(path, layout)
    held, number, waiting = tier.recovered()[0][0].tolist(), first, []
    for step in range(1 << 30):
        if tier.free_slots(0) < 24:
            gone = [held.pop(choose.randrange(len(held))) for _ in range(24)]
            stamps = tier.stamps(0, np.array(gone))
            dropped = {stamp["key"].tobytes() for stamp in stamps}
            waiting = [n for n in waiting if key_of(n) not in dropped]
            os.write(pipe, b"".join(b"-" + key for key in dropped))
            tier.free(0, np.array(gone))
        slots = tier.allocate(0, choose.randrange(1, most + 1))
        numbers = list(range(number, number + len(slots)))
        number += len(slots)
        assert put(tier, slots, numbers).all()
        held += slots.tolist()
        waiting += numbers
        if step % 5 == 4:  # out of their segment, as a reclaim does
            moved, targets = np.array(held[:4]), tier.allocate(0, len(held[:4]))
            ticket = tier.relocate(0, moved, targets)
            assert ticket.event.wait(60) and ticket.ok.all()
            tier.free(0, moved)
            held[:4] = targets.tolist()
        if step % 3 == 0:
            tier.flush()
            os.write(pipe, b"".join(b"+" + key_of(n) for n in waiting))
            waiting = []


def main(path: str, loops: int, seed: int, codec: str, size: str) -> dict[str, int]:
    layout = LARGE if size == "large" else LAYOUT
    choose, acknowledged = random.Random(seed), set()
    totals = {"loops": loops, "acknowledged": 0, "lost": 0, "wrong": 0, "kept": 0}
    close(opened(path, layout, codec))  # making the Zarr metadata takes longer than a writer lives
    for loop in range(loops):
        reader, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                writer(path, layout, loop << 20, seed + loop, pipe)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(pipe)
        raw = (
            b"" if loop % 5 == 0 else os.read(reader, 33)
        )  # four of five have begun to write, the fifth may still open
        time.sleep(choose.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as said:
            raw += said.read()
        for i in range(0, len(raw) - len(raw) % 33, 33):
            key = raw[i + 1 : i + 33]
            (acknowledged.add if raw[i : i + 1] == b"+" else acknowledged.discard)(key)
            totals["acknowledged"] += raw[i : i + 1] == b"+"
        tier = opened(path, layout)
        wrong, right = wrong_blocks(tier)
        totals["wrong"] += wrong
        totals["lost"] += len(acknowledged - right)
        totals["kept"] = len(right)
        acknowledged &= right
        close(tier)
    return totals


def close(tier) -> None:
    tier.close()
    tier._backend.close(5)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6])))
