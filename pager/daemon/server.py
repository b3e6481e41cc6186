"""The daemon as a process: its socket, its loop, and how it ends.

SIGTERM and SIGINT drain: no new model is opened, requests under way end, what only memory holds is written down, then it
exits; a second signal does not wait. A bug in the books
(InvariantError) ends the process at once, because a supervisor that starts it again loses nothing that was durable.
Starting loads neither torch nor zarr.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...tiers.errors import InvariantError
from ...tiers.kernel_calls import keep_heap_small
from ..inspection.publisher import Publisher
from ..wire.messages import VERSION
from .connection import Connection
from .manners import Manners
from .models import CLOSE_TIMEOUT_S, Budget, Models
from .service import Service
from .sockets import BACKLOG, Claim, listen
from .tenants import OwnerOnly, Tenants

EXIT_BUG = 70
_LOG = logging.getLogger("kvtier.pagerd")


@dataclass(frozen=True, slots=True)
class Daemon:
    """What a daemon is made of. `socket_path` is where it listens."""

    socket_path: Path
    budget: Budget
    tenants: Tenants | None = None
    newest_version: int = VERSION  # an older one for tests
    manners: Manners | None = None
    socket_mode: int = 0o600
    inherited: socket.socket | None = None  # of socket activation: it stays when we end
    tcp: tuple[socket.socket, ssl.SSLContext] | None = None

    def run(self, on_ready: Callable[[], object] = lambda: None) -> int:
        """Serve until told to end. Raises ConfigError when the socket cannot be had."""
        keep_heap_small()
        listener = self.inherited or listen(self.socket_path, self.socket_mode)
        ours = None if self.inherited else Claim(self.socket_path)
        try:
            return asyncio.run(self._serve(listener, on_ready))
        finally:
            if ours is not None:
                ours.remove()

    async def _serve(self, listener: socket.socket, on_ready: Callable[[], object]) -> int:
        loop = asyncio.get_running_loop()
        models, tenants = Models(self.budget), self.tenants or OwnerOnly()
        config = None if self.manners is None else self.manners.config
        service = Service(
            models,
            tenants,
            loop,
            newest_version=self.newest_version,
            limits=None if config is None else config.limits,
            allow_ipc=config is not None and config.allow_ipc,
        )
        loop.set_exception_handler(_on_error)
        stop, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        servers: list[asyncio.Server] = [
            await loop.create_unix_server(lambda: Connection(service, loop), sock=listener, backlog=BACKLOG)
        ]
        if self.tcp is not None:
            there, context = self.tcp
            servers.append(await loop.create_server(lambda: Connection(service, loop), sock=there, ssl=context))
        if self.manners is not None:
            await self.manners.begin(service, tenants)
        publisher = Publisher.start(self.socket_path, service.inspector.published)
        _LOG.info("event=ready socket=%s pid=%d", self.socket_path, os.getpid())
        on_ready()
        await stop.wait()
        _LOG.info("event=drain")
        if publisher is not None:
            publisher.close()
        service.begin_drain()
        for server in servers:
            server.close()
        if self.manners is not None:
            await self.manners.drain(service, models, hurry)
        else:
            await service.send_away(time.monotonic() + CLOSE_TIMEOUT_S)
            service.close()
            models.close()
        return 0


def _on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    _LOG.error("event=error reason=%s", context.get("message"), exc_info=error)
    if isinstance(error, InvariantError | AssertionError):
        logging.shutdown()
        os._exit(EXIT_BUG)  # the books are suspect: write nothing more down
