"""Hosts and ports as people write them: "192.0.2.7:7070", "[::1]:7070". Parsing and nothing else."""

from __future__ import annotations

from ...tiers.errors import ConfigError


def parse_host(text: str, *, name: str) -> tuple[str, int]:
    """Host and port. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ConfigError(f"{name}={text!r}: give host:port, such as 192.0.2.7:7070 or [::1]:7070")
    return host, int(port)
