"""Names that tenants choose: one that another has chosen too is as free as any, and tells nothing."""

from __future__ import annotations

from kvtier.pager.daemon import secret_files
from kvtier.pager.wire import messages as m

from .service_process import LAYOUT, WAIT_S, Pagerd
from .test_tenants import ALICE, BOB, two_tenants

BOTH = "kvt_" + "c" * 43  # of one who owns both namespaces


def session_record(namespace: str, extra: str) -> dict:
    return {"version": 1, "namespace": namespace, "token_ids": b"", "num_computed": 0, "extra": {"of": extra}}


def extra_of(client, session_id: str) -> str:
    found = client.connection.call(
        m.GetSession(client.epoch, client.store, session_id, True), m.Session, timeout_s=WAIT_S
    )
    return found.record["extra"]["of"]


def put_session(client, session_id: str, namespace: str, extra: str) -> None:
    record = session_record(namespace, extra)
    client.connection.call(
        m.PutSession(client.epoch, client.store, session_id, record, 20_000), m.SessionPut, timeout_s=WAIT_S
    )


def listed(client) -> list[list]:
    rows = client.connection.call(m.ListSessions(client.store, ""), m.Sessions, timeout_s=WAIT_S).sessions
    return [row[:2] for row in rows]


def test_two_tenants_may_choose_one_session_id_and_neither_notices(tmp_path):
    """Also after a restart; nobody can take away an id that another one is going to use."""
    head = f'nvme_path = "{tmp_path / "s"}"\nnvme_bytes = "1MiB"'
    with Pagerd(tmp_path, two_tenants(tmp_path, head=head)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        for client, name in ((alice, "alice"), (bob, "bob"), (alice, "alice")):
            put_session(client, "chat", name, name)
            put_session(client, "i" * 256, name, name)  # as long as one may be
        drop = m.DropSession(bob.epoch, bob.store, "i" * 256, False)
        bob.connection.call(drop, m.SessionDropped, timeout_s=WAIT_S)
        assert pagerd.end() == 0
    with Pagerd(tmp_path, two_tenants(tmp_path, head=head)).ready() as pagerd:
        alice, bob = pagerd.connect(ALICE[0]).open(), pagerd.connect(BOB[0]).open()
        assert listed(alice) == [["chat", "alice"], ["i" * 256, "alice"]] and listed(bob) == [["chat", "bob"]]
        assert (extra_of(alice, "chat"), extra_of(bob, "chat")) == ("alice", "bob")  # each takes its own
        put_session(bob, "i" * 256, "bob", "again")
        assert extra_of(alice, "i" * 256) == "alice"
        assert pagerd.end() == 0


def test_a_session_that_moves_to_another_namespace_of_its_tenant_is_one_session(tmp_path):
    """A tenant of two namespaces, and one of each of them."""
    config = two_tenants(tmp_path)
    for _, hashed in (ALICE, BOB):
        config = config.replace(hashed, f'{hashed}", "{secret_files.hash_token(BOTH)}')
    with Pagerd(tmp_path, config).ready() as pagerd:
        both, alice = pagerd.connect(BOTH).open(), pagerd.connect(ALICE[0]).open()
        put_session(both, "chat", "alice", "first")
        put_session(both, "chat", "bob--salt", "second")
        assert listed(both) == [["chat", "bob--salt"]] and extra_of(both, "chat") == "second"
        assert not listed(alice)
        put_session(alice, "chat", "alice", "hers")
        assert listed(alice) == [["chat", "alice"]]
        assert pagerd.end() == 0


def test_a_model_is_found_in_its_own_trust_domain_alone(tmp_path):
    """Open or at rest on the disk."""
    head = f'max_models = 2\nnvme_path = "{tmp_path / "nvme"}"\nnvme_bytes = "2MiB"'
    config = two_tenants(tmp_path, 'trust_domain = "red"', 'trust_domain = "blue"', head)

    def found(pagerd: Pagerd, token: str) -> int:
        return pagerd.connect(token).connection.call(m.FindModel("test"), m.ModelFound, timeout_s=WAIT_S).block_size

    with Pagerd(tmp_path, config).ready() as pagerd:
        pagerd.connect(ALICE[0]).open()
        assert (found(pagerd, ALICE[0]), found(pagerd, BOB[0])) == (LAYOUT.block_size, 0)
        assert pagerd.end() == 0
    with Pagerd(tmp_path, config).ready() as pagerd:
        assert (found(pagerd, ALICE[0]), found(pagerd, BOB[0])) == (LAYOUT.block_size, 0)
        assert pagerd.end() == 0
