"""AsyncDaemonConnection: the control half of the protocol for asyncio programs, over the same codec as the blocking client.

For proxies, routers and monitors: look-ups, holds, sessions, status. Blocks themselves move through the blocking client, whose
copies run on streams anyway. Any number of requests in flight; a cancelled call sends CANCEL.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TypeVar

from ...tiers.errors import Busy, ConfigError, KvTierError, ProtocolError, TierUnavailableError
from ..wire import messages
from ..wire.frames import HEADER, Fields, pack, parse_header, unpack
from ..wire.replies import reply_of
from .address import host_and_port, is_remote, socket_path
from .connection import TIMEOUT_S, Greeting, is_taking
from .transport import client_context

M = TypeVar("M")


class AsyncDaemonConnection:
    """Open with `await AsyncDaemonConnection.open(address)`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self._reader, self._writer, self.address = reader, writer, address
        self._waiting: dict[int, asyncio.Future[tuple[int, Fields]]] = {}
        self._ids = itertools.count(1)
        self._lost: KvTierError | None = None
        self.welcome = messages.Welcome(0, [], b"", 0, {}, False, 1, 1)
        self._task = asyncio.create_task(self._read_all())

    @classmethod
    async def open(
        cls, address: str, greeting: Greeting | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> AsyncDaemonConnection:
        """Raises: ConfigError, TierUnavailableError, ProtocolError."""
        said = greeting or Greeting()
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await _connect(address, said.ca_file)
        except (OSError, TimeoutError) as error:
            raise TierUnavailableError(f"no daemon answers at {address}: {error}") from error
        connection = cls(reader, writer, address)
        hello = messages.Hello(said.oldest_version, said.newest_version, [messages.BYTES], said.name, said.token)
        try:
            connection.welcome = await connection.call(hello, messages.Welcome, timeout_s=timeout_s)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def call(self, message: object, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> M:
        """One request and its reply. Raises what the daemon answered; TierUnavailableError when it is gone or silent."""
        if self._lost is not None:
            raise self._lost
        if getattr(message, "want_slab", False):
            raise ConfigError("OPEN with want_slab: the async client maps no memory; say want_slab=False")
        request_id = next(self._ids)
        future = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(request_id, message)
            await self._writer.drain()
            async with asyncio.timeout(timeout_s):
                number, fields = await future
        except TimeoutError:
            if is_taking(message):
                self._writer.close()
            else:
                self._send(next(self._ids), messages.Cancel(request_id))
            raise TierUnavailableError(f"the daemon at {self.address} did not answer in {timeout_s:.1f} s") from None
        except asyncio.CancelledError:
            self._send(next(self._ids), messages.Cancel(request_id))
            raise
        except OSError as error:
            raise TierUnavailableError(f"the daemon at {self.address} is gone: {error}") from error
        finally:
            self._waiting.pop(request_id, None)
        return reply_of(kind, number, fields)

    async def call_patiently(self, message: object, kind: type[M], *, timeout_s: float = TIMEOUT_S) -> M:
        """As `call`, asking again while the daemon says that it is busy, until the time is up."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                return await self.call(message, kind, timeout_s=max(TIMEOUT_S, left_s))
            except Busy as busy:
                if left_s <= busy.retry_after_s:
                    raise
                await asyncio.sleep(busy.retry_after_s)

    async def close(self) -> None:
        """Says GOODBYE, and does not wait for the answer."""
        if self._lost is None and self.welcome.version:
            self._send(next(self._ids), messages.Goodbye(self.welcome.epoch))
        self._task.cancel()
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass

    # ------------------------------------------------------------------ inside
    def _send(self, request_id: int, message: object) -> None:
        number: int = type(message).KIND  # type: ignore[attr-defined]
        self._writer.write(pack(number, request_id, messages.to_fields(message)))

    async def _read_all(self) -> None:
        why: KvTierError = TierUnavailableError(f"the daemon at {self.address} is gone")
        try:
            while True:
                header = parse_header(await self._reader.readexactly(HEADER.size))
                fields = unpack(await self._reader.readexactly(header.size))
                if header.request_id == 0:
                    raise ProtocolError(f"the daemon refused this connection: {fields.get('message')}")
                future = self._waiting.get(header.request_id)
                if future is not None and not future.done():
                    future.set_result((header.kind, fields))
        except ProtocolError as error:
            why = error
        except (OSError, EOFError):
            pass
        finally:
            self._lost = why
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(why)


async def _connect(address: str, ca_file: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if not is_remote(address):
        return await asyncio.open_unix_connection(socket_path(address))
    host, port = host_and_port(address)
    return await asyncio.open_connection(host, port, ssl=client_context(ca_file))
