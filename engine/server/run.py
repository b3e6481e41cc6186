"""Running a server until it is told to end: SIGTERM or SIGINT lets running requests finish, parks every session, exits 0.

A second signal does not wait for running requests any longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from ...tiers.errors import ConfigError
from ..engine import Engine
from .app import make_app
from .service import Service
from .settings import ServerSettings, check_exposure

_LOG = logging.getLogger("kvtier.server")
EXPIRE_S = 5.0  # between two looks for pins that are over


def run_server(engine: Engine, settings: ServerSettings, host: str, port: int) -> int:
    """Serve until a signal comes. Returns 0, or 1 when the engine failed or a session could not be parked.

    Raises: ConfigError for an address that cannot be used, and for one that others reach when there are no keys.
    """
    check_exposure(host, settings)
    listener = _listen(host, port)
    service = Service(engine, settings)
    try:
        return asyncio.run(_serve(service, listener, host))
    finally:
        listener.close()


async def _serve(service: Service, listener: socket.socket, host: str) -> int:
    config = uvicorn.Config(
        make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5, ws="none"
    )
    server = _Server(config)
    told, give_up = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (give_up if told.is_set() else told).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    expiring = asyncio.create_task(_expire(service))
    shown = f"[{host}]" if ":" in host else host
    print(
        f"kvtier: serving {service.settings.model_name!r} on http://{shown}:{listener.getsockname()[1]}, context of "
        f"{service.max_context} tokens",
        file=sys.stderr,
        flush=True,
    )
    stopping = asyncio.create_task(told.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await service.drain(give_up)
    expiring.cancel()
    failed = await asyncio.to_thread(service.close)
    server.should_exit = True
    await serving
    service.end_threads()
    if failed:
        print(f"kvtier: {failed} sessions could not be parked; see the log", file=sys.stderr)
    return 1 if failed or service.loop.failure is not None else 0


async def _expire(service: Service) -> None:
    while True:
        await asyncio.sleep(EXPIRE_S)
        if service.loop.is_running:
            await service.on_engine(lambda engine: service.pins.expire())


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error}; choose another") from error
    # asyncio sets this only where a socket names its protocol, which these do not; connections have it from here. Without
    # it a reply's body waits 40 ms for the client's delayed acknowledgement of its head
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
