"""TCP for clients on other machines: TLS 1.3 with our certificate, and an address; nothing is served without both.

The token in HELLO says who a client is; TLS keeps it and the blocks from whoever listens. Guards: a key that others can
read is refused, and there is no way to a context with an older protocol.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
from pathlib import Path

from ...tiers.errors import ConfigError
from ..wire.hosts import parse_host

BACKLOG = 64


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """Raises ConfigError naming tls_cert or tls_key."""
    _require_file("tls_cert", cert, is_private=False)
    _require_file("tls_key", key, is_private=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"tls_cert={cert!r}, tls_key={key!r} are no pair of certificate and key: {error}") from error
    return context


def tcp_listener(address: str, *, name: str) -> socket.socket:
    """Raises ConfigError for an address that cannot be had."""
    host, port = parse_host(address, name=name)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"{name}={address!r}: cannot listen there: {error.strerror or error}") from error


def _require_file(name: str, path: str, *, is_private: bool) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{name}={path!r} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{name}={path!r} is not a file")
    if found.st_mode & 0o022:
        raise ConfigError(f"{name}={path!r} can be written by others (mode {found.st_mode & 0o777:04o}): chmod go-w it")
    if is_private and found.st_mode & 0o077:
        raise ConfigError(
            f"{name}={Path(path)!s} can be read by others (mode {found.st_mode & 0o777:04o}): chmod 600 it"
        )


def _no_password() -> str:
    """OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted; give one that is not, and keep it from others by its mode")
