"""TCP of the daemon: nothing without TLS 1.3, a token and a private key; then the same verbs, and never the slab."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from kvtier.pager.client.asynchronous import AsyncDaemonConnection
from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import DaemonConnection, Greeting
from kvtier.pager.client.transport import client_context
from kvtier.pager.daemon import secret_files
from kvtier.pager.daemon.connection import Connection
from kvtier.pager.daemon.tls import server_context, tcp_listener
from kvtier.pager.keys import owner_tag
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, pack, parse_header, unpack
from kvtier.pager.wire.hosts import parse_host
from kvtier.tiers.errors import ConfigError, ProtocolError, TierUnavailableError
from kvtier.tiers.layout import KVLayout
from kvtier.tiers.nvme.manifest import STAMP

from ..pager.harness import BLOCK, Rig
from .inside import InsideDaemon
from .running import wait_for
from .service_process import LAYOUT, Pagerd, free_port

x509 = pytest.importorskip("cryptography.x509")
TOKEN = "kvt_" + "t" * 43


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 signed by itself, and its key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pagerd")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pem").chmod(0o600)
    (folder / "cert.pem").chmod(0o644)
    return folder / "cert.pem", folder / "key.pem"


class TlsClient:
    """One request at a time over a TLS socket."""

    def __init__(self, port: int, cert: Path) -> None:
        plain = socket.create_connection(("127.0.0.1", port), 120)
        self.socket = client_context(str(cert)).wrap_socket(plain, server_hostname="127.0.0.1")

    def call(self, message: object) -> tuple[int, dict]:
        self.socket.sendall(pack(type(message).KIND, 1, m.to_fields(message)))
        header = parse_header(self._receive(HEADER.size))
        return header.kind, unpack(self._receive(header.size))

    def _receive(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            piece = self.socket.recv(size - len(found))
            assert piece, "the daemon closed the connection"
            found += piece
        return found


def hello(token: str = TOKEN) -> m.Hello:
    return m.Hello(m.OLDEST_VERSION, m.VERSION, list(m.FEATURES), "test", token)


def config(tmp_path: Path, pair: tuple[Path, Path], port: int) -> str:
    secret_files.write_new_secret(tmp_path / "root")
    return (
        f'host_bytes = "4MiB"\nhost_prefault = false\nlisten = "127.0.0.1:{port}"\ntls_cert = "{pair[0]}"\n'
        f'tls_key = "{pair[1]}"\nroot_secret_file = "{tmp_path / "root"}"\n'
        f'[namespaces.far]\ntokens = ["{secret_files.hash_token(TOKEN)}"]\n'
    )


def test_a_client_with_a_token_is_served_over_tls_and_gets_no_slab(tmp_path, pair):
    port = free_port()
    with Pagerd(tmp_path, config(tmp_path, pair, port)).ready() as pagerd:
        client = TlsClient(port, pair[0])
        assert client.socket.version() == "TLSv1.3"
        kind, welcome = client.call(hello())
        assert kind == m.Welcome.KIND and list(welcome["namespaces"]) == ["far"]
        kind, opened = client.call(m.Open([LAYOUT.to_dict()], "test", want_slab=True))
        assert kind == m.Opened.KIND and opened["has_slab"] is False
        kind, found = client.call(m.Lookup(opened["store"], bytes(64), prefix=False))
        assert kind == m.Found.KIND and found["held"] == bytes(2)

        for token in ("", "kvt_" + "x" * 43):
            kind, failure = TlsClient(port, pair[0]).call(hello(token))
            assert kind == m.ERROR and "is not let in" in failure["message"]
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(pair[0])
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection(("127.0.0.1", port), 120) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), 120) as plain:  # in clear there is no answer at all
            plain.sendall(pack(m.Hello.KIND, 1, m.to_fields(hello())))
            try:
                assert plain.recv(100)[:1] in (b"", b"\x15")  # an alert of TLS, or the end
            except ConnectionResetError:
                pass
        assert client.call(m.Lookup(opened["store"], bytes(32), prefix=False))[0] == m.Found.KIND
        assert pagerd.end() == 0


@pytest.fixture
def far(tmp_path, pair):
    """A daemon that listens on TCP, its address, and the settings of a client that may come."""
    port = free_port()
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    with Pagerd(tmp_path, config(tmp_path, pair, port)).ready() as pagerd:
        yield pagerd, f"tls://127.0.0.1:{port}", {"pager_token_file": str(token), "pager_ca": str(pair[0])}
        assert pagerd.end() == 0, pagerd.log()


def test_pagers_on_other_machines_share_prefixes_and_sessions_over_tls(far):
    """The blocks go over the socket, both ways, and every value is checked."""
    _, address, settings = far
    text = [i % 7 for i in range(45)]
    with closing(Rig(daemon=address, pages=16, private_host=12, **settings)) as first:
        seq = first.start(text, "far")
        assert first.prefill(seq) == 45 and not first.pager.status()["tiers"]["daemon"]["shares_memory"]
        first.pager.park("chat", seq)
        assert not first.wrong
    with closing(Rig(daemon=address, pages=16, private_host=12, **settings)) as second:
        seq, parked = second.pager.resume("chat", "far")
        second.say(seq, [1, 2, 3])
        assert parked.num_computed == 45 and second.pager.counters.get("computed_tokens") == 3
        again = second.start(text, "far")
        second.prefill(again)
        assert second.pager.counters.get("computed_tokens") <= 3 + BLOCK and not second.wrong


def test_many_threads_send_and_receive_large_blocks_at_once(far, pair):
    """One thread receives while others send, megabytes each way: TLS keeps the order and every byte."""
    _, address, _ = far
    layout = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32")  # 64 KiB blocks
    client = Attachment.open(address, [layout], "large", {}, Greeting("test", TOKEN, ca_file=str(pair[0])))
    blocks = np.random.default_rng(0).integers(0, 256, (4, layout.block_bytes), np.uint8)

    def go(number: int) -> None:
        for _ in range(12):
            rows, _ = client.reserve(0, 1, 10.0)
            client.write_rows(0, rows, blocks, np.array([number]))
            stamps = np.zeros(1, STAMP)
            stamps["key"], stamps["tokens"], stamps["owner"] = np.void(os.urandom(32)), 16, owner_tag("far")
            client.commit(0, rows, stamps, [b""])
            found = np.zeros_like(blocks[:1])
            client.read_rows(0, rows, found, np.zeros(1, np.int64))
            client.release(0, rows)
            client.unhold(0, stamps["key"].tobytes())
            assert (found[0] == blocks[number]).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go, range(4)))
    client.goodbye()


def test_the_async_client_speaks_tls_too(far, pair):
    async def ask() -> int:
        greeting = Greeting("test", TOKEN, ca_file=str(pair[0]))
        connection = await AsyncDaemonConnection.open(far[1], greeting)
        try:
            return (await connection.call(m.FindModel("nothing"), m.ModelFound)).block_size
        finally:
            await connection.close()

    assert asyncio.run(ask()) == 0


def test_a_client_refuses_who_it_does_not_know_and_says_what_is_wrong(far, tmp_path, pair):
    _, address, settings = far
    readable, empty, wrong = (tmp_path / name for name in ("readable", "empty", "wrong"))
    for path, text, mode in ((readable, TOKEN, 0o644), (empty, "", 0o600), (wrong, "kvt_" + "x" * 43, 0o600)):
        path.write_text(text)
        path.chmod(mode)
    by_name = address.replace("127.0.0.1", "localhost")  # the certificate names the number alone
    with socket.create_server(("127.0.0.1", 0)) as mute:
        deaf = f"tls://127.0.0.1:{mute.getsockname()[1]}"
        mute.close()
        for where, change, kind, said in (
            (address, {"pager_token_file": str(readable)}, ConfigError, r"can be read by others \(mode 0644\)"),
            (address, {"pager_token_file": str(empty)}, ConfigError, "holds no token"),
            (address, {"pager_token_file": str(tmp_path / "none")}, ConfigError, "cannot be read"),
            (address, {"pager_token_file": str(wrong)}, ProtocolError, "is not let in"),
            (address, {"pager_token_file": None}, ProtocolError, "is not let in"),
            (address, {"pager_ca": None}, ConfigError, "certificate is not good"),
            (address, {"pager_ca": str(tmp_path / "none")}, ConfigError, "pager_ca=.* cannot be used"),
            (by_name, {}, ConfigError, "certificate is not good"),
            (deaf, {}, TierUnavailableError, "no daemon answers"),
            ("tls://127.0.0.1", {}, ConfigError, "give host:port"),
        ):
            with pytest.raises(kind, match=said) as refused:
                Rig(daemon=where, private_host=4, **settings | change)
            assert TOKEN not in str(refused.value)


def test_a_machine_that_is_gone_without_a_word_is_noticed(tmp_path):
    """The kernel asks after a silent peer, and the connection ends: what it held is free again."""
    with InsideDaemon(tmp_path, host_bytes=1 << 20) as daemon:

        async def serve() -> asyncio.Server:
            return await daemon.loop.create_server(lambda: Connection(daemon.service, daemon.loop), "127.0.0.1", 0)

        server = asyncio.run_coroutine_threadsafe(serve(), daemon.loop).result(10)
        with socket.create_connection(server.sockets[0].getsockname(), 120):
            wait_for(lambda: daemon.service._connections)
            (connection,) = daemon.service._connections
            assert connection.pid == -1 and connection.socket is not None
            assert connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            idle_s, step_s, count = (connection.socket.getsockopt(socket.IPPROTO_TCP, option) for option in options)
            assert idle_s + step_s * count == 60
        daemon.loop.call_soon_threadsafe(server.close)


def test_what_answers_without_tls_is_no_daemon_and_hears_no_token():
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            connection, _ = plain.accept()
            heard.append(connection.recv(1 << 16))
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        thread = Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(TierUnavailableError, match=r"does not answer as a daemon with TLS 1\.3"):
            DaemonConnection.open(f"tls://127.0.0.1:{plain.getsockname()[1]}", Greeting("test", TOKEN))
        thread.join(5)
    assert TOKEN.encode() not in heard[0]


def test_a_key_that_others_can_read_and_files_that_do_not_fit_are_refused(tmp_path, pair):
    cert, key = (tmp_path / file.name for file in pair)
    for copy, file in ((cert, pair[0]), (key, pair[1])):
        copy.write_bytes(file.read_bytes())
        copy.chmod(0o600)
    assert server_context(str(cert), str(key)).minimum_version == ssl.TLSVersion.TLSv1_3
    for path, mode, said in (
        (key, 0o640, r"tls_key=.* can be read by others \(mode 0640\): chmod 600 it"),
        (cert, 0o666, r"tls_cert=.* can be written by others \(mode 0666\)"),
    ):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=said):
            server_context(str(cert), str(key))
        path.chmod(0o600)
    for one, other, said in (
        (cert, tmp_path / "none", "tls_key=.*none.* cannot be read"),
        (tmp_path, key, "tls_cert=.* is not a file"),
        (cert, cert, "are no pair of certificate and key"),
    ):
        with pytest.raises(ConfigError, match=said):
            server_context(str(one), str(other))


@pytest.mark.parametrize("address", ["", "7070", ":7070", "host:", "host:x", "host:70000"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match=r"listen=.*: give host:port"):
        parse_host(address, name="listen")


def test_an_address_is_a_host_and_a_port():
    assert parse_host("[::1]:70", name="listen") == ("::1", 70)
    assert parse_host("192.0.2.7:0", name="listen") == ("192.0.2.7", 0)
    with tcp_listener("127.0.0.1:0", name="listen") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen there"):
            tcp_listener(f"127.0.0.1:{port}", name="listen")
