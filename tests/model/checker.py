"""Breadth-first search through every interleaving of a bounded model; the first violation comes with its shortest trace.

Also asks that from every state a quiet one can be reached: otherwise something leaked or waits for ever.
Run as a script: each rule taken out, then all rules.    python tests/model/checker.py [--deep]
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from model_actions import PageModel
from model_invariants import check, is_quiet
from model_state import Bound, State, Violation

from kvtier.pager.rules import ALL_RULES, Rule, Rules

_SINK = frozenset({"sink"})
BOUNDS = [
    Bound("one page", pages=1, versions=2, ops=3),
    Bound("two pages, one host slot", slots=1, versions=2, ops=2),
    Bound("writes to nvme, and a copy that fails", pages=1, slots=1, versions=2, ops=2, failures=1, actors=_SINK),
    Bound("a lost mover", pages=1, blocks=1, versions=2, ops=2, abandons=1, actors=_SINK),
    Bound("a client and a reader", pages=1, versions=1, ops=2, actors=frozenset({"client", "reader"})),
    Bound("streaming", pages=1, versions=1, ops=3, actors=frozenset({"ring"})),
]
DEEP_BOUNDS = [  # minutes
    Bound("two pages, two host slots", versions=2, ops=2),
    Bound("two pages, three in flight", versions=1, ops=3),
    Bound("a lost mover, two blocks", pages=1, slots=1, versions=2, ops=2, abandons=1, actors=_SINK),
    Bound("writes to nvme", pages=1, versions=2, ops=2, actors=_SINK),
    Bound("streaming, four in flight", pages=1, versions=1, ops=4, actors=frozenset({"ring"})),
]


@dataclass(frozen=True)
class Result:
    """`violation` is empty where nothing went wrong; `trace` leads to it in as few actions as there can be."""

    bound: str
    states: int
    transitions: int
    seconds: float
    violation: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = f"VIOLATION: {self.violation}" if self.violation else "no violation"
        lines = [f"{self.bound}: {self.states} states, {self.transitions} transitions, {self.seconds:.1f} s, {verdict}"]
        return "\n".join(lines + [f"  {i + 1:2} {action}" for i, action in enumerate(self.trace)])


class Search:
    """One breadth-first search."""

    def __init__(self, bound: Bound, rules: Rules = ALL_RULES) -> None:
        self._model, self._bound = PageModel(bound, rules), bound
        first = bound.first()
        self._number: dict[State, int] = {first: 0}
        self._parents: list[tuple[int, str]] = [(-1, "")]
        self._before: list[list[int]] = [[]]
        self._todo = deque([first])
        self._transitions = 0
        self._started_s = time.perf_counter()

    def run(self) -> Result:
        while self._todo:
            state = self._todo.popleft()
            number = self._number[state]
            try:
                for action, after in self._model.successors(state):
                    self._transitions += 1
                    self._meet(number, action, after)
            except Violation as violation:
                return self._result(str(violation), number)
        return self._find_dead_ends()

    def _meet(self, number: int, action: str, after: State) -> None:
        seen = self._number.get(after)
        if seen is None:
            seen = self._number[after] = len(self._parents)
            self._parents.append((number, action))
            self._before.append([])
            self._todo.append(after)
            try:
                check(after)
            except Violation as violation:
                raise Violation(f"{action}: {violation}") from None
        self._before[seen].append(number)

    def _find_dead_ends(self) -> Result:
        reaches = bytearray(len(self._parents))
        todo = [number for state, number in self._number.items() if is_quiet(state)]
        for number in todo:
            reaches[number] = 1
        while todo:
            for before in self._before[todo.pop()]:
                if not reaches[before]:
                    reaches[before] = 1
                    todo.append(before)
        if all(reaches):
            return self._result("", -1)
        return self._result("from here nothing comes to rest: a leak or a deadlock", reaches.index(0))

    def _result(self, violation: str, number: int) -> Result:
        trace = []
        while number > 0:
            number, action = self._parents[number]
            trace.append(action)
        seconds = time.perf_counter() - self._started_s
        name, states = self._bound.name, len(self._parents)
        return Result(name, states, self._transitions, seconds, violation, tuple(reversed(trace)))


def without(rule: Rule) -> Result:
    """What the first bound in which the model goes wrong without this rule finds; the last one where none does."""
    for bound in sorted(BOUNDS, key=lambda bound: bound.name != _ACTS_IN.get(rule, BOUNDS[0].name)):
        result = Search(bound, Rules.without(rule)).run()
        if result.violation:
            break
    return result


_ACTS_IN = {  # where to look first
    Rule.DROP_HALF_DONE: "a lost mover",
    Rule.OLD_EPOCH_CHANGES_NOTHING: "a lost mover",
    Rule.PINS_DIE_WITH_THE_PROCESS: "a client and a reader",
    Rule.READER_CHECKS_GENERATION: "a client and a reader",
    Rule.STAGING_RING_HAS_EVENTS: "streaming",
}


def main() -> int:
    is_good = True
    for rule in Rule:
        result = without(rule)
        print(f"without rule {rule.value} {rule.name}, {result}", flush=True)
        is_good &= bool(result.violation)
    for bound in (*BOUNDS, *(DEEP_BOUNDS if "--deep" in sys.argv else [])):
        result = Search(bound).run()
        print(f"all rules, {result}", flush=True)
        is_good &= not result.violation
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
