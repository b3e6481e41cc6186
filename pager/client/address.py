"""Addresses of daemons: `unix:///run/kvtier/pagerd.sock`, or `tls://host:port` of one on another machine. Parsing, and who
one is there: a token from a file that only its owner reads. Connecting is transport.py's.
"""

from __future__ import annotations

import os
import stat

from ...tiers.errors import ConfigError
from ..wire.hosts import parse_host
from .transport import Transport, client_context, connect_tls, connect_unix

UNIX, TLS = "unix://", "tls://"
MAX_TOKEN_BYTES = 256


def is_address(target: object) -> bool:
    return isinstance(target, str) and target.startswith((UNIX, TLS))


def is_remote(address: str) -> bool:
    """Whether it is on another machine: reached with TLS and a token, and its memory is never ours to map."""
    return address.startswith(TLS)


def socket_path(address: str) -> str:
    """Raises ConfigError."""
    if not is_address(address):
        raise ConfigError(f"pager={address!r}: a daemon's address is unix:///path/of/pagerd.sock or tls://host:port")
    path = address.removeprefix(UNIX)
    if not os.path.isabs(path):
        raise ConfigError(f"pager={address!r}: give the absolute path of the socket, unix:///...")
    return path


def host_and_port(address: str) -> tuple[str, int]:
    """Of a tls:// address. Raises ConfigError."""
    return parse_host(address.removeprefix(TLS), name="pager")


def dial(address: str, timeout_s: float, ca_file: str | None = None) -> Transport:
    """A connection. Raises: ConfigError, TierUnavailableError when nobody answers."""
    if is_remote(address):
        return connect_tls(*host_and_port(address), client_context(ca_file), address, timeout_s)
    return connect_unix(socket_path(address), address, timeout_s)


def read_token(path: str | os.PathLike[str] | None) -> str:
    """The token in a file, "" without one. Raises ConfigError for a file that others can read, and never shows its text."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"pager_token_file={str(path)!r} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode) or mode & 0o077:
        raise ConfigError(
            f"pager_token_file={str(path)!r} can be read by others (mode {mode & 0o777:04o}): chmod 600 it"
        )
    token = text.decode("ascii", "replace").strip()
    if len(text) > MAX_TOKEN_BYTES or not token.isprintable() or not token:
        raise ConfigError(f"pager_token_file={str(path)!r} holds no token; pagerd --new-token makes one")
    return token
