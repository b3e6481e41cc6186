"""Any order of calls, under any order of copies and with disks that fail: what is read is right, the books agree, and
tokens, computed counts and sessions are those of a model of plain dictionaries, also after a restart.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvtier.tiers.errors import BlockMissError, Busy, TierUnavailableError

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, PACKABLE, ROUNDED, Rig

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=2 * BLOCK)  # few tokens: prefixes are shared all the time
LONGEST = 10 * BLOCK


class PagerMachine(RuleBasedStateMachine):
    """Sequences and sessions of one pager over all three tiers."""

    sequences, sessions = Bundle("sequences"), Bundle("sessions")
    formats: ClassVar[dict] = {}
    scale = 1  # tokens for each that is drawn
    has_failed = False  # then blocks may be lost, and never read wrong

    @initialize(seed=st.integers(0, 1 << 16), pages=st.integers(6, 12), staging=st.integers(0, 2))
    def open(self, seed, pages, staging):
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-machine-"))
        self.seed, self.number = seed, 0
        self.settings = dict(path=self.folder / "store", nvme_bytes="1MiB", host=8, staging=staging, pages=pages)
        self.settings |= self.formats
        self.rig = Rig(seed, **self.settings)
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.parked: dict[str, tuple[list[int], int]] = {}  # token ids and computed ones, as acknowledged

    @rule(target=sequences, tokens=TOKENS)
    def begin(self, tokens):
        tokens = tokens * self.scale
        seq = self.rig.start(tokens)
        self.know(seq, tokens)
        self.compute(seq)
        return seq

    @rule(target=sequences, seq=sequences)
    def fork(self, seq):
        if not self.knows(seq):
            return multiple()
        child = self.rig.pager.fork(seq)
        self.know(child, self.tokens[seq])
        assert self.computed[child] == self.computed[seq]
        return child

    @rule(seq=sequences, tokens=TOKENS)
    def say(self, seq, tokens):
        tokens = tokens * self.scale
        if self.knows(seq) and self.rig.pager.num_tokens(seq) + len(tokens) <= LONGEST * self.scale:
            self.rig.pager.append(seq, tokens)
            self.tokens[seq] += tokens
            self.compute(seq)

    @rule(seq=sequences, share=st.floats(0, 1))
    def truncate(self, seq, share):
        if self.knows(seq):
            count = int(share * len(self.tokens[seq]))
            left = self.rig.pager.truncate(seq, count)
            assert left == min(count, self.computed[seq])
            self.know(seq, self.tokens[seq][:count])

    @rule(seq=consumes(sequences), is_released=st.booleans())
    def end(self, seq, is_released):
        if self.knows(seq):
            (self.rig.pager.release if is_released else self.rig.pager.finish)(seq)
            del self.tokens[seq], self.computed[seq]

    @rule(seq=sequences, hint=st.sampled_from(["demote", "prefetch"]))
    def hint(self, seq, hint):
        if self.knows(seq):
            getattr(self.rig.pager, hint)(seq)

    @rule(target=sessions, seq=consumes(sequences))
    def park(self, seq):
        if not self.knows(seq) or self.rig.pager.num_tokens(seq) == 0:
            return multiple()
        self.number += 1
        name, said = f"s{self.number}", (list(self.tokens[seq]), self.computed[seq])
        try:
            self.rig.pager.park(name, seq)
        except (Busy, TierUnavailableError):  # the disk failed or is full: the sequence is as it was
            assert self.knows(seq)
            return multiple()
        self.parked[name] = said
        del self.tokens[seq], self.computed[seq]
        return name

    @rule(target=sequences, session=consumes(sessions), forgets=st.booleans())
    def resume(self, session, forgets):
        tokens, computed = self.parked.pop(session)
        seq, parked = self.rig.pager.resume(session)
        assert parked.token_ids == tokens and parked.num_computed <= computed
        assert parked.num_computed == computed or self.has_failed
        self.know(seq, tokens)
        if forgets:
            self.rig.pager.forget(session)
        return seq

    @rule()
    def restart(self):
        """Sequences end with their process; parked sessions are all there, with all their tokens."""
        self.rig.close()
        self.seed += 1
        self.rig = Rig(self.seed, **self.settings)
        self.tokens, self.computed = {}, {}
        known = self.rig.pager.sessions()
        for name, (tokens, computed) in self.parked.items():
            assert (known[name]["tokens"], known[name]["computed_tokens"]) == (len(tokens), computed)

    @rule(where=st.sampled_from(["promote", "demote", "read", "write"]))
    def fail(self, where):
        self.has_failed = True
        self.rig.backend.fail_next(where, OSError(5, "the disk or a copy failed"))

    @rule(steps=st.integers(1, 40))
    def let_copies_run(self, steps):
        for _ in range(steps):
            self.rig.backend.run_one()
        self.rig.pager.poll()

    @invariant()
    def books_agree_and_reads_were_right(self):
        if hasattr(self, "rig"):
            self.rig.pager.check_integrity()
            assert self.rig.wrong == []
            for seq, tokens in self.tokens.items():
                assert self.rig.pager.token_ids(seq) == tokens
                have = self.rig.pager.num_computed(seq)
                assert have == self.computed[seq] or (self.has_failed and have < self.computed[seq])

    def know(self, seq: int, tokens: list[int]) -> None:
        self.tokens[seq], self.computed[seq] = list(tokens), self.rig.pager.num_computed(seq)

    def knows(self, seq: int) -> bool:
        is_known = seq in self.tokens  # ids start again with a process
        assert is_known == (seq in self.rig.pager._core.sequences)
        return is_known

    def compute(self, seq: int) -> None:
        """As an engine does: what is lost is computed again, what cannot be held now is left for later."""
        pager = self.rig.pager
        for _ in range(200):
            self.computed[seq] = pager.num_computed(seq)
            if self.computed[seq] == len(self.tokens[seq]):
                return
            try:
                self.rig.step([(seq, pager.plan_prefill(seq, BLOCK * self.scale))])
            except (Busy, BlockMissError, TierUnavailableError):
                self.computed[seq] = pager.num_computed(seq)
                return
        raise AssertionError(f"sequence {seq} makes no progress")

    def teardown(self):
        if hasattr(self, "rig"):
            self.rig.settle()
            self.rig.pager.check_integrity()
            assert self.rig.wrong == []
            self.rig.pager.close()
            shutil.rmtree(self.folder)


PagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPagerMachine = PagerMachine.TestCase


class PackedMachine(PagerMachine):
    """The same with blocks in 8 bits in host slots and in 4 bits on disk, and tails in full precision beside them."""

    formats: ClassVar[dict] = dict(layouts=[PACKABLE], host_format="int8", nvme="int4", error=ROUNDED)
    scale = PACKABLE.block_size // BLOCK


PackedMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPackedMachine = PackedMachine.TestCase
