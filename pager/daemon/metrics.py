"""/metrics of the daemon, over HTTP on a Unix socket of mode 0600 or on loopback; only where the configuration asks for it.

One request per connection, bounded in size and time: enough for a scraper, and nothing else to attack. Guards: an address
that other machines reach is refused, because what is told here asks for no token.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...tiers.errors import ConfigError
from ..wire.hosts import parse_host
from .sockets import Claim

if TYPE_CHECKING:
    from .service import Service

MAX_HEAD_BYTES = 8 << 10
HEAD_TIMEOUT_S = 5.0
_UNIX = "unix://"
_LEVELS = ("connections", "attached_processes", "left_processes", "waiting_requests", "pinned_slots", "uptime_s")
_LOG = logging.getLogger("kvtier.pagerd")


def check_metrics(address: str) -> None:
    """Raises ConfigError for an address that cannot be or that others reach, and where the library is missing."""
    if find_spec("prometheus_client") is None:
        raise ConfigError(f"metrics={address!r} needs prometheus-client: pip install 'kvtier[metrics]'")
    if address.startswith(_UNIX):
        if not os.path.isabs(address.removeprefix(_UNIX)):
            raise ConfigError(f"metrics={address!r}: give the absolute path of a socket, unix:///...")
        path = Path(address.removeprefix(_UNIX))
        if path.exists() and not path.is_socket():
            raise ConfigError(f"metrics={address!r} is there already and is no socket; choose another path")
        return
    host, _ = parse_host(address, name="metrics")
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(f"metrics={address!r}: no token is asked for there; stay on 127.0.0.1, or on a Unix socket")


class MetricsServer:
    """Made by `start`."""

    def __init__(self, server: asyncio.Server, ours: Claim | None = None) -> None:
        self._server, self._ours = server, ours

    @classmethod
    async def start(cls, address: str, text: Callable[[], bytes]) -> MetricsServer:
        """Raises ConfigError when the address cannot be had."""
        check_metrics(address)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                await _answer(reader, writer, text)
            writer.close()

        try:
            if not address.startswith(_UNIX):
                host, port = parse_host(address, name="metrics")
                return cls(await asyncio.start_server(answer, host, port, limit=MAX_HEAD_BYTES))
            path = Path(address.removeprefix(_UNIX))
            previous = os.umask(0o177)
            try:
                path.unlink(missing_ok=True)
                return cls(await asyncio.start_unix_server(answer, str(path), limit=MAX_HEAD_BYTES), Claim(path))
            finally:
                os.umask(previous)
        except OSError as error:
            raise ConfigError(f"metrics={address!r}: cannot listen there: {error.strerror or error}") from error

    def close(self) -> None:
        self._server.close()
        if self._ours is not None:
            self._ours.remove()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: Callable[[], bytes]) -> None:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_TIMEOUT_S)
    method, _, rest = head.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method != b"GET" or path != b"/metrics":
        status, kind, body = "404 Not Found", "text/plain", b"GET /metrics\n"
    else:
        from ..metrics import CONTENT_TYPE

        status, kind, body = "200 OK", CONTENT_TYPE, text()
    lines = f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(lines.encode() + body)
    await asyncio.wait_for(writer.drain(), HEAD_TIMEOUT_S)


class DaemonMetrics:
    """What a scrape reads: the models' pagers added up, and the daemon's own levels."""

    def __init__(self, service: Service) -> None:
        from prometheus_client import CollectorRegistry

        self._service = service
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type]

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        from importlib.metadata import version  # brings the mail parser: not while a daemon starts

        from prometheus_client.core import InfoMetricFamily

        from ..metrics import counter, gauge, of_counters, of_tiers

        status = self._service.status()
        pagers = [one for one in (status, *status.get("models", [])) if "tiers" in one]
        rows = [row for pager in pagers for row in pager["counters"]]
        yield from of_counters(rows, pagers[0]["policy"] if pagers else "")
        yield from of_tiers(_added([pager["tiers"] for pager in pagers]))
        own = status["daemon"]
        for name in _LEVELS:
            yield gauge(f"kvtier_daemon_{name.replace('uptime_s', 'uptime_seconds')}", {(): own[name]})
        yield gauge("kvtier_daemon_models", {(): len(pagers)})
        yield gauge("kvtier_ready", {(): int(not own["is_draining"])})
        yield counter("kvtier_daemon_stale_requests", {(): own["stale_requests"]})
        held: Counter[tuple[str, str]] = Counter()
        for pager in pagers:
            for name, row in pager.get("namespaces", {}).items():
                held[name, "nvme"] += row["used_bytes"]
                held[name, "host"] += row["host_used_bytes"]
        yield gauge("kvtier_namespace_bytes", held)
        yield InfoMetricFamily("kvtier_build", "What runs.", {"version": version("kvtier")})


def _added(tiers: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Levels of all pagers together, by tier."""
    total: dict[str, dict[str, Any]] = {}
    for one in tiers:
        for tier, levels in one.items():
            into = total.setdefault(tier, {})
            for name, value in levels.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    into[name] = into.get(name, 0) + value
    return total
