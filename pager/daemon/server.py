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

from ...tiers.errors import ConfigError, InvariantError
from ...tiers.kernel_calls import keep_heap_small
from ..inspection.publisher import Publisher
from ..wire.messages import VERSION
from .connection import Connection
from .manners import Manners
from .models import CLOSE_TIMEOUT_S, Budget, Models
from .service import Service
from .tenants import OwnerOnly, Tenants

EXIT_BUG = 70
BACKLOG = 64
MAX_PATH_BYTES = 100  # sun_path holds 108
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
        try:
            return asyncio.run(self._serve(listener, on_ready))
        finally:
            if self.inherited is None:
                self.socket_path.unlink(missing_ok=True)

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


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening Unix socket of that mode. A socket that nobody answers on is taken over.

    Raises ConfigError: path too long, another daemon there, directory missing or not writable.
    """
    if len(str(path).encode()) > MAX_PATH_BYTES:
        raise ConfigError(f"socket={str(path)!r} has more than {MAX_PATH_BYTES} bytes; choose a shorter path")
    if path.exists() and not path.is_socket():
        raise ConfigError(f"socket={str(path)!r} is there already and is no socket; choose another path")
    if not path.parent.is_dir():
        folder = str(path.parent)
        raise ConfigError(f"socket={str(path)!r} cannot be made: there is no directory {folder!r}; make it first")
    if path.is_socket() and _answers(path):
        raise ConfigError(f"socket={str(path)!r}: another daemon listens there; stop it or choose another path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o777 & ~mode)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"socket={str(path)!r} cannot be made: {error.strerror}") from error
    finally:
        os.umask(previous)
    listener.listen(BACKLOG)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    _LOG.error("event=error reason=%s", context.get("message"), exc_info=error)
    if isinstance(error, InvariantError | AssertionError):
        logging.shutdown()
        os._exit(EXIT_BUG)  # the books are suspect: write nothing more down
