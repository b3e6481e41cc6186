"""Known runs against the plain dictionary of the directory, while blocks come, go and change their names."""

from __future__ import annotations

import random

import numpy as np

from kvtier.pager import known_runs
from kvtier.pager.directory import Directory
from kvtier.pager.keys import KeyChain
from kvtier.pager.known_runs import RUN, KnownRuns
from kvtier.pager.states import NOWHERE, HostSlots, Pages


def chain_of(num_blocks: int) -> list[bytes]:
    keys: list[bytes] = []
    KeyChain("m", "n", b"", 1).extend(keys, range(num_blocks))
    return keys


def filled(keys: list[bytes]) -> tuple[Directory, np.ndarray]:
    directory = Directory(Pages(1), HostSlots(1))
    blocks = directory.create(np.arange(len(keys)), 1)
    directory.bind_many(blocks, keys, np.ones(len(keys), np.int64))
    return directory, blocks


def test_a_chain_is_found_from_any_block_on_and_its_whole_runs_are_remembered():
    keys = chain_of(3 * RUN + 5)
    directory, blocks = filled(keys)
    runs = KnownRuns(directory)
    for first, end in [
        (0, len(keys)),
        (0, len(keys)),
        (7, 2 * RUN),
        (RUN, RUN),
        (RUN + 1, len(keys)),
        (3 * RUN, len(keys)),
    ]:
        assert runs.find(keys, first, end).tolist() == blocks[first:end].tolist()
    assert len(runs) == 3


def test_what_is_remembered_takes_no_look_up_per_key():
    keys = chain_of(2 * RUN)
    directory, blocks = filled(keys)
    runs = KnownRuns(directory)
    runs.find(keys, 0, len(keys))
    directory.by_key.clear()
    assert runs.find(keys, 0, len(keys)).tolist() == blocks.tolist()


def test_a_block_that_got_another_name_is_not_taken_for_the_one_that_it_was():
    keys = chain_of(RUN)
    directory, blocks = filled(keys)
    runs = KnownRuns(directory)
    runs.find(keys, 0, RUN)
    directory.unbind(int(blocks[3]))
    assert directory.bind(int(blocks[3]), b"x" * 32, None, 1)  # the same block, never away
    found = runs.find(keys, 0, RUN)
    assert found[3] == NOWHERE and (np.delete(found, 3) == np.delete(blocks, 3)).all() and not len(runs)
    new = directory.create(np.array([3]), 1)
    assert directory.bind(int(new[0]), keys[3], None, 1)
    assert runs.find(keys, 0, RUN)[3] == new[0] and len(runs) == 1


def test_the_bound_forgets_the_oldest_runs(monkeypatch):
    monkeypatch.setattr(known_runs, "MAX_RUNS", 2)
    keys = chain_of(4 * RUN)
    directory, blocks = filled(keys)
    runs = KnownRuns(directory)
    for _ in range(2):
        assert runs.find(keys, 0, len(keys)).tolist() == blocks.tolist() and len(runs) == 2


def test_it_tells_what_the_directory_tells_whatever_happens_to_blocks(seed):
    pick = random.Random(seed)
    keys = chain_of(4 * RUN)
    directory, blocks = filled(keys)
    held = dict(enumerate(blocks.tolist()))
    runs = KnownRuns(directory)
    for _ in range(300):
        for _ in range(pick.choice((0, 0, 1, 3))):
            at = pick.randrange(len(keys))
            if at in held:
                directory.forget(np.array([held.pop(at)]))
            else:
                block = held[at] = int(directory.create(np.array([at]), 1)[0])
                assert directory.bind(block, keys[at], None, 1)
        first, end = sorted(pick.choices(range(len(keys) + 1), k=2))
        found, plain = runs.find(keys, first, end), directory.find(keys[first:end])
        missing = np.flatnonzero(plain < 0)
        known = int(missing[0]) if len(missing) else end - first
        assert found[:known].tolist() == plain[:known].tolist()
        assert (found[known:] == plain[known : len(found)]).all() and (len(found) >= known)
