"""Tenants under one daemon: nobody sees, guesses, reads or displaces what is another's."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import DaemonConnection, Greeting
from kvtier.pager.config import PagerConfig
from kvtier.pager.daemon import secret_files
from kvtier.pager.daemon.store import SharedStore
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.keys import KeyChain, owner_tag
from kvtier.pager.wire import messages as m
from kvtier.tiers.errors import KvTierError, ProtocolError, TierFullError, UnknownSessionError

from .. import warm
from .running import wait_for
from .service_process import BLOCK, LAYOUT, Pagerd

ALICE, BOB = ((t, secret_files.hash_token(t)) for t in ("kvt_" + "a" * 43, "kvt_" + "b" * 43))


def two_tenants(tmp_path: Path, alice: str = "", bob: str = "", head: str = "") -> str:
    if not (tmp_path / "root").exists():
        secret_files.write_new_secret(tmp_path / "root")
    return (
        f'host_bytes = "{64 * BLOCK}"\nhost_prefault = false\nroot_secret_file = "{tmp_path / "root"}"\n{head}\n'
        f'[namespaces.alice]\ntokens = ["{ALICE[1]}"]\n{alice}\n[namespaces.bob]\ntokens = ["{BOB[1]}"]\n{bob}\n'
    )


def keys_of(client, namespace: str, token_ids: list[int]) -> list[bytes]:
    """As a client's pager names them, with the secret that HELLO gave."""
    keys: list[bytes] = []
    KeyChain("test", namespace, client.namespaces[namespace], LAYOUT.block_size).extend(keys, token_ids)
    return keys


def random_keys(n: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(n)]


# ---------------------------------------------------------------------- over the socket, real processes
def test_the_same_tokens_are_a_miss_for_who_lacks_the_secret_and_foreign_keys_are_absent_ones(tmp_path):
    with Pagerd(tmp_path, two_tenants(tmp_path)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        tokens = list(range(5 * LAYOUT.block_size))
        hers, his = keys_of(alice, "alice", tokens), keys_of(bob, "bob", tokens)
        blocks = [os.urandom(BLOCK) for _ in hers]
        assert alice.put(hers, blocks, "alice") == [1] * 5 and alice.get(hers) == blocks
        assert list(alice.namespaces) == ["alice"] and list(bob.namespaces) == ["bob"]
        assert not set(hers) & set(his) and bob.lookup(his) == [0] * 5
        absent = random_keys(5)
        for keys in (hers, absent):  # also to somebody who knows her keys: the same answers, byte by byte
            assert bob.lookup(keys) == [0] * 5
            assert bob.lease(keys, wait_ms=0).tolist() == [-1] * 5
            held = bob.connection.call(m.Hold(bob.epoch, bob.store, 0, b"".join(keys)), m.Held)
            assert held.flags == bytes(5)
        with pytest.raises(ProtocolError, match="is not leased by this client"):
            bob.read([0])
        assert alice.get(hers) == blocks
        assert pagerd.end() == 0


def test_a_block_cannot_be_put_into_anothers_namespace_nor_over_anothers_key(tmp_path):
    with Pagerd(tmp_path, two_tenants(tmp_path)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        key, block = keys_of(alice, "alice", list(range(4))), [b"\x01" * BLOCK]
        assert alice.put(key, block, "alice") == [1]
        assert bob.put(key, [b"\x02" * BLOCK], "alice") == [0]  # refused: not his namespace
        assert bob.put(key, [b"\x02" * BLOCK], "bob") == [0]  # refused: somebody has that key, he may not know who
        assert bob.put(random_keys(1), [b"\x02" * BLOCK], "alice") == [0]
        assert alice.get(key) == block
        assert pagerd.end() == 0


def test_sessions_of_another_tenant_are_unknown_whatever_one_asks(tmp_path):
    with Pagerd(tmp_path, two_tenants(tmp_path)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        record = {"version": 1, "namespace": "alice", "token_ids": b"", "num_computed": 0, "extra": {}, "summary": {}}
        alice.connection.call(m.PutSession(alice.epoch, alice.store, "hers", record, 5000), m.SessionPut)
        for session_id in ("hers", "nobodys"):
            with pytest.raises(UnknownSessionError, match="is unknown"):
                bob.connection.call(m.GetSession(bob.epoch, bob.store, session_id, False), m.Session)
            with pytest.raises(UnknownSessionError, match="is unknown"):
                bob.connection.call(m.DropSession(bob.epoch, bob.store, session_id, False), m.SessionDropped)
        with pytest.raises(KvTierError):
            bob.connection.call(m.PutSession(bob.epoch, bob.store, "his", record, 5000), m.SessionPut)
        assert not bob.connection.call(m.ListSessions(bob.store, ""), m.Sessions).sessions
        assert len(alice.connection.call(m.ListSessions(alice.store, ""), m.Sessions).sessions) == 1
        assert pagerd.end() == 0


@pytest.fixture
def open_folder():
    """One that other users can look into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_who_the_kernel_says_and_gets_neither_slab_nor_status(open_folder):
    """A process of uid 4711, in a group that the table names and in another one; and a uid that it does not name."""
    tmp_path = open_folder
    config = two_tenants(tmp_path, "gids = [4712]", "uids = [4711]", "socket_mode = 0o666")
    code = (
        "import json, os, socket, sys\n"
        "from kvtier.pager.client.connection import DaemonConnection\n"
        "from kvtier.pager.wire import messages as m\n"
        "from kvtier.pager.wire.frames import HEADER, pack, parse_header, unpack\n"
        "os.setgroups([int(sys.argv[4])]); os.setgid(100); os.setuid(int(sys.argv[3]))\n"
        "raw = socket.socket(socket.AF_UNIX); raw.connect(sys.argv[1]); raw.sendall(pack(1, 1, {}))\n"
        "print(parse_header(raw.recv(HEADER.size)).kind)\n"
        "one = DaemonConnection.open('unix://' + sys.argv[1])\n"
        "print(sorted(one.welcome.namespaces), one.call(m.Open([json.loads(sys.argv[2])], 'test'), m.Opened).has_slab)\n"
    )
    with Pagerd(tmp_path, config).ready() as pagerd:

        def ask(uid: int, group: int) -> subprocess.CompletedProcess[str]:
            layout = json.dumps(LAYOUT.to_dict())
            return warm.light.run("-c", code, pagerd.socket, layout, uid, group, cwd="/", timeout=240)

        assert ask(4711, 4712).stdout == "255\n['alice', 'bob'] False\n"  # STATUS: refused
        assert ask(4711, 4799).stdout == "255\n['bob'] False\n"
        assert "uid 4798 is not let in" in ask(4798, 4799).stderr
        assert pagerd.end() == 0


def test_a_slot_that_moved_between_tenants_reads_zero_before_it_is_written(tmp_path):
    with Pagerd(tmp_path, two_tenants(tmp_path)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        hers = random_keys(alice.num_slots, 1)
        alice.put(hers, [b"\xaa" * BLOCK] * len(hers), "alice")  # every slot of the host tier holds her bytes
        slots = alice.reserve(4)
        for slot in slots:
            alice.write(slot, b"\xbb" * BLOCK)
        alice.release(slots)  # and some that were never committed
        his = random_keys(alice.num_slots, 2)
        for key in his:
            slot = bob.reserve(1)
            assert bob.commit(slot, [key], "bob") == [1]  # committed as it was handed out
            bob.release(slot)
            assert bob.get([key]) == [bytes(BLOCK)]
        assert pagerd.end() == 0


def test_trust_domains_share_no_memory_and_no_store(tmp_path):
    """Two that may both map: the slab of each is another memory, with nothing of the other's in it."""
    head = f'max_models = 2\nnvme_path = "{tmp_path / "nvme"}"\nnvme_bytes = "64MiB"'
    config = two_tenants(tmp_path, 'trust_domain = "red"', 'trust_domain = "blue"', head)
    with Pagerd(tmp_path, config).ready() as pagerd:
        address = f"unix://{pagerd.socket}"
        hers, his = (Attachment.open(address, [LAYOUT], "m", {}, Greeting("", token)) for token, _ in (ALICE, BOB))
        assert hers.has_slab and his.has_slab
        hers.rows[0][:], his.rows[0][:] = 0xAA, 0x55  # whatever they may do to what they map
        assert (hers.rows[0] == 0xAA).all() and (his.rows[0] == 0x55).all()
        assert len(list((tmp_path / "nvme").glob("model-*"))) == 2
        with pytest.raises(TierFullError, match="max_models=2"):  # each is a model of its own to the budget
            Attachment.open(address, [LAYOUT], "another", {}, Greeting("", ALICE[0]))
        pagerd.reload(config.replace('"blue"', '"red"'))
        assert "setting=namespaces.bob.trust_domain" in pagerd.wait_for_log("event=reload_needs_restart")
        pagerd.reload(config.replace(BOB[1], f'{ALICE[1]}", "{BOB[1]}'))
        with pytest.raises(ProtocolError, match="is not let in"):  # one connection is of one domain
            DaemonConnection.open(address, Greeting("", ALICE[0]))
        assert "trust domains ['blue', 'red']" in pagerd.log()
        assert pagerd.end() == 0


def test_a_flood_leaves_a_floor_alone_and_stays_under_its_ceiling_and_pins(tmp_path):
    quotas = f"host_floor = {8 * BLOCK}", f"host_ceiling = {16 * BLOCK}\npins = 6"
    with Pagerd(tmp_path, two_tenants(tmp_path, *quotas)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        hers, blocks = random_keys(8, 1), [os.urandom(BLOCK) for _ in range(8)]
        alice.put(hers, blocks, "alice")
        for i in range(6):
            his = random_keys(30, 10 + i)
            bob.put(his, [b"\x02" * BLOCK] * 30, "bob")
            assert sum(state > 0 for state in bob.lookup(his)) <= 16
        assert alice.get(hers) == blocks
        held = bob.reserve(6)
        with pytest.raises(TierFullError, match="used up its pins"):
            bob.connection.call(m.Reserve(bob.epoch, bob.store, 0, 1), m.Slots)
        assert len(alice.reserve(3)) == 3
        bob.release(held)
        assert len(bob.reserve(2)) == 2
        assert pagerd.end() == 0


def test_who_reserves_more_than_there_is_gets_all_that_there_is(tmp_path):
    """Below its ceiling, and beyond what others leave: a first try for all of it must not cost room."""
    with Pagerd(tmp_path, two_tenants(tmp_path, "", f"host_ceiling = {16 * BLOCK}")).ready() as pagerd:
        bob = pagerd.connect(BOB[0]).open()
        his = random_keys(10, 3)
        assert bob.put(his, [b"\x02" * BLOCK] * 10, "bob") == [1] * 10
        alice = [pagerd.connect(ALICE[0]).open() for _ in range(4)]
        assert [len(one.reserve(count)) for one, count in zip(alice, (16, 16, 16, 6), strict=True)] == [16, 16, 16, 6]
        assert len(bob.reserve(12)) == 10
        assert bob.lookup(his) == [0] * 10
        assert pagerd.end() == 0


def test_pins_bound_what_is_leased_to_read(tmp_path):
    with Pagerd(tmp_path, two_tenants(tmp_path, "", "pins = 3")).ready() as pagerd:
        bob = pagerd.connect(BOB[0]).open()
        his = random_keys(5, 3)
        assert bob.put(his, [b"\x02" * BLOCK] * 5, "bob") == [1] * 5
        slots = bob.lease(his, wait_ms=50)
        assert (slots >= 0).sum() == 3 and (slots == -2).sum() == 2  # no room now, not: not there
        bob.release(slots[slots >= 0][:2])
        assert (bob.lease(his[3:], wait_ms=2000) >= 0).all()
        assert pagerd.end() == 0


@pytest.mark.parametrize("codec", ["aes", "zstd+aes"])
def test_with_encryption_the_store_of_a_daemon_shows_nothing_and_each_tenant_reads_its_own(tmp_path, codec):
    pytest.importorskip("cryptography")
    head = f'nvme_path = "{tmp_path / "s"}"\nnvme_bytes = "1MiB"\nnvme_codec = "{codec}"'
    clear = [b"what alice said.", b"what bob said..."]
    blocks = [text * (BLOCK // 16) for text in clear]
    keys = random_keys(2)
    with Pagerd(tmp_path, two_tenants(tmp_path, head=head)).ready() as pagerd:
        for (token, _), name, key, block in zip((ALICE, BOB), ("alice", "bob"), keys, blocks, strict=True):
            client = pagerd.connect(token).open()
            slots = client.reserve(1)
            client.write(slots[0], block)
            assert client.commit(slots, [key], name, hold=True)[0] & 3 == 1
            client.flush()
        assert pagerd.end() == 0
    raw = b"".join(file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert not any(text in raw for text in clear) and keys[0] in raw
    with Pagerd(tmp_path, two_tenants(tmp_path, head=head)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        assert (alice.get(keys), bob.get(keys)) == ([blocks[0], None], [None, blocks[1]])
        assert pagerd.end() == 0


# ---------------------------------------------------------------------- the path that a lookup takes
def make_store(tmp_path: Path, slots: int = 64, **disk) -> SharedStore:
    config = PagerConfig(device_bytes=0, host_bytes=slots * BLOCK, backend="cpu", host_prefault=False, **disk)
    return SharedStore.open((LAYOUT,), config, model_fingerprint="test", about={})


def fill(store: SharedStore, tenant: Tenant, keys: list[bytes], namespace: str) -> None:
    client = store.attach(tenant)
    for key in keys:
        slots, _ = store.reserve(client, 0, 1)
        owners = np.array([owner_tag(namespace)], np.uint32)
        store.commit(client, 0, slots, [key], [bytes(32)], np.array([4]), owners, hold=False)
        store.release(client, 0, slots)
    store.detach(client)


def path_of(work) -> list[tuple[str, str, int]]:
    """Every call and return of Python and C code while it runs, with the line of each."""
    seen: list[tuple[str, str, int]] = []

    def note(frame, event, argument):
        name = getattr(argument, "__name__", frame.f_code.co_name) if event.startswith("c_") else frame.f_code.co_name
        seen.append((event, name, frame.f_lineno))

    gc.disable()  # a collection in the middle would call other objects' finalizers
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return seen


@pytest.mark.parametrize("prefix", [False, True])
def test_foreign_and_absent_keys_take_one_path(tmp_path, prefix):
    """Call by call and line by line; what they cost is measured by `kvtier bench tenants`."""
    store = make_store(tmp_path)
    alice, bob = (Tenant(name, {name: b"s" * 32}, maps_slab=False) for name in ("alice", "bob"))
    hers, own = random_keys(70, 1), random_keys(10, 2)
    fill(store, alice, hers, "alice")
    fill(store, bob, own, "bob")
    store.lookup(store.attach(alice), hers, prefix=True, hold=False)  # what she asked for lately must not show either
    foreign, others, more = hers[:20], hers[20:30], hers[30:50]  # a key that we asked for before is none of these
    client = store.attach(bob)

    def path(keys):
        return path_of(lambda: store.lookup(client, keys, prefix=prefix, hold=True))

    path(own)  # whatever is imported or cached at the first call
    assert path(foreign) == path(random_keys(20, 3))
    mixed = [*own, *others], [*own, *random_keys(10, 4)]
    assert path(mixed[0]) == path(mixed[1])
    assert path(own + own) != path(foreign)  # the probe does see a difference where there is one

    def lease_path(keys):
        return path_of(lambda: store.lease(client, 0, keys, 0.0))

    lease_path(random_keys(20, 5))
    assert lease_path(more) == lease_path(random_keys(20, 6))
    store.close(5)


# ---------------------------------------------------------------------- what is in a slot that is handed out
def tenants_by_name(*names: str) -> list[Tenant]:
    return [Tenant(name, {name: b"s" * 32}, maps_slab=False) for name in names]


def stored_blocks(tmp_path: Path, tenant: Tenant, keys: list[bytes], slots: int) -> SharedStore:
    """A store that was started anew: the blocks are on its disk, and not a byte in its memory."""
    disk = {"nvme_path": tmp_path / "s", "nvme_bytes": "4MiB"}
    store = make_store(tmp_path, slots, **disk)
    client = store.attach(tenant)
    for key in keys:
        slot, _ = store.reserve(client, 0, 1)
        store.row(client, 0, int(slot[0]), to_write=True)[:] = b"\xaa" * BLOCK
        owners = np.array([owner_tag(tenant.name)], np.uint32)
        store.commit(client, 0, slot, [key], [bytes(32)], np.array([4]), owners, hold=True)
        store.release(client, 0, slot)
    store.keeper.flush(client, 60)
    store.detach(client)
    store.close(60)
    return make_store(tmp_path, slots, **disk)


def bytes_handed_out(store: SharedStore, client, slots: int) -> list[bytes]:
    """What stands in every slot as it is reserved."""
    found = []
    for number in range(slots):
        slot, _ = store.reserve(client, 0, 1)
        found.append(bytes(store.row(client, 0, int(slot[0]), to_write=True)))
        owners = np.array([client.tenant.tag], np.uint32)
        name = random_keys(1, 90 + number)
        store.commit(client, 0, slot, name, [bytes(32)], np.array([4]), owners, hold=False)
        store.release(client, 0, slot)
    return found


def brought_up(store: SharedStore, tenant: Tenant, keys: list[bytes]):
    """By a hint; returns once no read of it is under way."""
    client = store.attach(tenant)
    store.hint(client, keys, m.PREFETCH)
    wait_for(lambda: (store.advance(), not store.core.in_flight())[1])
    return client


def test_what_a_prefetch_brought_up_is_not_in_the_slots_of_the_next_tenant(tmp_path):
    alice, bob = tenants_by_name("alice", "bob")
    keys = random_keys(4)
    store = stored_blocks(tmp_path, alice, keys, 16)
    client = brought_up(store, alice, keys)
    assert (store.lookup(client, keys, prefix=False, hold=False) == m.IN_MEMORY).all()
    assert not any(map(any, bytes_handed_out(store, store.attach(bob), 16)))
    store.close(60)


def test_a_read_that_fails_leaves_nothing_of_who_had_the_slot_before(tmp_path):
    """Her block was to come there, so the slot is noted as hers: but it is not, and it has to be zeroed for her too."""
    alice, bob = tenants_by_name("alice", "bob")
    keys = random_keys(4)
    store = stored_blocks(tmp_path, alice, keys, 8)
    his = store.attach(bob)
    slots, _ = store.reserve(his, 0, 8)
    for slot in slots.tolist():
        store.row(his, 0, slot, to_write=True)[:] = b"\xbb" * BLOCK
    store.release(his, 0, slots)
    read = store.core.nvme.read

    def fails(*arguments):
        ticket = read(*arguments)
        assert ticket.event.wait(60)
        ticket.ok[:] = False
        store.core.groups[0].slab.rows[arguments[3], 8:] = 0xBB  # it came no further than this
        return ticket

    store.core.nvme.read = fails
    client = brought_up(store, alice, keys)
    assert (store.lookup(client, keys, prefix=False, hold=False) == m.ABSENT).all()
    slots, _ = store.reserve(client, 0, 8)
    assert not store.core.groups[0].slab.rows[slots].any()
    store.close(60)
