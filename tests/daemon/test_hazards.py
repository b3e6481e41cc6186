"""What can go wrong between processes, one test each; taking the guard out makes the test fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.client.sharing import Sharing
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.rules import ALL_RULES, Rule, Rules
from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import Busy, ProtocolError, StaleLeaseError

from ..pager.harness import LAYOUT as RIG_LAYOUT
from ..pager.harness import Rig
from .inside import InsideDaemon
from .raw import LAYOUT, SIZE, WAIT_S, attach, block, get, key, put, stamps
from .running import wait_for

HOLDER = """
import sys
import time
from collections.abc import Collection
sys.path.insert(0, {tests!r})
from daemon.raw import attach, put
client = attach({address!r})
put(client, [1], keep=True)
client.reserve(0, 2, 60.0)
if {close}:
    client.connection.close()
print("holds", flush=True)
input()
"""


class TwoTenants:
    """By token; both of this user."""

    def __init__(self, **options) -> None:
        self._by_token = {name: Tenant(name, {name: name.encode()}, **options) for name in ("one", "two")}

    def find(self, uid: int, token: str, gids: Collection[int] = ()) -> Tenant | None:
        return self._by_token.get(token)


def holder(daemon: InsideDaemon, *, close: bool) -> subprocess.Popen[str]:
    """A process that leases one slot and reserves two; with `close` it closes its socket and lives on."""
    tests = str(Path(__file__).resolve().parent.parent)
    code = HOLDER.format(tests=tests, address=daemon.address, close=close)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


@pytest.mark.parametrize("broken", [False, True])
def test_slots_stay_with_the_process_and_not_with_its_socket(tmp_path, broken):
    """Rule 10, and rule 8: half-written slots are dropped when the process is gone, not before."""
    rules = Rules.without(Rule.PINS_DIE_WITH_THE_PROCESS) if broken else ALL_RULES
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE, rules=rules) as daemon:
        process = holder(daemon, close=True)
        wait_for(lambda: not daemon.service.attachments.by_connection)
        if broken:
            wait_for(lambda: daemon.store.pinned_slots() == 0)
        else:
            assert daemon.store.pinned_slots() == 3
        daemon.store.check_integrity()
        process.kill()
        process.wait()
        wait_for(lambda: daemon.store.pinned_slots() == 0)
        daemon.store.check_integrity()
        reader = attach(daemon.address)
        assert (get(reader, 1) == block(1)).all()  # it was committed
        reader.goodbye()


def test_a_stopped_process_keeps_its_slots(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=8 * SIZE) as daemon:
        process = holder(daemon, close=False)
        os.kill(process.pid, signal.SIGSTOP)
        other = attach(daemon.address)
        for number in range(10, 40):
            put(other, [number])
        assert daemon.store.pinned_slots() == 3
        assert (get(other, 1) == block(1)).all()
        process.kill()
        process.wait()
        wait_for(lambda: daemon.store.pinned_slots() == 0)
        other.goodbye()


@pytest.mark.parametrize("broken", [False, True])
def test_a_request_of_an_older_epoch_changes_nothing(tmp_path, broken):
    rules = Rules.without(Rule.OLD_EPOCH_CHANGES_NOTHING) if broken else ALL_RULES
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE, rules=rules) as daemon:
        client = attach(daemon.address)
        rows = put(client, [1], keep=True)
        client.epoch -= 1
        if broken:
            client.release(0, rows)
            assert daemon.store.pinned_slots() == 0
        else:
            for late in (lambda: client.release(0, rows), lambda: client.reserve(0, 1, WAIT_S)):
                with pytest.raises(StaleLeaseError, match="is over"):
                    late()
            assert daemon.store.pinned_slots() == 1 and daemon.service.attachments.num_stale == 2
        client.connection.close()


def test_a_client_that_comes_back_gives_up_what_it_had(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=32 * SIZE) as daemon:
        client = attach(daemon.address)
        put(client, [1, 2], keep=True)
        welcome = client.connection.welcome
        client.connection.close()
        wait_for(lambda: not daemon.service.attachments.by_connection)
        assert daemon.store.pinned_slots() == 2
        stranger = attach(daemon.address, previous_boot=bytes(16), previous_epoch=welcome.epoch)
        assert daemon.store.pinned_slots() == 2  # another daemon's epoch
        again = attach(daemon.address, previous_boot=welcome.boot, previous_epoch=welcome.epoch)
        assert daemon.store.pinned_slots() == 0
        for one in (stranger, again):
            one.goodbye()


@pytest.mark.parametrize("broken", [False, True])
def test_a_leased_slot_is_given_to_nobody(tmp_path, broken):
    """Rule 7. Without it another client's blocks come into the slot, and the generation tells (rule 11)."""
    with InsideDaemon(tmp_path, host_bytes=8 * SIZE) as daemon:
        reader, writer = attach(daemon.address), attach(daemon.address)
        put(writer, [1])
        rows, generations = reader.lease(0, key(1), 60.0)
        if broken:
            daemon.store.core.groups[0].rules = Rules.without(Rule.HOST_SLOT_HELD_WHILE_READ)
        writer.unhold(0, key(1))
        for number in range(10, 40):
            put(writer, [number])
            writer.unhold(0, key(number))
        is_whole = bool((reader.rows[0][rows[0]] == block(1)).all())
        is_intact = bool(reader.generations[0][rows[0]] == generations[0])
        assert is_whole == is_intact == (not broken)
        for one in (reader, writer):
            one.connection.close()


@pytest.mark.parametrize("broken", [False, True])
def test_a_pager_does_not_use_what_changed_under_its_copy(tmp_path, broken):
    """Rule 11 in the client: the daemon gives leased slots away (its own guard, rule 7, is taken out)."""
    rules = Rules.without(Rule.READER_CHECKS_GENERATION) if broken else ALL_RULES
    with InsideDaemon(tmp_path, host_bytes=64 * RIG_LAYOUT.block_bytes) as daemon:
        first = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32)
        tokens = list(range(100, 140))
        first.prefill(first.start(tokens))
        first.pager.persist([])
        first.close()
        second = Rig(daemon=daemon.address, backend=CpuBackend(poison=True), pages=32, rules=rules)
        copy_rows = second.backend.promote.copy_rows

        def copy_late(target, target_rows, source, source_rows) -> None:
            group = daemon.store.core.groups[0]
            with daemon.store.core.lock:
                group.rules = Rules.without(Rule.HOST_SLOT_HELD_WHILE_READ)
                group.drop_host_copies(group.host.block[source_rows], "test")
                group.slab.rows[source_rows] = 0xEE  # somebody else's block by now
            copy_rows(target, target_rows, source, source_rows)

        second.backend.promote.copy_rows = copy_late
        seq = second.start(tokens)
        assert second.pager.num_computed(seq) > 0
        while second.pager.num_computed(seq) < len(tokens):
            second.prefill(seq)
        assert bool(second.wrong) == broken
        assert (second.pager.counters.get("changed_slots") > 0) != broken
        second.close()


def test_a_slot_that_moves_between_namespaces_is_zeroed(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=4 * SIZE, tenants=TwoTenants()) as daemon:
        one, two = attach(daemon.address, token="one"), attach(daemon.address, token="two")
        rows = put(one, [1, 2], "one")
        assert (two.rows[0][rows[0]] == block(1)).all()  # still there, for whoever maps the memory
        one.unhold(0, key(1) + key(2))
        mine, _ = two.reserve(0, 4, 60.0)
        assert set(rows) <= set(mine) and not two.rows[0][mine].any()
        two.rows[0][mine] = 7
        two.release(0, mine)
        again, _ = two.reserve(0, 4, 60.0)
        assert (two.rows[0][again] == 7).all()  # its own bytes need no zeroing
        two.release(0, again)
        theirs, _ = one.reserve(0, 4, 60.0)
        assert not one.rows[0][theirs].any()
        for client in (one, two):
            client.goodbye()


def test_a_tenant_sees_and_stores_nothing_of_another(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=16 * SIZE, tenants=TwoTenants()) as daemon:
        one, two = attach(daemon.address, token="one"), attach(daemon.address, token="two")
        put(one, [1], "one")
        asked = [key(1), key(99)]
        assert (one.lookup(asked, prefix=False, hold=False)[0] > 0).tolist() == [True, False]
        assert not two.lookup(asked, prefix=False, hold=True).any()
        assert get(two, 1) is None and not two.hold(0, key(1)).any()
        rows, _ = two.reserve(0, 1, 60.0)
        results, _ = two.commit(0, rows, stamps([5], "one"), [b""])
        assert results.tolist() == [0]  # a namespace that is not its own
        results, _ = two.commit(0, rows, stamps([1], "two"), [b""])
        assert results.tolist() == [0]  # and no word of why
        with pytest.raises(ProtocolError, match="not let in"):
            attach(daemon.address, token="three")
        for client in (one, two):
            client.goodbye()


def test_who_may_not_map_the_slab_gets_bytes(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=16 * SIZE, tenants=TwoTenants(maps_slab=False)) as daemon:
        client = attach(daemon.address, token="one")
        assert not client.has_slab
        put(client, [1], "one")
        assert (get(client, 1) == block(1)).all()
        with pytest.raises(ProtocolError, match="not leased"):
            client.read_rows(0, np.array([3]), np.empty((1, SIZE), np.uint8), np.array([0]))
        client.goodbye()


def test_a_client_has_at_most_its_part_of_the_slab(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE) as daemon:
        client = attach(daemon.address)
        limit = client.lease_limits[0]
        rows, _ = client.reserve(0, 64, 60.0)
        assert len(rows) == limit == 16
        with pytest.raises(Busy, match="release some first"):
            client.connection.call(m.Reserve(client.epoch, client.store, 0, 1), m.Slots)  # asks once
        client.release(0, rows)
        assert len(client.reserve(0, 64, 60.0)[0]) == limit
        client.goodbye()


def test_private_blocks_go_with_their_hold(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=16 * SIZE) as daemon:
        client = attach(daemon.address)
        rows, _ = client.reserve(0, 1, 60.0)
        client.commit(0, rows, stamps([1], tokens=0), [b""])
        client.release(0, rows)
        assert get(client, 1) is not None
        client.unhold(0, key(1))
        assert get(client, 1) is None
        assert not daemon.store.core.groups[0].directory.is_live.any()
        client.goodbye()


def test_a_model_without_clients_makes_room_for_another(tmp_path):
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, nvme_path=tmp_path / "nvme", nvme_bytes=4 << 20) as daemon:
        client = attach(daemon.address)
        put(client, [1])
        with pytest.raises(Busy, match="max_models=1"):
            Rig(daemon=daemon.address, backend=CpuBackend())
        client.goodbye()
        wait_for(lambda: not daemon.store.clients)
        Rig(daemon=daemon.address, backend=CpuBackend()).close()
        wait_for(lambda: not daemon.store.clients)
        again = attach(daemon.address)
        assert (get(again, 1) == block(1)).all()  # written down when its model was closed
        again.goodbye()


__all__ = ["LAYOUT", "Sharing"]


def test_closing_with_a_full_disk_ends(tmp_path):
    """What only memory holds is tried once each; in a full tier blocks would take turns for ever."""
    room = {"nvme_path": tmp_path / "nvme", "nvme_bytes": 24 * 4096}
    with InsideDaemon(tmp_path, host_bytes=64 * SIZE, **room) as daemon:
        client = attach(daemon.address)
        for number in range(60):
            put(client, [number])
            client.unhold(0, key(number))
        client.goodbye()
        started_s = time.monotonic()
        daemon.store.keeper.write_down(200.0)
        assert time.monotonic() - started_s < 190.0  # and not because its time was up
        daemon.store.check_integrity()
        d = daemon.store.core.groups[0].directory
        assert d.nvme_valid.sum() >= 16
