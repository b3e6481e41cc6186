"""Moving a block to another slot takes nothing with it that came to the old one meanwhile, and relies on no refused sync."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest

from kvtier.tiers.errors import TierUnavailableError
from kvtier.tiers.nvme.calls import SystemCalls

from .test_nvme import CpuBackend, load, open_tier, store


class Gated(SystemCalls):
    """Syncs of segments wait for the gate, once it is shut; refused as often as `refused` says."""

    def __init__(self) -> None:
        self.gate, self.waits, self.refused = threading.Event(), threading.Event(), 0
        self.gate.set()

    def fdatasync(self, fd):
        if "/c." in os.readlink(f"/proc/self/fd/{fd}"):
            self.waits.set()
            assert self.gate.wait(60)
            if self.refused:
                self.refused -= 1
                raise OSError(errno.EIO, "refused")
        super().fdatasync(fd)


@pytest.fixture
def backend():
    backend = CpuBackend()
    yield backend
    backend.close(5)


def open_slowly(path, backend, calls):
    """Nothing is committed that nobody asks for."""
    tier = open_tier(path, backend, calls=calls)
    tier._committer.close()
    tier._committer = None
    return tier


def test_what_came_to_the_old_slot_meanwhile_stays_listed(tmp_path, backend):
    calls = Gated()
    tier = open_slowly(tmp_path / "s", backend, calls)
    slots, _ = store(tier, 2)
    tier.flush()
    target = tier.allocate(0, 1)
    calls.waits.clear()
    calls.gate.clear()
    ticket = tier.relocate(0, slots[:1], target)
    assert calls.waits.wait(60)
    tier.free(0, slots[:1])  # its sequence has gone on, and the slot is somebody else's
    assert slots[0] in tier.allocate(0, tier.free_slots(0))
    rows, stamps = np.full((1, tier._identity.layouts[0].block_bytes), 7, np.uint8), tier.stamps(0, slots[1:2]).copy()
    stamps["key"] = np.frombuffer(b"another" + bytes(25), "V32")
    written = tier.write(0, slots[:1], rows, np.arange(1), stamps)
    assert written.event.wait(60) and written.ok.all()
    calls.gate.set()
    assert ticket.event.wait(60) and not ticket.ok.any()
    assert tier.is_listed(0, slots[:1]).all() and not tier.is_listed(0, target).any()
    tier.flush()
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    ok, seen = load(again, slots[:1])
    assert ok.all() and (seen == rows).all()
    again.close()


def test_a_block_is_not_moved_to_where_anothers_commit_was_refused(tmp_path, backend):
    calls = Gated()
    tier = open_slowly(tmp_path / "s", backend, calls)
    slots, rows = store(tier, 2)
    tier.flush()
    commit, others = tier._listing.commit, []

    def behind_another():
        if not others:
            others.append(1)
            calls.refused = 1
            with pytest.raises(TierUnavailableError):
                commit()
        commit()

    tier._listing.commit = behind_another
    ticket = tier.relocate(0, slots, tier.allocate(0, 2))
    assert ticket.event.wait(60) and not ticket.ok.any() and not ticket.unreadable.any()
    tier._listing.commit = commit
    tier.close()
    again = open_tier(tmp_path / "s", backend)
    ok, seen = load(again, slots)
    assert ok.all() and np.array_equal(seen, rows)
    again.close()
