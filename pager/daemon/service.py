"""Service: where a frame goes. Finds the attachment behind a connection, serves tenants in turn, and looks for progress.

One event loop serves all connections. What a request means is the business of verbs.py and bulk.py, who its sender is that of
attached.py; here a frame is decoded, put into its tenant's queue and answered, with an error of ours where it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from ...tiers.errors import InvariantError, KvTierError, ProtocolError, QueueFullError, TierUnavailableError
from .. import protocol
from ..clients import Clients
from ..rules import ALL_RULES, Rules
from ..wire import messages as m
from ..wire.frames import Header, pack, unpack
from .attached import Attachment, Attachments
from .bulk import BlockTransfers
from .connection import Connection
from .copying import CopyDesk
from .inspecting import DaemonInspector, may_inspect
from .models import Models
from .request_room import RequestRoom
from .settings import Limits
from .tenants import Tenants
from .threads import Threads
from .turns import Turns
from .verbs import Verb, Verbs

INSPECTORS = "inspectors"  # the name under which their questions queue
LOOK_S = 0.02  # between two looks at what is to end
TICK_S = 0.1  # how often it looks for clients that are gone, whatever else happens
_LOG = logging.getLogger("kvtier.pagerd")


class Service:
    """The handler of all connections of one daemon."""

    def __init__(
        self,
        models: Models,
        tenants: Tenants,
        loop: asyncio.AbstractEventLoop,
        *,
        newest_version: int = m.VERSION,
        rules: Rules = ALL_RULES,
        limits: Limits | None = None,
        allow_ipc: bool = False,
        processes: Clients | None = None,
        clock: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.models, self._loop = models, loop
        self.limits = limits or Limits()
        self.processes = Clients(rules) if processes is None else processes
        self.copies = CopyDesk(models, rules)
        self.attachments = Attachments(
            models,
            tenants,
            self.processes,
            rules,
            self.copies,
            newest_version=newest_version,
            random_bytes=random_bytes,
            allow_ipc=allow_ipc,
        )
        self.attachments.drop = self.disconnected
        self._connections: dict[Connection, None] = {}
        self._silent: dict[Connection, float] = {}  # those that have not said who they are, and since when
        self.threads = Threads(loop)
        self.turns = Turns(loop, clock)
        self.verbs = Verbs(models, self.threads, self.copies)
        self._blocks = BlockTransfers(models, self.attachments)
        self._room = RequestRoom(self.attachments)
        own: dict[int, Verb] = {
            m.Goodbye.KIND: self._goodbye,
            m.Read.KIND: self._blocks.read,
            m.Settle.KIND: self._settle,
        }
        self._by_kind = self.verbs.by_kind | own
        self._is_look_due = False
        self._clock, self._started_s = clock, clock()
        self.inspector = DaemonInspector(models, self.status)
        models.on_progress = self._wake
        self._tick: asyncio.TimerHandle | None = loop.call_later(TICK_S, self._on_tick)

    # ------------------------------------------------------------------ connections
    @property
    def limits(self) -> Limits:
        """What each connection may have in flight, and how many there may be; as of the last SIGHUP."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self.requests_in_flight, self.bytes_in_flight = limits.requests_in_flight, limits.num_bytes_in_flight

    @property
    def is_draining(self) -> bool:
        """No model is opened any more."""
        return self.verbs.is_draining

    @property
    def num_waiting(self) -> int:
        """Requests that have no answer yet."""
        return len(self.verbs.waiting) + len(self.turns) + self.copies.num_orders + len(self.threads)

    def begin_drain(self) -> None:
        self.verbs.is_draining = True

    def connected(self, connection: Connection) -> None:
        """Nothing is promised before HELLO, but that there are not too many, in all and of one user or machine."""
        most, others = self.limits.connections, self._connections
        same = sum((one.uid, one.host) == (connection.uid, connection.host) for one in others)
        if len(others) >= most or same >= self.limits.connections_of_one:
            _LOG.warning("event=refuse_client pid=%d reason=limits.connections=%d", connection.pid, most)
            what = f"{len(others)} connections are open, {same} of them from here; raise limits.connections={most}"
            connection.refuse(QueueFullError(what, retry_after_s=1.0))
        else:
            self._connections[connection], self._silent[connection] = None, self._clock()

    def received(self, connection: Connection, header: Header, body: bytes, payload_bytes: int) -> memoryview | None:
        """Raises ProtocolError where the stream cannot go on; what is wrong with one request is only that one's reply."""
        attachment = self.attachments.by_connection.get(connection)
        if header.kind == protocol.STATUS_REQUEST:
            self._answer_status(connection, header)
            self._silent.pop(connection, None)
        elif header.kind == protocol.INSPECT_REQUEST and may_inspect(connection.uid):
            self._inspect(connection, header, bytes(body))
            self._silent.pop(connection, None)
        elif header.kind == m.Hello.KIND:
            self._silent.pop(connection, None)
            self.attachments.hello(connection, header.request_id, m.from_fields(m.Hello, unpack(body)), self.limits)
        elif attachment is None:
            raise ProtocolError(f"message {header.kind} before HELLO")
        elif header.kind == m.Cancel.KIND:
            self._cancel(connection, m.from_fields(m.Cancel, unpack(body)).request)
        elif header.is_raw:
            return self._blocks.begin_write(attachment, header, unpack(body), payload_bytes)
        else:
            self.turns.put(attachment.tenant.name, lambda: self._serve(attachment, header, body))
        return None

    def may_take(self, connection: Connection, nbytes: int) -> bool:
        return self._room.may_take(connection, nbytes)

    def payload_done(self, connection: Connection, header: Header) -> None:
        self._blocks.payload_done(connection, header)

    def drained(self) -> None:
        self._blocks.drained()

    def disconnected(self, connection: Connection) -> None:
        """Nobody will ask for more."""
        self._connections.pop(connection, None)
        self._silent.pop(connection, None)
        self._blocks.forget(connection)
        self._room.forget(connection)
        attachment = self.attachments.disconnected(connection)
        if attachment is not None:
            self.verbs.forget(attachment)

    def show_out(self) -> None:
        """After a reload: who may no longer have what its connection was given, loses the connection at once."""
        self.attachments.show_out()

    # ------------------------------------------------------------------ one request
    def _serve(self, attachment: Attachment, header: Header, body: bytes) -> None:
        connection = attachment.connection
        if connection is None or header.request_id in connection.cancelled:
            if connection is not None:
                connection.drop_reply(header.request_id)
            return
        try:
            kind = m.REQUEST_BY_KIND.get(header.kind)
            if kind is None or header.kind not in self._by_kind:
                raise ProtocolError(f"message {header.kind} is unknown to version {connection.version}")
            message: Any = m.from_fields(kind, unpack(body))
            self.attachments.check_epoch(attachment, message)
            answer = self._by_kind[header.kind](attachment, header.request_id, message)
        except InvariantError:
            raise
        except KvTierError as error:
            connection.fail(header.request_id, error)
            return
        if answer is not None:
            connection.reply(header.request_id, answer)

    def _cancel(self, connection: Connection, request_id: int) -> None:
        if self.verbs.cancel(connection, request_id):
            connection.drop_reply(request_id)
        else:
            connection.cancel(request_id)

    def _goodbye(self, attachment: Attachment, request_id: int, message: m.Goodbye) -> object:
        if self._blocks.is_writing(attachment.connection):
            raise ProtocolError("GOODBYE in the middle of a WRITE")
        self.attachments.goodbye(attachment)
        self.copies.when_idle(attachment, lambda: attachment.say(request_id, m.Bye()))
        return None

    def _settle(self, attachment: Attachment, request_id: int, message: m.Settle) -> object:
        """The client's earlier connection is over, also where we have not noticed yet; no order of it is left then."""
        if message.previous_epoch == attachment.epoch:
            raise ProtocolError(f"SETTLE: epoch {attachment.epoch} is this connection's own")
        earlier = self.attachments.earlier(attachment, message.previous_epoch)
        if earlier is None:
            return m.Settled()
        if (connection := earlier.connection) is not None:
            connection.close()
            self.disconnected(connection)
        self.copies.when_idle(earlier, lambda: attachment.say(request_id, m.Settled()))
        return None

    # ------------------------------------------------------------------ progress
    def _wake(self) -> None:
        """From any thread: a copy has finished somewhere."""
        if not self._is_look_due:
            self._is_look_due = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._is_look_due = False
        self.verbs.look()
        self.copies.look()

    def _refuse_silent(self) -> None:
        too_old_s = self._clock() - self.limits.hello_s
        for connection in [one for one, since_s in self._silent.items() if since_s < too_old_s]:
            _LOG.warning("event=refuse_client pid=%d reason=no HELLO", connection.pid)
            connection.refuse(ProtocolError(f"no HELLO within {self.limits.hello_s:.0f} s"))
            self.disconnected(connection)

    def _on_tick(self) -> None:
        self.processes.reap()
        for connection in self._connections:
            connection.rest()
        self._refuse_silent()
        self._room.look()
        self.drained()
        self._look()
        self._tick = self._loop.call_later(TICK_S, self._on_tick)

    async def send_away(self, until_s: float) -> None:
        """Nobody waits for others any more: they are told so, and what runs on threads ends; until then at the latest."""
        self.threads.stop()
        self.models.end_waits()
        await asyncio.sleep(0)  # their answers go out
        while len(self.threads) and self._clock() < until_s:
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(0)  # and theirs

    def close(self) -> None:
        """Joins no thread, so that the loop lives on; see send_away."""
        if self._tick is not None:
            self._tick.cancel()
        for connection in list(self._connections):
            connection.send_away(TierUnavailableError("the daemon is shutting down"))
        self.threads.close()
        self.processes.close()

    # ------------------------------------------------------------------ status
    def status(self) -> dict[str, Any]:
        """The pagers' status, and of the daemon: who is attached and what they hold."""
        return self.models.status() | {
            "daemon": {
                "boot": self.attachments.boot.hex(),
                "uptime_s": self._clock() - self._started_s,
                "connections": len(self.attachments.by_connection),
                "attached_processes": len(self.processes),
                "left_processes": len(self.attachments.left),
                "waiting_requests": self.num_waiting,
                "pinned_slots": self.models.pinned_slots(),
                "stale_requests": self.attachments.num_stale,
                "is_draining": self.is_draining,
            }
        }

    def _inspect(self, connection: Connection, header: Header, body: bytes) -> None:
        """On a thread: a view of a million blocks takes longer than a client should wait."""

        def say(reply: asyncio.Future[bytes]) -> None:
            if reply.exception() is None:
                connection.send_frame(header.request_id, reply.result())
            else:
                _LOG.error("event=inspect_failed reason=%s", reply.exception())
                connection.fail(
                    header.request_id, KvTierError("the question could not be answered; see the daemon's log")
                )

        work = functools.partial(self.inspector.reply, header.request_id, body)
        self.threads.run(INSPECTORS, work).add_done_callback(say)

    def _answer_status(self, connection: Connection, header: Header) -> None:
        """Of all tenants together, so for the daemon's own user and root alone."""
        if connection.uid not in (0, os.geteuid()):
            raise ProtocolError("STATUS is answered to the daemon's own user and to root")
        connection.send_frame(header.request_id, pack(protocol.STATUS_REPLY, header.request_id, self.status()))
