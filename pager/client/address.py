"""Addresses of daemons: `unix:///run/kvtier/pagerd.sock`. Parsing and connecting, nothing else."""

from __future__ import annotations

import os
import socket

from ...tiers.errors import ConfigError, TierUnavailableError

SCHEME = "unix://"


def is_address(target: object) -> bool:
    return isinstance(target, str) and target.startswith(SCHEME)


def socket_path(address: str) -> str:
    """Raises ConfigError."""
    if not is_address(address):
        raise ConfigError(f"pager={address!r}: a daemon's address is unix:///path/of/pagerd.sock")
    path = address.removeprefix(SCHEME)
    if not os.path.isabs(path):
        raise ConfigError(f"pager={address!r}: give the absolute path of the socket, unix:///...")
    return path


def dial(address: str, timeout_s: float) -> socket.socket:
    """A connected socket. Raises: ConfigError, TierUnavailableError when nobody answers."""
    path = socket_path(address)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise TierUnavailableError(f"no daemon answers at {address}: {error.strerror or error}") from error
    connection.settimeout(None)
    return connection
