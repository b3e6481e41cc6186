"""What the simulated applications do: a seeded choice among all public calls, also while leases of others are open.

Every call may be refused with a documented error; whatever else comes out of one is a failure of the run. After an
operation the world is checked. Kills may come in any call to the kernel, and between any two operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from harness import compare, values
from sim_world import BLOCK, NAMESPACES, PATIENCE_S, Killed, Saved, World

from kvtier.pager.lease import Lease, Span
from kvtier.tiers.errors import BlockMissError, Busy, ConfigError, TierUnavailableError, UnknownSessionError

REFUSALS = (Busy, BlockMissError, TierUnavailableError)
LONGEST = 9 * BLOCK
MOST_SEQUENCES = 6
MOST_ROUNDS = 120  # of one sequence being computed; each makes progress or is refused


@dataclass
class OpenStep:
    """A lease that is held while others run; `found` are the mismatches that its kernels will note."""

    lease: Lease
    found: list[str]
    work: list[tuple[int, int]]


class Workload:
    """Draws and runs operations on one world."""

    def __init__(self, world: World) -> None:
        self.world, self.choose = world, world.choose
        self.open_steps: list[OpenStep] = []
        self._number = 0
        self.begun = 0  # operations
        weights: dict[Callable[[], None], int] = {
            self.begin: 10,
            self.say: 16,
            self.say_together: 6,
            self.open_step: 8,
            self.close_step: 8,
            self.fork: 4,
            self.truncate: 4,
            self.end: 6,
            self.hint: 10,
            self.discard: 1,
            self.park: 5,
            self.checkpoint: 3,
            self.resume: 5,
            self.forget: 2,
            self.persist: 2,
            self.read_blocks: 3,
            self.read_host_block: 2,
            self.write_only: 2,
            self.ask_wrongly: 2,
            self.look: 2,
            self.let_copies_run: 14,
            self.let_time_pass: 2,
            self.fail_a_copy: 2 if not world.is_strict else 0,
            self.rot: 1 if world.shape.faults else 0,
            self.abandon: 1,
            self.restart: 1,
            self.crash: 1 if world.shape.has_store else 0,
            self.crash_soon: 1 if world.shape.has_store else 0,
        }
        self._operations = list(weights)
        self._weights = list(weights.values())

    def run(self, operations: int, events: int | None = None) -> None:
        """So many operations, or fewer where that many events have come before."""
        while self.begun < operations and (events is None or self.world.trace.total < events):
            self.begun += 1
            operation = self.choose.choices(self._operations, self._weights)[0]
            try:
                self.call(operation.__name__, operation)
                self.world.check()
            except Killed:
                self.open_steps.clear()
                self.world.crash()
        self.finish()

    def finish(self) -> None:
        """Everything comes to rest, a new process finds every session, and each of them goes on."""
        for step in list(self.open_steps):
            self._close(step, commits=True)
        self.world.disk.kill_in = None
        self.world.restart()
        for session_id in sorted(self.world.sessions):
            self._resume(session_id)
        for seq in list(self.world.tokens):
            self._say(seq, self._draw_tokens(2))
            self._end(seq, released=False)
        self.world.close()

    def call(self, name: str, function: Callable[[], None]) -> None:
        """One event; documented refusals are answers."""
        self.world.trace.event("call", name)
        try:
            function()
        except REFUSALS as error:
            self.world.trace.event("call", f"{name} refused: {type(error).__name__}")

    # ------------------------------------------------------------------ sequences
    def begin(self) -> None:
        if len(self.world.tokens) >= MOST_SEQUENCES:
            return self.end()
        namespace = self.choose.choice(NAMESPACES)
        tokens = self._draw_tokens(3 * BLOCK)
        if self.world.tokens and self.choose.random() < 0.5:  # something that another has said before
            tokens = self.choose.choice(list(self.world.tokens.values()))[: self.choose.randrange(1, LONGEST)] or tokens
        seq = self.world.pager.begin(namespace)
        self._know(seq, [], namespace)
        self.world.pager.attach(seq, tokens[:-1], with_tail=self.choose.random() < 0.5)
        self.world.pager.append(seq, tokens[self.world.pager.num_computed(seq) :])
        self.world.tokens[seq] = list(tokens)
        self._compute(seq)

    def say(self) -> None:
        seq = self._idle()
        if seq is not None:
            self._say(seq, self._draw_tokens(BLOCK))

    def say_together(self) -> None:
        """One step over several sequences."""
        work = []
        for seq in self._all_idle()[: self.choose.randrange(2, 4)]:
            tokens = self._draw_tokens(3)
            if len(self.world.tokens[seq]) + len(tokens) > LONGEST or not self._is_computed(seq):
                continue
            self._append(seq, tokens)
            work.append((seq, len(tokens)))
        if work:
            self._step(work)

    def fork(self) -> None:
        seq = self._idle()
        if seq is not None and len(self.world.tokens) < MOST_SEQUENCES:
            child = self.world.pager.fork(seq)
            self._know(child, self.world.tokens[seq], self.world.namespace[seq])

    def truncate(self) -> None:
        seq = self._idle()
        if seq is not None:
            self._used(seq)
            count = self.choose.randrange(len(self.world.tokens[seq]) + 1)
            left = self.world.pager.truncate(seq, count)
            del self.world.tokens[seq][count:]
            assert left <= count
            self.world.refresh(seq)

    def end(self) -> None:
        seq = self._idle()
        if seq is not None:
            self._end(seq, released=self.choose.random() < 0.5)

    def discard(self) -> None:
        seq = self._idle()
        if seq is not None:
            self._used(seq)
            self.world.pager.discard(seq)
            self.world.refresh(seq)

    def hint(self) -> None:
        seq = self._idle()
        if seq is None:
            return
        pager = self.world.pager
        what = self.choose.choice(["demote", "prefetch", "bring_up", "pin", "seal", "plan", "adopt"])
        self.world.trace.event("call", what)
        if what == "pin":
            pager.pin(seq, self.choose.choice([0.01, 1.0]))
        elif what == "plan":
            left = len(self.world.tokens[seq]) - pager.num_computed(seq)
            assert pager.plan_prefill(seq, BLOCK) <= max(left, 0)
            pager.pages_needed([(seq, 1)])
            pager.seconds_to_bring_back([seq])
        elif what == "adopt":
            if not self.world.tokens[seq] or pager.num_computed(seq):
                return
            pager.adopt(seq)
        else:
            getattr(pager, what)(seq)
        self.world.refresh(seq)

    # ------------------------------------------------------------------ leases that stay open
    def open_step(self) -> None:
        seq = self._idle()
        if seq is None or len(self.open_steps) >= 2 or len(self.world.tokens[seq]) + 2 > LONGEST:
            return
        if not self._is_computed(seq):
            return
        tokens = self._draw_tokens(2)
        self._append(seq, tokens)
        start, rig = self.world.pager.num_computed(seq), self.world.rig
        end = len(self.world.tokens[seq])
        lease = self.world.pager.lease([Span(seq, start, end)], timeout_s=PATIENCE_S)
        try:
            rig.compute(lease)
        except BaseException as error:
            if not isinstance(error, Killed):
                lease.release()
            self.world.refresh(seq)
            raise
        self.open_steps.append(OpenStep(lease, rig._found, [(seq, end)]))

    def close_step(self) -> None:
        if self.open_steps:
            self._close(self.choose.choice(self.open_steps), commits=self.choose.random() < 0.8)

    def _close(self, step: OpenStep, *, commits: bool) -> None:
        """A step that is given up counts for nothing, whatever its kernels read."""
        self.open_steps.remove(step)
        try:
            if commits:
                step.lease.commit()
                self.world.rig._counted.append(step.found)
        except BlockMissError:
            pass
        finally:
            if not self.world.disk.is_dead:
                step.lease.release()
        for seq, _ in step.work:
            self.world.refresh(seq)

    def ask_wrongly(self) -> None:
        """What is leased or unknown is refused, and nothing changes."""
        pager = self.world.pager
        for step in self.open_steps[:1]:
            seq = step.work[0][0]
            for refused in (pager.finish, pager.fork, pager.demote, pager.discard, pager.seal):
                self._must_raise(Busy, partial(refused, seq))
            self._must_raise(Busy, partial(pager.truncate, seq, 0))
            self._must_raise(Busy, partial(pager.park, "x", seq))
        self._must_raise(ConfigError, lambda: pager.finish(10_000))
        self._must_raise(ConfigError, lambda: pager.lease([]))
        self._must_raise(UnknownSessionError, lambda: pager.resume("nobody"))

    def write_only(self) -> None:
        """K/V that were computed elsewhere: tokens with a place, and no context."""
        seq = self._idle()
        if seq is None or len(self.world.tokens[seq]) + 5 > LONGEST or not self._is_computed(seq):
            return
        self._append(seq, self._draw_tokens(5))
        start, end = self.world.pager.num_computed(seq), len(self.world.tokens[seq])
        rig = self.world.rig
        with self.world.pager.lease([Span(seq, start, end)], timeout_s=PATIENCE_S, write_only=True) as lease:
            for group, layout in enumerate(rig.layouts):
                for layer in range(layout.num_layers):
                    rig._write(lease, group, layer)
            lease.commit()
        self.world.refresh(seq)

    # ------------------------------------------------------------------ sessions
    def park(self) -> None:
        seq = self._idle()
        if seq is not None and self.world.tokens[seq]:
            self._save(seq, is_parked=True)

    def checkpoint(self) -> None:
        seq = self._idle()
        if seq is not None and self.world.tokens[seq]:
            self._save(seq, is_parked=False)

    def _save(self, seq: int, *, is_parked: bool) -> None:
        world, pager = self.world, self.world.pager
        session_id = next((name for name, s in world.sessions.items() if s.active_seq == seq), None)
        if session_id is None:
            self._number += 1
            session_id = f"s{self._number}"
        saved = world.sessions.get(session_id) or Saved([None])
        new = (tuple(world.tokens[seq]), pager.num_computed(seq), world.namespace[seq])
        saved.may_be.append(new)  # from now on a crash may leave either
        saved.is_whole = False
        world.sessions[session_id] = saved
        try:
            (pager.park if is_parked else pager.checkpoint)(session_id, seq, timeout_s=PATIENCE_S)
        except REFUSALS:
            if session_id not in pager.sessions() and world.store is None:
                del world.sessions[session_id]
            world.refresh(seq)
            raise
        assert pager._core.sessions[session_id].num_computed == new[1]
        world.sessions[session_id] = Saved([new], is_whole=True, active_seq=None if is_parked else seq)
        if is_parked:
            self._forget_sequence(seq)

    def resume(self) -> None:
        parked = sorted(
            name for name, s in self.world.sessions.items() if s.active_seq is None and None not in s.may_be
        )
        if parked and len(self.world.tokens) < MOST_SEQUENCES:
            self._resume(self.choose.choice(parked))

    def _resume(self, session_id: str) -> None:
        world, saved = self.world, self.world.sessions[session_id]
        if session_id not in world.pager.sessions():
            assert None in saved.may_be
            return
        namespace = world.pager._core.sessions[session_id].namespace
        seq, parked = world.pager.resume(session_id, namespace)
        found = (tuple(parked.token_ids), world.pager._core.sessions[session_id].num_computed, namespace)
        assert found in saved.may_be, f"session {session_id} resumed as {found}, wanted {saved.may_be}"
        if saved.is_whole and world.is_strict:
            assert parked.num_computed == found[1], f"session {session_id} lost tokens"
        saved.active_seq = seq
        self._know(seq, parked.token_ids, namespace)

    def forget(self) -> None:
        names = sorted(name for name in self.world.sessions if name in self.world.pager.sessions())
        if not names:
            return
        session_id = self.choose.choice(names)
        saved = self.world.sessions[session_id]
        saved.may_be.append(None)  # durable only with the next commit
        saved.is_whole = False
        self.world.pager.forget(session_id)
        if self.world.store is None:
            del self.world.sessions[session_id]

    def persist(self) -> None:
        seqs = [seq for seq in self._all_idle() if self.world.tokens[seq]][:2]
        if seqs:
            self.world.pager.persist(seqs, timeout_s=PATIENCE_S)

    # ------------------------------------------------------------------ reading without computing
    def read_blocks(self) -> None:
        seq = self._idle()
        if seq is None:
            return
        rig, pager = self.world.rig, self.world.pager
        group = self.choose.randrange(len(rig.layouts))
        wanted = values(self.world.tokens[seq])[: pager.num_computed(seq)]
        seen = 0
        try:
            for held in pager.read_blocks(seq, group, timeout_s=PATIENCE_S):
                found: list[str] = []
                for row, logical in zip(held.row_ids.tolist(), held.logical.tolist(), strict=True):
                    part = wanted[logical * BLOCK : (logical + 1) * BLOCK]
                    self._compare_row(held.rows, row, group, part, found, later=held.tier == "device")
                    seen += 1
                rig._counted.append(found)
                if self.choose.random() < 0.1:
                    break
        finally:
            if not self.world.disk.is_dead:
                self.world.refresh(seq)

    def _compare_row(self, rows, row: int, group: int, part: np.ndarray, found: list[str], *, later: bool) -> None:
        layout = self.world.rig.layouts[group]

        def kernel() -> None:
            block = rows[row].view(np.float32).reshape(layout.num_layers, 2, BLOCK, layout.head_dim)
            for layer in range(layout.num_layers):
                seen = block[layer].transpose(1, 0, 2)[: len(part)]
                compare(seen, part + layer, f"block read in place, layer {layer}", found)

        if later:
            self.world.rig.backend.compute.run(kernel)
        else:
            kernel()

    def read_host_block(self) -> None:
        seq = self._idle()
        if seq is None:
            return
        keys = self.world.pager.block_keys(seq, 0, len(self.world.tokens[seq]))
        for i, key in enumerate(keys[:4]):
            raw = self.world.pager.read_host_block(key)
            if raw is not None:
                found: list[str] = []
                part = values(self.world.tokens[seq])[i * BLOCK : (i + 1) * BLOCK]
                self._compare_row([np.frombuffer(raw, np.uint8)], 0, 0, part, found, later=False)
                assert not found, found

    def look(self) -> None:
        pager = self.world.pager
        pager.status()
        tokens = self._draw_tokens(3 * BLOCK)
        assert pager.match(tokens).tokens <= len(tokens)
        for seq in self._all_idle()[:1]:
            assert pager.residency(seq).tokens == pager.num_computed(seq)

    # ------------------------------------------------------------------ time, faults, ends of processes
    def let_copies_run(self) -> None:
        for _ in range(self.choose.randrange(1, 30)):
            self.world.rig.backend.run_one()
        self.world.pager.poll()

    def let_time_pass(self) -> None:
        self.world.clock.now_s += self.choose.choice([0.5, 2.0, 40.0])
        self.world.pager.poll()

    def fail_a_copy(self) -> None:
        where = self.choose.choice(["promote", "demote", "read", "write"])
        self.world.rig.backend.fail_next(where, OSError(5, "injected into a copy"))

    def rot(self) -> None:
        """A bit of some segment flips."""
        files = sorted((self.world.store / "blocks.zarr").rglob("c.*"))
        if files:
            with open(self.choose.choice(files), "r+b") as file:
                file.seek(0, 2)
                at = self.choose.randrange(file.tell())
                file.seek(at)
                byte = file.read(1)[0] ^ 1 << self.choose.randrange(8)
                file.seek(at)
                file.write(bytes([byte]))

    def abandon(self) -> None:
        self.world.pager.abandon_transfers()

    def restart(self) -> None:
        for step in list(self.open_steps):
            self._close(step, commits=True)
        self.world.restart()

    def crash(self) -> None:
        raise Killed

    def crash_soon(self) -> None:
        self.world.disk.kill_in = self.choose.randrange(1, 60)

    # ------------------------------------------------------------------ helpers
    def _draw_tokens(self, most: int) -> list[int]:
        """Few different tokens: prefixes are shared all the time."""
        return [self.choose.randrange(3) for _ in range(self.choose.randrange(1, most + 1))]

    def _all_idle(self) -> list[int]:
        leased = {seq for step in self.open_steps for seq, _ in step.work}
        idle = [seq for seq in self.world.tokens if seq not in leased]
        self.choose.shuffle(idle)
        return idle

    def _idle(self) -> int | None:
        idle = self._all_idle()
        return idle[0] if idle else None

    def _know(self, seq: int, tokens: list[int], namespace: str) -> None:
        self.world.tokens[seq], self.world.namespace[seq] = list(tokens), namespace
        self.world.refresh(seq)

    def _used(self, seq: int) -> None:
        """What is done to a session's sequence from now on may cost blocks that only its record names."""
        for saved in self.world.sessions.values():
            if saved.active_seq == seq:
                saved.is_whole = False

    def _append(self, seq: int, tokens: list[int]) -> None:
        self._used(seq)
        self.world.pager.append(seq, tokens)
        self.world.tokens[seq] += tokens

    def _is_computed(self, seq: int) -> bool:
        return self.world.pager.num_computed(seq) == len(self.world.tokens[seq])

    def _say(self, seq: int, tokens: list[int]) -> None:
        if len(self.world.tokens[seq]) + len(tokens) <= LONGEST:
            self._append(seq, tokens)
            self._compute(seq)

    def _compute(self, seq: int) -> None:
        """As an engine does: what is lost is computed again, what cannot be held now is left for later."""
        pager = self.world.pager
        for _ in range(MOST_ROUNDS):
            if pager.num_computed(seq) == len(self.world.tokens[seq]):
                return
            count = pager.plan_prefill(seq, BLOCK)
            self.world.refresh(seq)
            if not self._step([(seq, count)]):
                return
        raise AssertionError(f"sequence {seq} makes no progress")

    def _step(self, work: list[tuple[int, int]]) -> bool:
        """Whether the step was run; refusals are events."""
        self.world.trace.event("call", f"lease {work}")
        try:
            self.world.rig.step(work, timeout_s=PATIENCE_S)
        except REFUSALS as error:
            self.world.trace.event("call", f"refused: {type(error).__name__}")
            return False
        finally:
            if not self.world.disk.is_dead:
                for seq, _ in work:
                    self.world.refresh(seq)
        return True

    def _end(self, seq: int, *, released: bool) -> None:
        self._used(seq)
        (self.world.pager.release if released else self.world.pager.finish)(seq)
        self._forget_sequence(seq)

    def _forget_sequence(self, seq: int) -> None:
        for table in (self.world.tokens, self.world.computed, self.world.namespace):
            del table[seq]
        for saved in self.world.sessions.values():
            if saved.active_seq == seq:
                saved.active_seq = None

    def _must_raise(self, kind: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
        except kind:
            return
        raise AssertionError(f"not refused with {kind.__name__}")
