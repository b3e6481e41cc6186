"""A sync that was refused is never taken back by the next one that succeeds: what is called durable is found again."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest

from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.nvme.calls import SystemCalls

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

TOKENS = list(range(100, 142))  # ten blocks and a tail


class RefusedOnce(SystemCalls):
    """The next sync of a segment fails, `times` of them."""

    def __init__(self) -> None:
        self.times, self.refused = 0, threading.Event()

    def fdatasync(self, fd):
        if self.times and "/c." in os.readlink(f"/proc/self/fd/{fd}"):
            self.times -= 1
            self.refused.set()
            raise OSError(errno.EIO, "refused")
        super().fdatasync(fd)


@pytest.fixture
def calls():
    return RefusedOnce()


def open_rig(path, calls=None, **options) -> Rig:
    options = {"pages": 40, "host": 24} | options
    return Rig(path=path, backend=CpuBackend(), calls=calls, **options)


def stop_committing(rig: Rig) -> None:
    """Nothing is committed that nobody asks for."""
    tier = rig.pager._core.nvme
    tier._committer.close()
    tier._committer = None


def found_again(path) -> int:
    rig = open_rig(path)
    seq = rig.pager.begin()
    tokens = rig.pager.attach(seq, TOKENS, with_tail=True).tokens
    rig.pager.append(seq, [*TOKENS[tokens:], 1])
    rig.prefill(seq)
    assert not rig.wrong
    rig.close()
    return tokens


@pytest.mark.parametrize("by", ["the caller", "the committer"])
@pytest.mark.parametrize("where", ["in the device tier", "on the disk alone"])
def test_what_was_persisted_after_a_refused_sync_is_there(tmp_path, calls, by, where):
    rig = open_rig(tmp_path / "s", calls)
    if by == "the caller":
        stop_committing(rig)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    calls.times = 1
    if by == "the caller":
        with pytest.raises(TierUnavailableError):
            rig.pager.persist([seq])
    else:
        rig.pager.demote(seq)
        rig.pager.make_clean(seq)
        core = rig.pager._core
        with core.locked():
            for group in core.groups:
                core.write_back_blocks(group, group.directory.live(), "park")
        rig.settle()
        with core.locked():
            for group in core.groups:
                core.sink_blocks(group, group.directory.live(), "park")
        assert calls.refused.wait(60)
        rig.settle()
    if where == "on the disk alone":
        core = rig.pager._core
        rig.settle()
        with core.locked():
            for group in core.groups:
                d = group.directory
                resident = d.live()[d.nvme_valid[d.live()]]
                group.leave_host(resident[d.in_host(resident)])
                group.evict(resident[d.in_device(resident)], "test")
    rig.pager.persist([seq])
    rig.pager.check_integrity()
    rig.pager.finish(seq)
    rig.close()
    assert found_again(tmp_path / "s") == len(TOKENS)


def test_a_session_parked_while_anothers_commit_is_refused_is_there(tmp_path, calls):
    rig = open_rig(tmp_path / "s", calls)
    stop_committing(rig)
    tier = rig.pager._core.nvme
    flush, others = tier.flush, []

    def flush_behind_another(timeout_s=None, blocks=()):
        if not others:
            others.append(1)
            calls.times = 1
            with pytest.raises(TierUnavailableError):
                flush(timeout_s)
        flush(timeout_s)

    tier.flush = flush_behind_another
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    rig.pager.park("a", seq)
    assert others and not calls.times
    rig.close()
    rig = open_rig(tmp_path / "s")
    seq, parked = rig.pager.resume("a")
    assert parked.num_computed == len(TOKENS)
    rig.say(seq, [1])
    assert rig.pager.counters.get("computed_tokens") == 1 and not rig.wrong
    rig.close()


def test_a_disk_that_never_syncs_promises_nothing(tmp_path, calls):
    rig = open_rig(tmp_path / "s", calls)
    stop_committing(rig)
    seq = rig.start(TOKENS)
    rig.prefill(seq)
    calls.times = 1000
    for _ in range(4):
        with pytest.raises(TierUnavailableError):
            rig.pager.persist([seq])
    calls.times = 0
    rig.pager.persist([seq])
    rig.close()
    assert found_again(tmp_path / "s") >= len(TOKENS) // BLOCK * BLOCK
