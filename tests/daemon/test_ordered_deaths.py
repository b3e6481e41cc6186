"""Copies that a daemon makes for a client, and one of the two dies, says goodbye, or the socket between them breaks. Taking the
guard out makes the test fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.states import PageState
from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import Busy, TierUnavailableError

from .gated import TOKENS, Gate, break_sockets, copies_of, ordering_rig, serving, stored, write_tail_back
from .ordering import Ordering, Told
from .raw import SIZE, attach, put
from .running import Pagerd, wait_for

DYING = """
import sys
sys.path.insert(0, {tests!r})
from daemon.ordering import Ordering
client = Ordering({address!r})
client.pool.rows[3] = 7
rows, _ = client.attachment.reserve(0, 1, 60.0)
client.order([3], rows, is_write_back=True)
print("ordered", rows[0], flush=True)
input()
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_dead_clients_slots_wait_for_the_copies_that_it_ordered(tmp_path, broken):
    """(a), rules 7 and 8: its process is gone, its memory and its slots are not, until the copy is over."""
    rules = Rules.without(Rule.DROP_HALF_DONE) if broken else ALL_RULES
    with serving(tmp_path, rules=rules) as daemon:
        keeper = attach(daemon.address)  # so that there is a store
        gate = Gate(daemon, "demote")
        code = DYING.format(tests=str(Path(__file__).resolve().parents[1]), address=daemon.address)
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said, slot = process.stdout.readline().split()
        assert said == "ordered"
        wait_for(lambda: daemon.service.copies.num_orders == 1)
        process.kill()
        process.wait()
        wait_for(lambda: len(daemon.service.processes) == 1)  # the keeper
        wait_for(lambda: len(daemon.service.attachments.ending) == (0 if broken else 1))
        wait_for(lambda: daemon.store.pinned_slots() == (0 if broken else 1))
        gate.open()
        wait_for(lambda: not daemon.service.copies.num_orders and not daemon.store.pinned_slots())
        assert not daemon.service.attachments.ending
        assert (keeper.rows[0][int(slot)] == 7).all()  # what the dead client's page held: its memory was still there
        if not broken:
            daemon.store.check_integrity()
        keeper.goodbye()


@pytest.mark.parametrize("broken", [False, True])
def test_a_page_in_doubt_is_not_used_while_the_daemon_lives(tmp_path, broken):
    """(c), rule 5: the socket breaks in the middle of a copy-in, and the daemon writes into the page later all the same."""
    rules = Rules.without(Rule.COPY_IN_FLIGHT_IS_NOT_FREE) if broken else ALL_RULES
    with serving(tmp_path) as daemon:
        stored(daemon)
        rig = ordering_rig(daemon.address, rules=rules)
        gate = Gate(daemon, "promote")
        seq, pages = rig.start(TOKENS), rig.pager._core.groups[0].pages
        while not (pages.state == PageState.FILLING).any():
            with pytest.raises(Busy):
                rig.step([(seq, 1)], timeout_s=0.05)
        filling = np.flatnonzero(pages.state == PageState.FILLING)
        wait_for(lambda: daemon.service.copies.num_orders > 0)
        break_sockets(daemon)
        if broken:
            wait_for(lambda: not (pages.state == PageState.FILLING).any())
        else:
            wait_for(lambda: copies_of(rig)["copies_in_doubt"] > 0 and copies_of(rig)["copies"] == "client")
            assert (pages.state[filling] == PageState.FILLING).all()
        rig.pager.release(seq)
        other = rig.start(list(range(500, 540)))
        rig.prefill(other)
        gate.open()
        wait_for(lambda: not daemon.service.copies.num_orders)
        wait_for(lambda: copies_of(rig)["copies_in_doubt"] == 0)
        rig.say(other, [7])  # reads all of it again
        rig.settle()
        assert bool(rig.wrong) == broken
        if not broken:
            wait_for(lambda: copies_of(rig)["copies"] == "daemon")  # attached again
            rig.pager.check_integrity()
            again = rig.start(TOKENS)
            rig.prefill(again)
            assert not rig.wrong
        rig.close()


def test_pages_in_doubt_come_back_when_the_daemon_is_killed(tmp_path):
    """(b): its socket ends before it does; pages wait for its pidfd, then their content counts as unknown."""
    with Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault", "--allow-ipc")) as daemon:
        rig = ordering_rig(daemon.address)
        orders = rig.pager._core.nvme.copies._orders
        os.kill(daemon.process.pid, 19)  # SIGSTOP: in the middle of whatever was asked of it
        told = Told()
        orders.copy(0, np.array([31]), np.array([0]), is_write_back=False, order=told)
        rig.pager._core.nvme.attachment.connection._transport.shut()
        wait_for(lambda: orders.num_in_doubt == 1)
        assert told.doubts == 1 and not told.event.is_done()
        daemon.kill()
        assert told.event.wait(60) and isinstance(told.event.error, TierUnavailableError)
        rig.prefill(rig.start(TOKENS))  # goes on by itself
        daemon.start()
        wait_for(lambda: copies_of(rig)["copies"] == "daemon")
        rig.settle()
        assert not rig.wrong
        rig.close()


def test_a_copy_out_in_doubt_leaves_its_page_to_its_writer(tmp_path):
    """Nothing will be read from its slot, so an append need not wait for a daemon that may take for ever to say so."""
    with serving(tmp_path) as daemon:
        rig = ordering_rig(daemon.address)
        group = rig.pager._core.groups[0]
        seq = rig.start(TOKENS[:6])
        rig.prefill(seq)
        rig.settle()
        gate = Gate(daemon, "demote")
        tail = write_tail_back(rig, seq)
        wait_for(lambda: daemon.service.copies.num_orders > 0)
        break_sockets(daemon)
        wait_for(lambda: copies_of(rig)["copies_in_doubt"] > 0)
        rig.say(seq, [7])  # into the page that the daemon may still read
        assert group.pages.state[tail] == PageState.WRITING_BACK and group.host.num_free < len(group.host)
        gate.open()
        wait_for(lambda: group.pages.state[tail] != PageState.WRITING_BACK)
        rig.say(seq, [8])
        rig.settle()
        rig.pager.check_integrity()
        assert not rig.wrong
        rig.close()


def test_goodbye_waits_for_the_copies_that_were_ordered(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased, gate = put(client.attachment, [1], keep=True), Gate(daemon, "promote")
        told = client.order([0], leased, is_write_back=False)
        bye = client.attachment.connection.begin(m.Goodbye(client.attachment.epoch), m.Bye)
        client.say(m.FindModel("nobody's"), m.ModelFound)  # served behind it
        assert not bye.is_over and daemon.store.pinned_slots() == 1
        gate.open()
        bye.result(60)
        assert told.event.wait(60) and told.event.error is None
        assert not daemon.store.pinned_slots()
        client.orders.close()
        client.attachment.connection.close()
        client.pool.close()
        client.backend.close(5)
