"""The daemon's service on a thread of this process, where a test has to see or change what a process of its own hides."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from kvtier.pager.daemon.connection import Connection
from kvtier.pager.daemon.models import Budget, Models
from kvtier.pager.daemon.service import Service
from kvtier.pager.daemon.sockets import listen
from kvtier.pager.daemon.store import SharedStore
from kvtier.pager.daemon.tenants import OwnerOnly, Tenants
from kvtier.pager.rules import ALL_RULES, Rules
from kvtier.pager.wire.messages import VERSION


class InsideDaemon:
    """A context: `service` and `address`."""

    def __init__(
        self,
        folder: Path,
        *,
        host_bytes: int,
        tenants: Tenants | None = None,
        rules: Rules = ALL_RULES,
        version: int = VERSION,
        allow_ipc: bool = False,
        **budget: Any,
    ) -> None:
        self._socket = folder / "inside.sock"
        self.address = f"unix://{self._socket}"
        self.loop = asyncio.new_event_loop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        settings = {"host_prefault": False}
        self.models = Models(Budget(host_bytes, settings=settings, **budget))
        self._options = {"newest_version": version, "rules": rules, "allow_ipc": allow_ipc}
        self._tenants = tenants or OwnerOnly()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> InsideDaemon:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self.loop).result(60)
        return self

    async def _begin(self) -> None:
        self.service = Service(self.models, self._tenants, self.loop, **self._options)
        listener = listen(self._socket)
        self._server = await self.loop.create_unix_server(lambda: Connection(self.service, self.loop), sock=listener)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()
        self._socket.unlink(missing_ok=True)
        assert not self.errors, self.errors

    async def _end(self) -> None:
        self._server.close()
        await self.service.send_away(time.monotonic() + 60)
        self.service.close()
        self.models.close()

    @property
    def store(self) -> SharedStore:
        """Of the only model."""
        (store,) = self.models._stores.values()
        return store
