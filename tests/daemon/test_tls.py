"""TCP of the daemon: nothing without TLS 1.3, a token and a private key; then the same verbs, and never the slab."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import sys
from pathlib import Path

import pytest

from kvtier.pager.daemon import secret_files
from kvtier.pager.daemon.tls import client_context, parse_address, server_context, tcp_listener
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, pack, parse_header, unpack
from kvtier.tiers.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from service_process import LAYOUT, Pagerd

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
        plain = socket.create_connection(("127.0.0.1", port), 10)
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
        f'host_bytes = "1MiB"\nhost_prefault = false\nlisten = "127.0.0.1:{port}"\ntls_cert = "{pair[0]}"\n'
        f'tls_key = "{pair[1]}"\nroot_secret_file = "{tmp_path / "root"}"\n'
        f'[namespaces.far]\ntokens = ["{secret_files.hash_token(TOKEN)}"]\n'
    )


def test_a_client_with_a_token_is_served_over_tls_and_gets_no_slab(tmp_path, pair):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
        with socket.create_connection(("127.0.0.1", port), 10) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), 10) as plain:  # in clear there is no answer at all
            plain.sendall(pack(m.Hello.KIND, 1, m.to_fields(hello())))
            try:
                assert plain.recv(100)[:1] in (b"", b"\x15")  # an alert of TLS, or the end
            except ConnectionResetError:
                pass
        assert client.call(m.Lookup(opened["store"], bytes(32), prefix=False))[0] == m.Found.KIND
        assert pagerd.end() == 0


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
        parse_address(address, name="listen")


def test_an_address_is_a_host_and_a_port():
    assert parse_address("[::1]:70", name="listen") == ("::1", 70)
    assert parse_address("192.0.2.7:0", name="listen") == ("192.0.2.7", 0)
    with tcp_listener("127.0.0.1:0", name="listen") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen there"):
            tcp_listener(f"127.0.0.1:{port}", name="listen")
