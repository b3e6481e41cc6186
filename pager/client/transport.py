"""Transports: the bytes of a daemon connection over a Unix socket, which carries descriptors too, or over TCP with TLS 1.3.

One thread receives while others send. OpenSSL's state is not made for that, so TLS runs in memory under a lock that nobody
holds while waiting for the network. Guards: nothing is sent before the daemon's certificate and name were checked, and
there is no way to an older protocol or to TCP without TLS.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from typing import Protocol

from ...tiers.errors import ConfigError, TierUnavailableError

MAX_FDS = 64
PIECE_BYTES = 256 << 10  # encrypted or received at once
SEND_BYTES = 512 << 10  # of the socket: a look-up of 8,192 keys leaves without waiting, where the kernel grants it


class Transport(Protocol):
    """Blocking. Receiving is one thread's, sending anybody's, one frame at a time."""

    def send(self, data: memoryview) -> None:
        """All of it. Raises OSError."""

    def receive_into(self, target: memoryview) -> int:
        """Some bytes, at least one; 0 at the end of the stream. Raises OSError."""

    def receive_with_fds(self, size: int) -> tuple[bytes, list[int]]:
        """Up to `size` bytes and the descriptors that came with them."""

    def shut(self) -> None:
        """Wake whoever receives: the stream is over."""

    def close(self) -> None: ...


class UnixTransport:
    """Over a connected Unix socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, data: memoryview) -> None:
        self._socket.sendall(data)

    def receive_into(self, target: memoryview) -> int:
        return self._socket.recv_into(target)

    def receive_with_fds(self, size: int) -> tuple[bytes, list[int]]:
        data, fds, _, _ = socket.recv_fds(self._socket, size, MAX_FDS)
        return data, list(fds)

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class TlsTransport:
    """Over a connected TCP socket; shakes hands on construction, within its timeout."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, host: str) -> None:
        """Raises: ssl.SSLError, other OSError."""
        self._socket = connected
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._guard = threading.Lock()  # of the TLS state
        self._sending = threading.Lock()  # records leave in the order in which they were made
        while not self._has_shaken_hands():
            self._socket.sendall(self._out.read())
            self._take(self._socket.recv(PIECE_BYTES))
        self._socket.sendall(self._out.read())

    def send(self, data: memoryview) -> None:
        """What TLS itself has to say, as after a change of keys, goes out before it."""
        left = data.cast("B")
        with self._sending:
            while left.nbytes:
                with self._guard:
                    written = self._tls.write(left[:PIECE_BYTES])
                    records = self._out.read()
                self._socket.sendall(records)
                left = left[written:]

    def receive_into(self, target: memoryview) -> int:
        while True:
            with self._guard, contextlib.suppress(ssl.SSLWantReadError):
                try:  # into memory it returns how many, whatever its stub says
                    return int(self._tls.read(target.nbytes, target))  # type: ignore[arg-type]
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return 0
            self._take(self._socket.recv(PIECE_BYTES))

    def receive_with_fds(self, size: int) -> tuple[bytes, list[int]]:
        found = bytearray(size)
        return bytes(found[: self.receive_into(memoryview(found))]), []

    def shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    # ------------------------------------------------------------------ inside
    def _has_shaken_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _take(self, received: bytes) -> None:
        with self._guard:
            if received:
                self._in.write(received)
            else:
                self._in.write_eof()


def client_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Checks the daemon's certificate and name, against `ca_file` or the system's authorities. Raises ConfigError."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"pager_ca={ca_file!r} cannot be used: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def connect_unix(path: str, address: str, timeout_s: float) -> Transport:
    """Raises TierUnavailableError when nobody answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise TierUnavailableError(f"no daemon answers at {address}: {error.strerror or error}") from error
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    return UnixTransport(connection)


def connect_tls(host: str, port: int, context: ssl.SSLContext, address: str, timeout_s: float) -> Transport:
    """Raises: TierUnavailableError when nobody answers; ConfigError when it is not who the certificate should name."""
    try:
        connection = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise TierUnavailableError(f"no daemon answers at {address}: {error.strerror or error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = TlsTransport(connection, context, host)
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise ConfigError(
            f"pager={address!r}: its certificate is not good ({error.verify_message}); pager_ca names who signed it"
        ) from error
    except OSError as error:
        connection.close()
        raise TierUnavailableError(f"{address} does not answer as a daemon with TLS 1.3: {error}") from error
    connection.settimeout(None)
    return transport
