"""One seeded run of the real pager: what it is made of, how time and copies pass, how it dies and comes back.

The pager, its tiers and its store are the real ones; clock, order of copies, disk faults, kills and power losses follow
the seed. What is checked after every call: the books agree, every byte read was what was written for that token, tokens
and sessions are those that the plain model here remembers. What the workload does is sim_workload.py's business.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sim_disk import Killed, SimulatedDisk, Unsynced
from sim_events import Clock, Trace

from kvtier.tiers.errors import KvTierError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.simulated import SimulatedBackend

sys.path.insert(0, str(Path(__file__).parents[1] / "pager"))
from harness import BLOCK, LAYOUT, WINDOWED, Rig

STEP_S = 1e-4  # of one step of a stream
PATIENCE_S = 1.0  # of a lease, and of whatever else waits
NAMESPACES = ("default", "other")


class TracedBackend(SimulatedBackend):
    """Streams under the seed; every step is an event and takes time. Who waits for nothing waits all its time."""

    def __init__(self, seed: int, clock: Clock, trace: Trace) -> None:
        super().__init__(seed)
        self._clock, self._trace = clock, trace
        self.on_step = self._note

    def wait_any(self, timeout_s: float) -> None:
        if not self.run_one():
            self._clock.now_s += timeout_s

    def _note(self, name: str) -> None:
        self._clock.now_s += STEP_S
        self._trace.event("step", name)


@dataclass(frozen=True)
class Shape:
    """What a seed draws before it begins."""

    layouts: list[KVLayout]
    settings: dict[str, Any]
    has_store: bool
    faults: float  # share of calls to the kernel that fail; 0 also means that nothing may ever be lost
    loses_power: bool

    @classmethod
    def draw(cls, choose: random.Random) -> Shape:
        layouts = [[LAYOUT], [LAYOUT], [LAYOUT, WINDOWED]][choose.randrange(3)]
        has_store = choose.random() < 0.85
        settings: dict[str, Any] = dict(
            pages=choose.randrange(7, 15) + 6 * (len(layouts) - 1),
            host=choose.randrange(6, 20) + 6 * (len(layouts) - 1),
            staging=choose.randrange(3) if len(layouts) == 1 else 0,
        )
        if choose.random() < 0.2:
            settings |= dict(policy="sliding_window", window=12, sinks=4)
        if has_store:
            settings |= dict(
                nvme_bytes=4096 * 2 * choose.choice([24, 40, 80]) * len(layouts),
                durability=choose.choice(["batch", "batch", "always"]),
                nvme_codec=choose.choice([None, None, None, "lz4"]),
            )
        faults = choose.choice([0.0, 0.0, 0.01, 0.04]) if has_store else 0.0
        return cls(layouts, settings, has_store, faults, has_store and choose.random() < 0.5)


@dataclass
class Saved:
    """What the model knows of a session. `may_be` lists what a crash may leave: token ids and computed, or None."""

    may_be: list[tuple[tuple[int, ...], int, str] | None] = field(default_factory=list)
    is_whole: bool = False  # nobody has used it since it was acknowledged: every block must come back
    active_seq: int | None = None


class World:
    """A pager that lives, dies and comes back, and a model of what it must remember."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.choose = seed, random.Random(seed)
        self.clock, self.trace, self.unsynced = Clock(), Trace(), Unsynced()
        self.shape = Shape.draw(self.choose)
        self.store = folder / "store" if self.shape.has_store else None
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.namespace: dict[int, str] = {}
        self.sessions: dict[str, Saved] = {}
        self.in_doubt: dict[str, Saved] = {}  # gone at the last start, which could not make that last
        self.lives = 0
        self.has_lost_power = False
        self.disk: SimulatedDisk
        self.rig: Rig
        self.open()

    @property
    def pager(self):
        return self.rig.pager

    @property
    def is_strict(self) -> bool:
        """Nothing fails in this run, so nothing that was acknowledged or is in use may be lost."""
        return self.shape.faults == 0.0

    # ------------------------------------------------------------------ living and dying
    def open(self) -> None:
        """A new process over the same store. One that is killed or refused while it opens is followed by another."""
        for attempt in range(8):
            self.lives += 1
            self.trace.event("call", f"open {self.lives}")
            self.disk = SimulatedDisk(self.choose, self.trace, self.unsynced, self.shape.faults * (attempt < 4))
            if self.lives > 1 and attempt < 2 and self.choose.random() < 0.3:
                self.disk.kill_in = self.choose.randrange(1, 20)
            try:
                self.rig = self._new_rig()
            except Killed:
                self.bury()
            except KvTierError:
                assert self.disk.failed, "a store that nothing happened to was refused"
                self.bury()
            else:
                self.disk.kill_in = None
                self.tokens, self.computed, self.namespace = {}, {}, {}
                self.check_sessions()
                return
        raise AssertionError("the store does not open any more")

    def _new_rig(self) -> Rig:
        settings = self.shape.settings
        return Rig(
            path=self.store,
            layouts=self.shape.layouts,
            backend=TracedBackend(self.choose.getrandbits(32), self.clock, self.trace),
            clock=self.clock,
            calls=self.disk if self.shape.has_store else None,
            **settings,
        )

    def bury(self) -> None:
        """What the kernel does with a dead process's descriptors; then, in some runs, the machine goes dark too."""
        self.disk.die()
        if self.store is None:
            return
        for fd in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            if target.startswith(str(self.store)):
                os.close(int(fd))
        if self.shape.loses_power and self.choose.random() < 0.7:
            self.has_lost_power = True
            taken = self.unsynced.lose_power(self.store, self.choose)
            self.trace.event("power loss", str(taken))

    def crash(self) -> None:
        """kill -9: queued copies and calls never run."""
        self.trace.event("crash", "")
        assert self.rig.wrong == [], self.rig.wrong[:3]
        self.bury()
        if self.store is None:
            self.sessions.clear()
        self.open()

    def restart(self) -> None:
        """An orderly end, and a new process."""
        self.rig.settle()
        self.pager.close()
        self.check()
        if self.store is None:
            self.sessions.clear()
        self.open()

    # ------------------------------------------------------------------ checks
    def check(self) -> None:
        """After every call."""
        self.pager.check_integrity()
        assert self.rig.wrong == [], self.rig.wrong[:3]
        for seq, tokens in self.tokens.items():
            assert self.pager.token_ids(seq) == tokens, f"token ids of sequence {seq}"
        if self.is_strict and not self.has_lost_power:  # which may take what was listed and never acknowledged
            assert not self.pager.counters.get("lost_tokens"), "blocks in use were lost though nothing failed"
            assert not self.pager.counters.get("corrupt_blocks")
            for seq, computed in self.computed.items():
                have = self.pager.num_computed(seq)
                assert have == computed, f"sequence {seq}: {have} tokens count as computed, {computed} were"

    def check_sessions(self) -> None:
        """After a start: every session is one that a crash may leave, and whole where nothing failed.

        A start that could not sync the journal has shown what the next power loss may take back.
        """
        found = self.pager._core.sessions
        has_lasted = self.pager._core.nvme is None or not self.pager._core.nvme.status()["failed_syncs"]
        self.sessions, self.in_doubt = self.in_doubt | self.sessions, {}
        for session_id, saved in list(self.sessions.items()):
            entry = found.get(session_id)
            is_now = None if entry is None else (tuple(entry.token_ids), entry.num_computed, entry.namespace)
            assert is_now in saved.may_be, f"session {session_id} came back as {is_now}, not as one of {saved.may_be}"
            if entry is None:
                del self.sessions[session_id]
                if not has_lasted:
                    self.in_doubt[session_id] = saved
                continue
            if saved.is_whole and self.is_strict:
                self._check_whole(session_id, entry)
            self.sessions[session_id] = Saved([is_now] if has_lasted else saved.may_be, is_whole=saved.is_whole)
        assert set(found) == set(self.sessions), "a session came from nowhere"

    def _check_whole(self, session_id: str, entry: Any) -> None:
        """Every block of an acknowledged session is listed, and its bytes are good."""
        held = min(len(entry.tables[0]) * BLOCK, entry.num_computed)
        assert held == entry.num_computed, f"session {session_id}: {held} of {entry.num_computed} tokens are left"
        for group, table in zip(self.pager._core.groups, entry.tables, strict=True):
            slots = group.directory.nvme_slot[table.ids[table.ids >= 0]]
            rows = np.empty((len(slots), group.layout.block_bytes), np.uint8)
            tier = group.cold.tier
            ticket = tier.read(group.index, slots, rows, np.arange(len(slots)), tier.stamps(group.index, slots))
            assert ticket.event.wait() and ticket.ok.all(), f"session {session_id}: blocks {slots[~ticket.ok]} are bad"

    def refresh(self, seq: int) -> None:
        """The model takes over what a call on this sequence has computed."""
        self.computed[seq] = self.pager.num_computed(seq)

    def close(self) -> None:
        self.rig.settle()
        self.check()
        self.pager.close()

    def report(self) -> str:
        return f"{self.trace.total} events ({dict(self.trace.counts)}), trace {self.trace.digest()}, {self.lives} lives"


__all__ = ["BLOCK", "Killed", "World"]
