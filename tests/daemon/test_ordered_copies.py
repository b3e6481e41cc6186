"""transfer="ipc": the daemon copies between a client's pages and its slots, where both sides have it, and is asked anew by
those that come back. What it refuses: test_ordered_refusals.py; the hazards: test_ordered_deaths.py, test_ordered_rules.py.
"""

from __future__ import annotations

import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import Greeting
from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError, ProtocolError

from ..pager.harness import LAYOUT as RIG_LAYOUT
from ..pager.harness import WINDOWED, Rig
from .gated import TOKENS, all_in_daemon, copies_of, ordering_rig, serving, stored
from .ordering import Ordering
from .raw import SIZE, attach, block, put, stamps
from .running import Pagerd, wait_for


@pytest.mark.parametrize("layouts", [[RIG_LAYOUT], [RIG_LAYOUT, WINDOWED]])
def test_blocks_travel_both_ways_and_no_copy_is_the_clients(tmp_path, layouts):
    with serving(tmp_path, host_bytes=256 * SIZE) as daemon:
        first, second = (ordering_rig(daemon.address, layouts=layouts) for _ in range(2))
        for rig in (first, second):
            for stream in (rig.backend.promote, rig.backend.demote):
                stream.copy_rows = None  # would fail
        first.prefill(first.start(TOKENS))
        wait_for(lambda: all_in_daemon(first))
        seq = second.start(TOKENS)
        assert second.pager.num_computed(seq) == len(TOKENS) // 4 * 4 - 4
        second.prefill(seq)
        for rig in (first, second):
            rig.settle()
            rig.pager.check_integrity()
            assert not rig.wrong
        assert second.pager.counters.get("moved_blocks") > 0
        for rig in (first, second):
            rig.close()
        wait_for(lambda: not daemon.service.attachments.by_connection)
        assert not daemon.service.attachments.ending and not daemon.store.pinned_slots()


def test_raw_copies_move_exactly_the_named_blocks(tmp_path):
    with serving(tmp_path) as daemon:
        client = Ordering(daemon.address)
        leased = put(client.attachment, [1, 2, 3], keep=True)
        told = client.order([5, 0, 2], leased, is_write_back=False)
        assert told.event.wait(60) and told.event.error is None
        for page, number in ((5, 1), (0, 2), (2, 3)):
            assert (client.pool.rows[page] == block(number)).all()
        assert not client.pool.rows[[1, 3, 4, 6, 7]].any()
        rows, _ = client.attachment.reserve(0, 2, 60.0)
        told = client.order([2, 5], rows, is_write_back=True)
        assert told.event.wait(60) and told.event.error is None
        assert (client.attachment.rows[0][rows[0]] == block(3)).all()
        results, _ = client.attachment.commit(0, rows[:1], stamps([9]), [b""])
        assert results[0] & 3 == 1
        client.close()


@pytest.mark.parametrize(
    ("daemon_options", "rig_options", "said"),
    [
        ({"allow_ipc": False}, {}, "set allow_ipc = true"),
        ({}, {"private_host": 16}, "memory is not mapped"),
    ],
)
def test_without_it_copies_are_the_clients_and_it_is_said(tmp_path, caplog, daemon_options, rig_options, said):
    with serving(tmp_path, **daemon_options) as daemon:
        stored(daemon)
        rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32, transfer="ipc", **rig_options)
        assert copies_of(rig)["copies"] == "client" and said in copies_of(rig)["transfer_notice"]
        assert said in caplog.text
        rig.prefill(rig.start(TOKENS))
        assert not rig.wrong
        rig.close()


def test_an_export_without_the_feature_is_refused(tmp_path):
    with serving(tmp_path, allow_ipc=False) as daemon:
        client = attach(daemon.address, features=m.ALL_FEATURES)
        assert m.IPC not in client.connection.welcome.features
        with pytest.raises(ProtocolError, match="not granted"):
            client.connection.call(m.Export(client.epoch), m.Exporting)
        with pytest.raises(ProtocolError, match="before EXPORT"):
            client.connection.call(m.Register(client.epoch, client.store, 0, "memfd", b"", 1, SIZE), m.Registered)
        client.goodbye()


def test_it_needs_a_daemon():
    with pytest.raises(ConfigError, match="without a daemon"):
        Rig(backend=CpuBackend(), transfer="ipc")
    with pytest.raises(ConfigError, match="transfer='vmm' is unknown"):
        Rig(backend=CpuBackend(), transfer="vmm")


@pytest.mark.parametrize("oldest", [1, 2])
@pytest.mark.parametrize("newest", [1, 2])
def test_versions_of_both_sides(tmp_path, oldest, newest):
    """Clients that never heard of the feature, and those that have it, with a daemon of either version."""
    with serving(tmp_path, version=newest) as daemon:
        stored(daemon)
        greeting = Greeting("old", features=(m.SLAB,), newest_version=oldest)
        old = Attachment.open(daemon.address, [RIG_LAYOUT], "rig", {}, greeting)
        assert m.IPC not in old.connection.welcome.features
        rig = ordering_rig(daemon.address)
        rig.prefill(rig.start(TOKENS))
        assert not rig.wrong
        rig.close()
        old.goodbye()


def test_a_daemon_that_comes_back_is_asked_anew(tmp_path):
    """What the one refused the other may offer; what is served is right throughout."""
    plain = Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault",))
    offering = Pagerd(tmp_path, host_bytes=64 * SIZE, options=("--no-prefault", "--allow-ipc"))
    with plain:
        rig = Rig(daemon=plain.address, backend=CpuBackend(poison=True), pages=32, transfer="ipc")
        assert copies_of(rig)["copies"] == "client"
        rig.prefill(rig.start(TOKENS))
        plain.kill()
        with offering:
            wait_for(lambda: copies_of(rig)["copies"] == "daemon")
            assert not copies_of(rig)["transfer_notice"]
            rig.prefill(rig.start([1, *TOKENS]))
            wait_for(lambda: all_in_daemon(rig))
            rig.settle()
            assert not rig.wrong
            rig.close()
