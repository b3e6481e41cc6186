"""Each of the twelve rules: with it no seed reads a wrong byte, without it some seed does (or a check fires)."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.clients import Clients
from kvtier.pager.lease import Span
from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.tiers.errors import InvariantError, TierFullError

sys.path.insert(0, str(Path(__file__).parent))
from harness import LAYOUT, WINDOWED, Rig

SEEDS = range(12)


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1000) for _ in range(n)]


def swapping(seed: int, rules: Rules) -> Rig:
    """Three sequences on a device that holds one and a half: every turn swaps blocks both ways."""
    rig, rng = Rig(seed, pages=10, host=40, rules=rules), random.Random(seed)
    seqs = [rig.start(tokens(rng, 18)) for _ in range(3)]
    for turn in range(4):
        for seq in seqs:
            if turn == 0:
                rig.prefill(seq)
            else:
                rig.say(seq, tokens(rng, 3))
    return rig


def appending_while_written_back(seed: int, rules: Rules) -> Rig:
    """A sequence is demoted and goes on at once: its tail is appended to during its copy-out."""
    rig, rng = Rig(seed, pages=12, host=40, rules=rules), random.Random(seed)
    seq, other = rig.start(tokens(rng, 9)), rig.start(tokens(rng, 24))
    rig.prefill(seq)
    for _ in range(4):
        rig.pager.demote(seq)
        rig.say(seq, tokens(rng, 1))
        rig.prefill(other)
        rig.say(other, tokens(rng, 5))
    return rig


def dropping_while_written_back(seed: int, rules: Rules) -> Rig:
    """Sequences end while their unnamed tails are being copied out; others take the pages at once."""
    rig, rng = Rig(seed, pages=8, host=40, rules=rules), random.Random(seed)
    for _ in range(6):
        seq = rig.start(tokens(rng, 7))
        rig.prefill(seq)
        rig.pager.demote(seq)
        rig.pager.release(seq)
        other = rig.start(tokens(rng, 14))
        rig.prefill(other)
        rig.say(other, tokens(rng, 3))
        rig.pager.release(other)
        rig.pager.check_integrity()
    return rig


def three_tiers(seed: int, rules: Rules) -> Rig:
    """A host tier so small that every slot is taken again at once, with nvme below it."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as path:
        rig = Rig(seed, pages=8, host=5, path=Path(path) / "store", rules=rules)
        seqs = [rig.start(tokens(rng, 18)) for _ in range(3)]
        for _ in range(3):
            for seq in seqs:
                rig.prefill(seq)
                rig.say(seq, tokens(rng, 2))
        rig.settle()
    return rig


def streaming(seed: int, rules: Rules) -> Rig:
    """One sequence three times the size of the device tier."""
    rig, rng = Rig(seed, pages=6, host=60, staging=1, rules=rules), random.Random(seed)
    seq = rig.start(tokens(rng, 72))
    rig.prefill(seq)
    rig.say(seq, tokens(rng, 2))
    return rig


def abandoning(seed: int, rules: Rules) -> Rig:
    """The mover is lost in mid-copy, and its completions come in late."""
    rig, rng = Rig(seed, pages=10, host=40, rules=rules), random.Random(seed)
    seqs = [rig.start(tokens(rng, 18)) for _ in range(2)]
    for seq in seqs:
        rig.prefill(seq)
    rig.pager.demote(seqs[0])
    late = [move for group in rig.pager._core.groups for move in group.moves]
    assert late
    rig.pager.abandon_transfers()
    for seq in seqs:
        rig.say(seq, tokens(rng, 2))
    for move in late:
        rig.pager._core.groups[0].finish(move)
    for seq in seqs:
        rig.say(seq, tokens(rng, 2))
    return rig


SCENARIOS: dict[Rule, Callable[[int, Rules], Rig]] = {
    Rule.PUBLISH_AFTER_COPY_IN: swapping,
    Rule.COPY_IN_WAITS_READERS: swapping,
    Rule.COPY_OUT_WAITS_WRITER: swapping,
    Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY: appending_while_written_back,
    Rule.COPY_IN_FLIGHT_IS_NOT_FREE: dropping_while_written_back,
    Rule.NO_EVICTION_OF_PINNED_OR_DIRTY: swapping,
    Rule.HOST_SLOT_HELD_WHILE_READ: three_tiers,
    Rule.DROP_HALF_DONE: abandoning,
    Rule.OLD_EPOCH_CHANGES_NOTHING: abandoning,
    Rule.STAGING_RING_HAS_EVENTS: streaming,
}


def violations(scenario: Callable[[int, Rules], Rig], rules: Rules) -> list[str]:
    """What goes wrong over all seeds: wrong or lost bytes, contradictions in the books, work that can never finish."""
    found = []
    for seed in SEEDS:
        try:
            rig = scenario(seed, rules)
            rig.settle()
            rig.pager.check_integrity()
            found += [f"seed {seed}: {wrong}" for wrong in rig.wrong[:1]]
            if rig.pager.counters.get("lost_tokens"):
                found.append(f"seed {seed}: blocks that somebody refers to were lost")
        except (InvariantError, TierFullError, IndexError) as error:
            found.append(f"seed {seed}: {error}")
    return found


@pytest.mark.parametrize("rule", list(SCENARIOS), ids=lambda rule: rule.name)
def test_with_every_rule_nothing_goes_wrong(rule: Rule):
    assert violations(SCENARIOS[rule], ALL_RULES) == []


@pytest.mark.parametrize("rule", list(SCENARIOS), ids=lambda rule: rule.name)
def test_without_the_rule_something_goes_wrong(rule: Rule):
    assert violations(SCENARIOS[rule], Rules.without(rule))


def test_a_pinned_page_is_never_a_victim():
    rig = Rig(0, pages=8, host=40)
    seq = rig.start(tokens(random.Random(0), 20))
    rig.prefill(seq)
    rig.pager.demote(seq)
    rig.settle()
    rig.pager.append(seq, [1])
    with rig.pager.lease([Span(seq, 20, 21)]):
        group = rig.pager._core.groups[0]
        assert group.take_pages(3) is None and group.leaving.clean_pages() == 0
        with pytest.raises(InvariantError, match="1 pins"):
            group.evict(group.pages.block[group.pages.pins > 0][:1], "test")


@pytest.mark.parametrize("broken", [False, True])
def test_pins_die_with_the_process_and_not_with_its_socket(broken: bool):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    clients = Clients(Rules.without(Rule.PINS_DIE_WITH_THE_PROCESS) if broken else ALL_RULES)
    released: list[str] = []
    client = clients.attach(process.pid)
    clients.hold(client, lambda: released.append("pin"))
    clients.disconnected(client)  # end of file came first, as it does
    clients.reap()
    assert released == (["pin"] if broken else [])
    process.kill()
    process.wait()
    clients.reap()
    assert released == ["pin"] and len(clients) == 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_reader_checks_the_generation_after_its_copy(broken: bool):
    """Read a host block without a pin while its slot is given to another block."""
    seen = []
    for seed in range(30):
        rules = Rules.without(Rule.READER_CHECKS_GENERATION) if broken else ALL_RULES
        rig, rng = Rig(seed, pages=8, host=4, rules=rules), random.Random(seed)
        seq = rig.start(tokens(rng, 16))
        rig.prefill(seq)
        rig.pager.demote(seq)
        rig.settle()
        core, group = rig.pager._core, rig.pager._core.groups[0]
        key = core.sequences[seq].keys[0]
        block = group.directory.by_key[key]
        slot = int(group.directory.host_slot[block])
        whole = group.slab.rows[slot].tobytes()
        rig.pager.release(seq)

        def reuse(group=group, slot=slot) -> None:  # what the pager does when it needs the slot
            if group.host.state[slot] == 2:
                group.take_host_slots(len(group.host))
                group.slab.rows[slot] = 0xEE

        rig.backend.write_io.submit(reuse)
        got = rig.pager.read_host_block(key)
        seen.append(got is None or got == whole)
    assert all(seen) != broken


def test_windowed_and_full_groups_together():
    for seed in SEEDS:
        rig, rng = Rig(seed, pages=14, host=80, layouts=[LAYOUT, WINDOWED]), random.Random(seed)
        seqs = [rig.start(tokens(rng, 21)) for _ in range(3)]
        for _ in range(3):
            for seq in seqs:
                rig.prefill(seq, chunk=5)
                rig.say(seq, tokens(rng, 4), chunk=5)
        rig.settle()
        rig.pager.check_integrity()
        assert rig.wrong == []
        table = rig.pager._core.sequences[seqs[0]].tables[1].ids
        assert (table[: len(table) - 4] == -1).all() and np.isin(-1, table)  # what the window cannot see is not held


class Forgetful(list):
    """Never knows of an event."""

    def __getitem__(self, index):
        return None


@pytest.mark.parametrize("forgets", [False, True])
def test_bounce_rows_are_read_into_again_only_after_the_copy_out_of_them(tmp_path, forgets):
    """Nine tenths of the context on nvme: more chunks than bounce rows, with copies as late as the seed wants."""
    wrong = []
    for seed in range(6):
        rig, rng = (
            Rig(seed, pages=6, host=3, staging=1, path=tmp_path / f"{seed}", nvme_bytes=1 << 20),
            random.Random(seed),
        )
        (ring,) = rig.pager._core.rings
        assert ring.num_bounce_slots == 3
        if forgets:
            ring.emptied = Forgetful(ring.emptied)
        seq = rig.start(tokens(rng, 72))
        rig.prefill(seq)
        rig.say(seq, tokens(rng, 4))
        rig.settle()
        wrong += rig.wrong
        rig.pager.close()
    assert bool(wrong) == forgets, wrong[:3]


@pytest.mark.parametrize("slots", [1, 2])
def test_no_bounce_rows_are_read_into_while_a_chunk_waits_to_be_copied_out(tmp_path, slots):
    for seed in range(3):
        rig = Rig(seed, pages=6, host=3, staging=1, path=tmp_path / f"{seed}", nvme_bytes=1 << 20)
        rig.pager._core.rings[0].num_bounce_slots = slots  # fewer than chunks that could be begun
        seq = rig.start(tokens(random.Random(seed), 72))
        rig.prefill(seq)
        rig.settle()
        assert rig.wrong == []
        rig.pager.close()
