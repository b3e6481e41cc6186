"""Rules 1, 3 and 4 where the daemon copies and the client computes; without the guard the test fails."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.pager.client.ordered import Lane, OrderedStream
from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.states import PageState
from kvtier.tiers.cpu import HostEvent
from kvtier.tiers.errors import Busy

from .gated import TOKENS, Gate, ordering_rig, serving, stored, write_tail_back
from .ordering import Ordering
from .running import wait_for


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_is_not_attended_before_its_copy_in_is_answered(tmp_path, broken):
    """(d), rule 1."""
    rules = Rules.without(Rule.PUBLISH_AFTER_COPY_IN) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        stored(daemon)
        rig = ordering_rig(daemon.address, rules=rules)
        gate = Gate(daemon, "promote")
        seq = rig.start(TOKENS)
        if broken:
            rig.prefill(seq)
        else:
            with pytest.raises(Busy):
                rig.step([(seq, 1)], timeout_s=0.05)
        gate.open()
        rig.prefill(seq)
        assert bool(rig.wrong) == broken
        rig.settle()
        rig.pager.close()


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_written_during_its_copy_out_is_dirty_again(tmp_path, broken):
    """(d), rule 4: the daemon has read the page and not answered yet when the next token wants to be written there."""
    rules = Rules.without(Rule.WRITTEN_DURING_COPY_OUT_IS_DIRTY) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        rig = ordering_rig(daemon.address, rules=rules)
        core = rig.pager._core
        seq = rig.start(TOKENS[:6])
        rig.prefill(seq)
        rig.settle()
        demote = daemon.store.core.backend.demote
        gate, record = threading.Event(), demote.record
        demote.record = lambda: (demote.run(lambda: gate.wait(60)), record())[1]  # between the copy and its answer
        tail = write_tail_back(rig, seq)
        wait_for(lambda: daemon.service.copies.num_orders > 0 and demote._workers._queue.qsize() == 1)
        opener = None
        if not broken:  # the append waits for the answer
            opener = threading.Thread(target=gate.set)
            threading.Timer(0.05, opener.start).start()
        rig.say(seq, [7])
        gate.set()
        group = core.groups[0]
        wait_for(lambda: group.pages.copies[tail] == 0 or rig.pager.poll())
        with core.locked():
            if group.pages.state[tail] == PageState.RESIDENT:  # clean, so it may go
                group.evict(group.pages.block[[tail]], "test")
        rig.say(seq, [8])
        assert bool(rig.wrong) == broken
        demote.record = record
        rig.settle()
        rig.close()


@pytest.mark.parametrize("waits", [True, False])
def test_an_order_leaves_only_behind_what_writes_its_page(tmp_path, waits):
    """(e), rule 3: the event of the page's last writer is over before the daemon hears of the copy."""
    with serving(tmp_path) as daemon:
        client, written = Ordering(daemon.address), HostEvent()
        lane = Lane("demote", lambda: None)
        lane.orders = client.orders
        stream = OrderedStream(lane, 0, client.pool.rows, client.backend.demote)
        (row,), slab = client.attachment.reserve(0, 1, 60.0)[0], client.attachment.rows[0]
        client.pool.rows[2] = 1
        if waits:
            stream.wait(written)
        stream.copy_rows(slab, np.array([row]), client.pool.rows, np.array([2]))
        event = stream.record()
        if not waits:
            assert event.wait(60)
        client.pool.rows[2] = 2
        written.finish()
        assert event.wait(60) and event.error is None
        assert (slab[row] == (2 if waits else 1)).all()
        lane.close(5.0)
        client.close()
