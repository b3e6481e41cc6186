"""Any order of calls, under any order of copies and with disks that fail: what is read is right, and the books agree."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvtier.tiers.errors import BlockMissError, Busy, TierUnavailableError

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=2 * BLOCK)  # few tokens: prefixes are shared all the time
LONGEST = 10 * BLOCK


class PagerMachine(RuleBasedStateMachine):
    """Sequences and sessions of one pager over all three tiers."""

    sequences, sessions = Bundle("sequences"), Bundle("sessions")

    @initialize(seed=st.integers(0, 1 << 16), pages=st.integers(6, 12), staging=st.integers(0, 2))
    def open(self, seed, pages, staging):
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-machine-"))
        settings = dict(path=self.folder / "store", nvme_bytes="1MiB", host=8, staging=staging)
        self.rig = Rig(seed, pages=pages, **settings)
        self.number = 0

    @rule(target=sequences, tokens=TOKENS)
    def begin(self, tokens):
        seq = self.rig.start(tokens)
        self.compute(seq)
        return seq

    @rule(target=sequences, seq=sequences)
    def fork(self, seq):
        return self.rig.pager.fork(seq) if self.knows(seq) else multiple()

    @rule(seq=sequences, tokens=TOKENS)
    def say(self, seq, tokens):
        if self.knows(seq) and self.rig.pager.num_tokens(seq) + len(tokens) <= LONGEST:
            self.rig.pager.append(seq, tokens)
            self.compute(seq)

    @rule(seq=sequences, share=st.floats(0, 1))
    def truncate(self, seq, share):
        if self.knows(seq):
            self.rig.pager.truncate(seq, int(share * self.rig.pager.num_tokens(seq)))

    @rule(seq=consumes(sequences), is_released=st.booleans())
    def end(self, seq, is_released):
        if self.knows(seq):
            (self.rig.pager.release if is_released else self.rig.pager.finish)(seq)

    @rule(seq=sequences, hint=st.sampled_from(["demote", "prefetch"]))
    def hint(self, seq, hint):
        if self.knows(seq):
            getattr(self.rig.pager, hint)(seq)

    @rule(target=sessions, seq=consumes(sequences))
    def park(self, seq):
        if not self.knows(seq) or self.rig.pager.num_tokens(seq) == 0:
            return multiple()
        self.number += 1
        try:
            self.rig.pager.park(f"s{self.number}", seq)
        except (Busy, TierUnavailableError):  # the disk failed or is full: the sequence is as it was
            assert self.knows(seq)
            self.rig.pager.finish(seq)
            return multiple()
        return f"s{self.number}"

    @rule(target=sequences, session=consumes(sessions))
    def resume(self, session):
        seq, _ = self.rig.pager.resume(session)
        return seq

    @rule(where=st.sampled_from(["promote", "demote", "read", "write"]))
    def fail(self, where):
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

    def knows(self, seq: int) -> bool:
        return seq in self.rig.pager._core.sequences

    def compute(self, seq: int) -> None:
        """As an engine does: what is lost is computed again, what cannot be held now is left for later."""
        pager = self.rig.pager
        for _ in range(200):
            left = pager.num_tokens(seq) - pager.num_computed(seq)
            if not left:
                return
            try:
                self.rig.step([(seq, pager.plan_prefill(seq, BLOCK))])
            except (Busy, BlockMissError, TierUnavailableError):
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
