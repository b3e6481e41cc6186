"""Run as a program: a client that never rests, with every value that it reads checked.

    load.py ADDRESS SEED [private | ipc] [dies=N]   killed in the middle of its N-th copy, or of one that it ordered (ipc)

Prints a line per event: "ack NAME TOKENS" once a session was stored durably, "kept NAME TOKENS" once a prefix was, as
PrefixCache.store(durable=True) does, "gone NAME" when a prefix is given up, "wrong ..." for a value that was not what it
should be. Runs until it is killed, or its standard input ends; then it prints "end" and how much it did.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from daemon.dying import die_in_copy, die_in_order
from pager.harness import Rig

from kvtier.pager.client.orders import CopyOrders
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import BlockMissError, Busy, ConfigError, TierUnavailableError

PAGES, STAGING, SESSIONS = 24, 2, 6
MOST_TOKENS = 160  # of a session; who has as many makes place for a new one
KINDS: dict[str, dict[str, Any]] = {"private": {"private_host": 16}, "ipc": {"transfer": "ipc"}}
REFUSALS = (Busy, TierUnavailableError, BlockMissError)


def prompt_of(name: str, num_tokens: int) -> list[int]:
    """The tokens of a session, so many; sessions of one family begin alike."""
    family, number = name.split("-")[1:]
    shared = random.Random(f"family {family}").choices(range(1 << 16), k=40)
    own = random.Random(f"{family} {number}").choices(range(1 << 16), k=2000)
    return (shared + own)[:num_tokens]


class Load:
    """Sessions that grow, are stored, left, and taken up again."""

    def __init__(self, address: str, seed: int, options: dict[str, Any]) -> None:
        self.choose = random.Random(seed)
        backend = CpuBackend(poison=True, delay_s=0.001)
        self.rig = Rig(daemon=address, backend=backend, pages=PAGES, staging=STAGING, **options)
        assert options.get("transfer") is None or self.rig.pager._core.nvme.status()["copies"] == "daemon"
        self.prefix = f"s{seed}"
        self.newest = {
            (family, place): place for family in range(3) for place in range(SESSIONS)
        }  # number of a session
        self.done = {"steps": 0, "parks": 0, "persists": 0, "resumes": 0, "refused": 0, "in_doubt": 0}
        if options.get("transfer") is not None:
            self._count_doubts()

    def step(self) -> None:
        where = self.choose.randrange(3), self.choose.randrange(SESSIONS)
        name = f"{self.prefix}-{where[0]}-{self.newest[where]}"
        try:
            seq = self._take(name)
        except REFUSALS:
            self.done["refused"] += 1
            time.sleep(0.005)
            return
        try:
            known = len(self.rig.pager.token_ids(seq))
            if known == MOST_TOKENS:  # a load that no longer computes copies nothing
                self.newest[where] += SESSIONS
                self._release(name, seq)
                return
            tokens = prompt_of(name, min(MOST_TOKENS, known + self.choose.randrange(1, 24)))
            self.rig.say(seq, tokens[known:], timeout_s=5.0)
            self.done["steps"] += 1
            if self.choose.random() < 0.5:
                self.rig.pager.park(name, seq, timeout_s=5.0)
                self.done["parks"] += 1
                print("ack", name, len(tokens), flush=True)
                return
            if self.choose.random() < 0.5:
                self.rig.pager.persist([seq], timeout_s=5.0)
                self.rig.pager.finish(seq)
                self.done["persists"] += 1
                print("kept", name, len(tokens), flush=True)
                return
        except REFUSALS:
            self.done["refused"] += 1
        finally:
            if self.rig.wrong:
                print("wrong", self.rig.wrong[:3], flush=True)
        if seq in self.rig.pager._core.sequences:
            self._release(name, seq)

    def _release(self, name: str, seq: int) -> None:
        """Nobody needs it any more, so what lies behind its last fork may leave first."""
        print("gone", name, flush=True)
        self.rig.pager.release(seq)

    def _count_doubts(self) -> None:
        """Copies that were ordered, and of which the daemon's death left open how they ended."""
        doubt = CopyOrders._doubt

        def counted(orders: CopyOrders, order: Any) -> None:
            self.done["in_doubt"] += 1
            doubt(orders, order)

        CopyOrders._doubt = counted  # type: ignore[method-assign]

    def _take(self, name: str) -> int:
        try:
            seq, _ = self.rig.pager.resume(name)
            self.done["resumes"] += 1
            return seq
        except ConfigError:  # unknown: new
            return self.rig.start(prompt_of(name, 40))


def main() -> None:
    faulthandler.enable()  # SIGABRT says where its threads are
    address, seed = sys.argv[1], int(sys.argv[2])
    for option in sys.argv[3:]:
        if option.startswith("dies="):
            (die_in_order if "ipc" in sys.argv else die_in_copy)(int(option.removeprefix("dies=")))
    load = Load(address, seed, next((KINDS[name] for name in KINDS if name in sys.argv), {}))
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    print("ready", flush=True)
    while not ended.is_set():
        load.step()
    load.rig.pager.check_integrity()
    copies = load.rig.pager._core.nvme.status().get("copies", "client")
    print("end", json.dumps(load.done | {"copies": copies}), flush=True)
    load.rig.close()


if __name__ == "__main__":
    main()
