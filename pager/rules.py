"""The twelve rules of moving blocks, by number, and the hook with which a test takes one out.

Each rule stops one bug that was seen in a real system. The code asks `rules.holds(Rule.X)` at the one place where the
rule acts; production always holds all of them. The tests build a pager without one rule, run it under the seeded
scheduler and must see wrong bytes, a leak, or an illegal step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Rule(IntEnum):
    """Numbers are those of ARCHITECTURE.md."""

    PUBLISH_AFTER_COPY_IN = 1  # a page enters a block table only after its copy-in event
    COPY_IN_WAITS_READERS = 2  # a copy-in waits for the last reader of that page
    COPY_OUT_WAITS_WRITER = 3  # a copy-out waits for the last writer of that page
    WRITTEN_DURING_COPY_OUT_IS_DIRTY = 4  # version compared at completion; an append waits for the copy-out
    COPY_IN_FLIGHT_IS_NOT_FREE = 5  # a page with a copy in flight is never FREE
    NO_EVICTION_OF_PINNED_OR_DIRTY = 6
    HOST_SLOT_HELD_WHILE_READ = 7  # and VALID only after its copy-out event
    DROP_HALF_DONE = 8  # mover gone: FILLING -> FREE after the drain, half-written slots dropped
    OLD_EPOCH_CHANGES_NOTHING = 9
    PINS_DIE_WITH_THE_PROCESS = 10  # pidfd, not socket EOF
    READER_CHECKS_GENERATION = 11  # after its copy
    STAGING_RING_HAS_EVENTS = 12  # reused staging buffers are a ring with an event each


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rules hold. `Rules.without(Rule.X)` is for tests only."""

    broken: frozenset[Rule] = frozenset()

    @classmethod
    def without(cls, *rules: Rule) -> Rules:
        return cls(frozenset(rules))

    def holds(self, rule: Rule) -> bool:
        return rule not in self.broken


ALL_RULES = Rules()
