"""Service: what a frame means. Decodes requests, finds the client behind them, calls the store, answers.

One event loop serves all connections; flush and sessions wait on threads of a small pool. What a client holds belongs to
its attachment: a process, known by its pidfd, with an epoch that every request names. Guards rules 9 and 10: a request of
another epoch changes nothing, and an attachment ends with its process or its GOODBYE, not with its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...tiers.errors import (
    ConfigError,
    InvariantError,
    KvTierError,
    ProtocolError,
    QueueFullError,
    StaleLeaseError,
    TierUnavailableError,
)
from ...tiers.layout import KVLayout
from .. import protocol
from ..clients import Clients
from ..rules import ALL_RULES, Rule, Rules
from ..states import IntArray
from ..wire import messages as m
from ..wire.frames import Fields, Header, pack, unpack
from .connection import Connection
from .inspecting import DaemonInspector, may_inspect
from .models import Models
from .settings import Limits
from .tenants import Tenant, Tenants
from .turns import Turns

if TYPE_CHECKING:
    from .reading import LeaseRequest
    from .store import Client, SharedStore

TICK_S = 0.1  # how often it looks for clients that are gone, whatever else happens
SLOW_THREADS = 4
SESSIONS_PER_REPLY = 1000
MAX_UNSENT_BYTES = 4 << 20  # of all connections' replies together; further blocks wait
MAX_WAIT_S = 60.0
_LOG = logging.getLogger("kvtier.pagerd")
T = TypeVar("T")


@dataclass(eq=False)
class Attachment:
    """One attached process: everything that it holds is in here, by store."""

    epoch: int
    tenant: Tenant
    process: int  # of Clients; 0 for a peer on another machine
    connection: Connection | None
    stores: dict[int, Client] = field(default_factory=dict)


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
    ) -> None:
        self.models, self._tenants, self._loop, self._rules = models, tenants, loop, rules
        self.limits = limits or Limits()
        self._connections: set[Connection] = set()
        self._unsent: deque[Callable[[], None]] = deque()
        self._newest = newest_version
        self.boot = os.urandom(16)
        self.processes = Clients(rules)
        self.turns = Turns(loop)
        self._attachments: dict[Connection, Attachment] = {}
        self._writing: dict[Connection, Client] = {}  # whose payload is on its way into a slot
        self._left: dict[int, Attachment] = {}  # connection gone, process alive, by epoch
        self._next_epoch = int.from_bytes(os.urandom(7), "little")
        self._waiting: dict[int, tuple[Attachment, int, int]] = {}  # id of a lease request -> who, request id, store
        self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="kvtier-slow")
        self._is_look_due = False
        self._started_s = time.monotonic()
        self.is_draining = False
        self.num_stale = 0
        self.inspector = DaemonInspector(models, self.status)
        models.on_progress = self._wake
        self._tick: asyncio.TimerHandle | None = loop.call_later(TICK_S, self._on_tick)
        self._verbs: dict[int, Callable[[Attachment, int, Any], object]] = {
            m.Open.KIND: self._open,
            m.Lookup.KIND: self._lookup,
            m.Reserve.KIND: self._reserve,
            m.Commit.KIND: self._commit,
            m.Lease.KIND: self._lease,
            m.Release.KIND: self._release,
            m.Hold.KIND: self._hold,
            m.Unhold.KIND: self._unhold,
            m.Read.KIND: self._read,
            m.Flush.KIND: self._flush,
            m.PutSession.KIND: self._put_session,
            m.GetSession.KIND: self._get_session,
            m.DropSession.KIND: self._drop_session,
            m.ListSessions.KIND: self._list_sessions,
            m.Goodbye.KIND: self._goodbye,
            m.FindModel.KIND: self._find_model,
        }

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
    def num_waiting(self) -> int:
        """Requests that have no answer yet and are not on a thread."""
        return len(self._waiting) + len(self.turns)

    def connected(self, connection: Connection) -> None:
        """Nothing is promised before HELLO, but that there are not too many."""
        if len(self._connections) >= self.limits.connections:
            _LOG.warning(
                "event=refuse_client pid=%d reason=limits.connections=%d", connection.pid, self.limits.connections
            )
            busy = QueueFullError(
                f"{self.limits.connections} connections are open; raise limits.connections", retry_after_s=1.0
            )
            connection.refuse(busy)
        else:
            self._connections.add(connection)

    def received(self, connection: Connection, header: Header, body: bytes, payload_bytes: int) -> memoryview | None:
        """Raises ProtocolError where the stream cannot go on; what is wrong with one request is only that one's reply."""
        attachment = self._attachments.get(connection)
        if header.kind == protocol.STATUS_REQUEST:
            self._answer_status(connection, header)
        elif header.kind == protocol.INSPECT_REQUEST and may_inspect(connection.uid):
            self._inspect(connection, header, bytes(body))
        elif header.kind == m.Hello.KIND:
            self._hello(connection, header.request_id, m.from_fields(m.Hello, unpack(body)))
        elif attachment is None:
            raise ProtocolError(f"message {header.kind} before HELLO")
        elif header.kind == m.Cancel.KIND:
            self._cancel(connection, m.from_fields(m.Cancel, unpack(body)).request)
        elif header.is_raw:
            return self._begin_write(attachment, header, unpack(body), payload_bytes)
        else:
            self.turns.put(attachment.tenant.name, lambda: self._serve(attachment, header, body))
        return None

    def payload_done(self, connection: Connection, header: Header) -> None:
        client = self._writing.pop(connection, None)
        if client is not None:
            client.writing = None
            connection.reply(header.request_id, m.Written())

    def disconnected(self, connection: Connection) -> None:
        """Nobody will ask for more; copies of the process may still run (rule 10)."""
        self._connections.discard(connection)
        attachment = self._attachments.pop(connection, None)
        if attachment is None:
            return
        attachment.connection = None
        writer = self._writing.pop(connection, None)
        if writer is not None:
            writer.writing = None
        for key in [key for key, (who, _, _) in self._waiting.items() if who is attachment]:
            del self._waiting[key]
        for client in attachment.stores.values():
            client.sessions.clear()
        if attachment.process and attachment.stores:
            self._left[attachment.epoch] = attachment
            self.processes.disconnected(attachment.process)
        elif attachment.process:
            self.processes.release(attachment.process)  # it never had a slot
        else:
            self._end(attachment)  # not on this machine: it has no slab, so none of its copies can be under way

    def _end(self, attachment: Attachment) -> None:
        """Let go of everything; its process is gone or its copies are over."""
        self._left.pop(attachment.epoch, None)
        for number, client in attachment.stores.items():
            self.models.detach(number, client)
        attachment.stores.clear()

    # ------------------------------------------------------------------ hello
    def _hello(self, connection: Connection, request_id: int, hello: m.Hello) -> None:
        if connection in self._attachments:
            raise ProtocolError("HELLO a second time")
        version = min(self._newest, hello.max_version)
        if version < max(m.OLDEST_VERSION, hello.min_version):
            raise ProtocolError(
                f"no common version: this daemon speaks {m.OLDEST_VERSION} to {self._newest}, the client "
                f"{hello.min_version} to {hello.max_version}"
            )
        tenant = self._tenants.find(connection.uid, hello.token, connection.gids)
        if tenant is None:
            raise ProtocolError(f"uid {connection.uid} is not let in; see the daemon's configuration")
        self._next_epoch += 1
        attachment = Attachment(self._next_epoch, tenant, 0, connection)
        if connection.pid > 0:
            attachment.process = self.processes.attach(connection.pid)
            self.processes.hold(attachment.process, lambda: self._end(attachment))
        self._attachments[connection] = attachment
        self._end_previous(connection.pid, hello)
        connection.version = version
        features = [name for name in m.FEATURES if name in hello.features and (name != m.SLAB or tenant.maps_slab)]
        namespaces: dict[object, object] = {name: secret for name, secret in tenant.namespaces.items()}
        welcome = m.Welcome(
            version,
            list(features),
            self.boot,
            attachment.epoch,
            namespaces,
            tenant.owns_all,
            self.limits.requests_in_flight,
            self.limits.num_bytes_in_flight,
        )
        connection.reply(request_id, welcome)
        _LOG.info("event=attach pid=%d tenant=%s version=%d", connection.pid, tenant.name, version)

    def _end_previous(self, pid: int, hello: m.Hello) -> None:
        """The same process is back and says that no copy of its earlier attachment runs any more."""
        previous = self._left.get(hello.previous_epoch)
        if previous is not None and hello.previous_boot == self.boot and self.processes.pid(previous.process) == pid:
            self.processes.release(previous.process)

    def _goodbye(self, attachment: Attachment, request_id: int, message: m.Goodbye) -> object:
        if attachment.connection in self._writing:
            raise ProtocolError("GOODBYE in the middle of a WRITE")
        if attachment.process:
            self.processes.release(attachment.process)
            attachment.process = 0
        else:
            self._end(attachment)
        return m.Bye()

    # ------------------------------------------------------------------ one request
    def _serve(self, attachment: Attachment, header: Header, body: bytes) -> None:
        connection = attachment.connection
        if connection is None or header.request_id in connection.cancelled:
            if connection is not None:
                connection.drop_reply(header.request_id)
            return
        try:
            kind = m.REQUEST_BY_KIND.get(header.kind)
            if kind is None or header.kind not in self._verbs:
                raise ProtocolError(f"message {header.kind} is unknown to version {connection.version}")
            message: Any = m.from_fields(kind, unpack(body))
            self._check_epoch(attachment, message)
            answer = self._verbs[header.kind](attachment, header.request_id, message)
        except InvariantError:
            raise
        except KvTierError as error:
            connection.fail(header.request_id, error)
            return
        if answer is not None:
            connection.reply(header.request_id, answer)

    def _check_epoch(self, attachment: Attachment, message: Any) -> None:
        epoch = getattr(message, "epoch", attachment.epoch)
        if epoch != attachment.epoch and self._rules.holds(Rule.OLD_EPOCH_CHANGES_NOTHING):  # rule 9
            self.num_stale += 1
            raise StaleLeaseError(f"epoch {epoch} is over; this attachment has epoch {attachment.epoch}")

    def _cancel(self, connection: Connection, request_id: int) -> None:
        for key, (attachment, waiting_id, number) in list(self._waiting.items()):
            if attachment.connection is connection and waiting_id == request_id:
                del self._waiting[key]
                self.models.cancel(number, attachment.stores[number], key)
        connection.cancel(request_id)

    # ------------------------------------------------------------------ verbs
    def _open(self, attachment: Attachment, request_id: int, message: m.Open) -> object:
        """On a thread: a store that is new to this process is made or recovered there."""
        if self.is_draining:
            raise TierUnavailableError("the daemon is shutting down")
        layouts = tuple(_layout_of(fields) for fields in message.layouts)
        about = {str(name): value for name, value in message.about.items()}

        def attach() -> tuple[int, SharedStore, Client]:
            return self.models.attach(layouts, message.model_fingerprint, about, attachment.tenant)

        def attached(made: tuple[int, SharedStore, Client]) -> None:
            self._answer_open(attachment, request_id, *made, want_slab=message.want_slab)

        self._on_thread(attachment, request_id, attach, attached)
        return None

    def _answer_open(
        self,
        attachment: Attachment,
        request_id: int,
        number: int,
        store: SharedStore,
        client: Client,
        *,
        want_slab: bool,
    ) -> None:
        if attachment.connection is None or number in attachment.stores:
            store.detach(client)  # gone meanwhile, or asked twice
        else:
            attachment.stores[number] = client
        if attachment.connection is None:
            return
        groups = range(len(store.core.groups))
        may_map = want_slab and attachment.tenant.maps_slab and attachment.process > 0
        opened = m.Opened(
            number,
            [len(store.core.groups[i].host) for i in groups],
            [store.lease_limit(i) for i in groups],
            [store.capacity_blocks(i) for i in groups],
            store.core.nvme is not None,
            may_map,
        )
        if may_map:
            attachment.connection.reply_with_fds(request_id, opened, store.fds)
        else:
            attachment.connection.reply(request_id, opened)

    def _find_model(self, attachment: Attachment, request_id: int, message: m.FindModel) -> object:
        _require_version(attachment, 2, "FIND_MODEL")
        return m.ModelFound(self.models.block_size_of(message.model_fingerprint))

    def _client(self, attachment: Attachment, number: int, group: int = 0) -> tuple[SharedStore, Client]:
        client = attachment.stores.get(number)
        if client is None:
            raise ProtocolError(f"store {number} is not open in this connection; send OPEN first")
        if not group < len(client.holdings):
            raise ProtocolError(f"layer group {group}: store {number} has {len(client.holdings)}")
        return self.models.store(number), client

    def _lookup(self, attachment: Attachment, request_id: int, message: m.Lookup) -> object:
        store, client = self._client(attachment, message.store)
        found = store.lookup(
            client, _keys(message.keys), prefix=message.prefix, hold=message.hold and _can_hold(attachment)
        )
        return m.Found(found.tobytes(), found.shape[1])

    def _reserve(self, attachment: Attachment, request_id: int, message: m.Reserve) -> object:
        store, client = self._client(attachment, message.store, message.group)
        slots, generations = store.reserve(client, message.group, min(message.count, m.MAX_KEYS))
        return m.Slots(slots.astype("<i4").tobytes(), generations.tobytes())

    def _commit(self, attachment: Attachment, request_id: int, message: m.Commit) -> object:
        store, client = self._client(attachment, message.store, message.group)
        keys, parents = _keys(message.keys), _keys(message.parents)
        slots = _slots(message.slots, client, message.group)
        tokens, owners = _words(message.tokens, "tokens"), _words(message.owners, "owners")
        if not len(keys) == len(parents) == len(slots) == len(tokens) == len(owners):
            raise ProtocolError("COMMIT: slots, keys, parents, tokens and owners differ in number")
        owners32 = owners.astype(np.uint32)
        results, generations = store.commit(
            client, message.group, slots, keys, parents, tokens, owners32, hold=message.hold and _can_hold(attachment)
        )
        return m.Committed(results.tobytes(), generations.tobytes())

    def _lease(self, attachment: Attachment, request_id: int, message: m.Lease) -> object:
        store, client = self._client(attachment, message.store, message.group)
        wait_s = min(message.wait_ms / 1000, MAX_WAIT_S)
        request = store.lease(client, message.group, _keys(message.keys), wait_s)
        if request in client.requests:
            self._waiting[id(request)] = (attachment, request_id, message.store)
            return None
        return _leased(request)

    def _release(self, attachment: Attachment, request_id: int, message: m.Release) -> object:
        store, client = self._client(attachment, message.store, message.group)
        slots = _slots(message.slots, client, message.group)
        return m.Done(store.release(client, message.group, slots).tobytes())

    def _hold(self, attachment: Attachment, request_id: int, message: m.Hold) -> object:
        store, client = self._client(attachment, message.store, message.group)
        return m.Held(store.hold(client, message.group, _keys(message.keys)).tobytes())

    def _unhold(self, attachment: Attachment, request_id: int, message: m.Unhold) -> object:
        store, client = self._client(attachment, message.store, message.group)
        store.unhold(client, message.group, _keys(message.keys))
        return m.Unheld()

    # ------------------------------------------------------------------ blocks over the socket
    def _read(self, attachment: Attachment, request_id: int, message: m.Read) -> object:
        store, client = self._client(attachment, message.store, message.group)
        slots = _slots(message.slots, client, message.group)
        size = store.core.layouts[message.group].block_bytes
        if len(slots) * size > max(m.MAX_READ_BYTES, size):
            raise ProtocolError(
                f"READ of {len(slots)} blocks of {size} bytes; at most {m.MAX_READ_BYTES} bytes at once"
            )
        connection = attachment.connection
        assert connection is not None

        def send() -> None:
            try:
                rows = [store.row(client, message.group, slot, to_write=False) for slot in slots.tolist()]
                connection.reply_raw(request_id, m.Bytes(), b"".join(rows))
            except KvTierError as error:  # released meanwhile
                connection.fail(request_id, error)

        connection.when_read(lambda: self._send_in_turn(send))
        return None

    def _send_in_turn(self, send: Callable[[], None]) -> None:
        """Blocks for many slow readers do not pile up here: beyond a bound they wait for those before them."""
        if self._unsent or sum(connection.unsent_bytes for connection in self._connections) > MAX_UNSENT_BYTES:
            self._unsent.append(send)
        else:
            send()

    def drained(self) -> None:
        """Some connection's replies have been read."""
        while self._unsent and sum(connection.unsent_bytes for connection in self._connections) <= MAX_UNSENT_BYTES:
            self._unsent.popleft()()

    def _begin_write(
        self, attachment: Attachment, header: Header, fields: Fields, payload_bytes: int
    ) -> memoryview | None:
        """Where the payload goes. Raises ProtocolError for a frame that carries none; a refused WRITE is skipped."""
        connection = attachment.connection
        if header.kind != m.Write.KIND or connection is None:
            raise ProtocolError(f"message {header.kind} carries no blocks")
        try:
            message = m.from_fields(m.Write, fields)
            self._check_epoch(attachment, message)
            store, client = self._client(attachment, message.store, message.group)
            row = store.row(client, message.group, message.slot, to_write=True)
            if payload_bytes != row.nbytes:
                raise ProtocolError(
                    f"WRITE of {payload_bytes} bytes; a block of group {message.group} has {row.nbytes}"
                )
        except KvTierError as error:
            connection.fail(header.request_id, error)
            return None
        client.writing = message.group, message.slot
        self._writing[connection] = client
        return row

    # ------------------------------------------------------------------ what waits on a thread
    def _flush(self, attachment: Attachment, request_id: int, message: m.Flush) -> object:
        store, client = self._client(attachment, message.store)
        timeout_s = min(message.timeout_ms / 1000, MAX_WAIT_S)
        self._on_thread(
            attachment,
            request_id,
            lambda: store.flush(client, timeout_s),
            lambda _: self._say(attachment, request_id, m.Flushed()),
        )
        return None

    def _put_session(self, attachment: Attachment, request_id: int, message: m.PutSession) -> object:
        store, client = self._client(attachment, message.store)
        timeout_s, record = min(message.timeout_ms / 1000, MAX_WAIT_S), {str(k): v for k, v in message.record.items()}
        self._on_thread(
            attachment,
            request_id,
            lambda: store.put_session(client, message.session_id, record, timeout_s),
            lambda _: self._say(attachment, request_id, m.SessionPut()),
        )
        return None

    def _say(self, attachment: Attachment, request_id: int, answer: object) -> None:
        if attachment.connection is not None:
            attachment.connection.reply(request_id, answer)

    def _on_thread(
        self, attachment: Attachment, request_id: int, work: Callable[[], T], then: Callable[[T], None]
    ) -> None:
        """Run `work` on a thread, then `then` on the loop."""

        def done(future: asyncio.Future[T]) -> None:
            connection, error = attachment.connection, future.exception()
            try:
                then(future.result())
            except InvariantError:
                raise
            except KvTierError as refused:
                if connection is not None:
                    connection.fail(request_id, refused)
            except Exception:
                _LOG.exception("event=request_failed")
                if connection is not None:
                    connection.fail(request_id, KvTierError(f"{type(error).__name__} in the daemon; see its log"))

        self._loop.run_in_executor(self._slow, work).add_done_callback(done)

    def _get_session(self, attachment: Attachment, request_id: int, message: m.GetSession) -> object:
        store, client = self._client(attachment, message.store)
        record: dict[Any, Any] = store.get_session(client, message.session_id, take=message.take)
        self._when_read(attachment, request_id, m.Session(record))
        return None

    def _drop_session(self, attachment: Attachment, request_id: int, message: m.DropSession) -> object:
        store, client = self._client(attachment, message.store)
        store.drop_session(client, message.session_id, keep=message.keep)
        return m.SessionDropped()

    def _list_sessions(self, attachment: Attachment, request_id: int, message: m.ListSessions) -> object:
        store, client = self._client(attachment, message.store)
        entries, more = store.list_sessions(client, message.after, SESSIONS_PER_REPLY)
        rows: list[object] = [
            [e.session_id, e.namespace, len(e.token_ids), e.num_computed, store.is_taken(e.session_id), e.is_durable]
            for e in entries
        ]
        self._when_read(attachment, request_id, m.Sessions(rows, more))
        return None

    def _when_read(self, attachment: Attachment, request_id: int, answer: object) -> None:
        """A large answer waits until the peer has read what there is for it."""
        if (connection := attachment.connection) is not None:
            connection.when_read(lambda: connection.reply(request_id, answer))

    # ------------------------------------------------------------------ progress
    def _wake(self) -> None:
        """From any thread: a copy has finished somewhere."""
        if not self._is_look_due:
            self._is_look_due = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._is_look_due = False
        for request in self.models.advance():
            attachment, request_id, _ = self._waiting.pop(id(request), (None, 0, 0))
            if attachment is not None and attachment.connection is not None:
                attachment.connection.reply(request_id, _leased(request))

    def _on_tick(self) -> None:
        self.processes.reap()
        self.drained()
        self._look()
        self._tick = self._loop.call_later(TICK_S, self._on_tick)

    def close(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
        for connection in list(self._connections):
            connection.close()
        self._slow.shutdown(wait=True, cancel_futures=True)
        self.processes.close()

    # ------------------------------------------------------------------ status
    def status(self) -> dict[str, Any]:
        """The pagers' status, and of the daemon: who is attached and what they hold."""
        return self.models.status() | {
            "daemon": {
                "boot": self.boot.hex(),
                "uptime_s": time.monotonic() - self._started_s,
                "connections": len(self._attachments),
                "attached_processes": len(self.processes),
                "left_processes": len(self._left),
                "waiting_requests": self.num_waiting,
                "pinned_slots": self.models.pinned_slots(),
                "stale_requests": self.num_stale,
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

        self._loop.run_in_executor(self._slow, self.inspector.reply, header.request_id, body).add_done_callback(say)

    def _answer_status(self, connection: Connection, header: Header) -> None:
        """Of all tenants together, so for the daemon's own user and root alone."""
        if connection.uid not in (0, os.geteuid()):
            raise ProtocolError("STATUS is answered to the daemon's own user and to root")
        connection.send_frame(header.request_id, pack(protocol.STATUS_REPLY, header.request_id, self.status()))


def _require_version(attachment: Attachment, version: int, name: str) -> None:
    if attachment.connection is None or attachment.connection.version < version:
        raise ProtocolError(f"{name} came with version {version} of the protocol; this connection speaks an older one")


def _can_hold(attachment: Attachment) -> bool:
    """Holding in one step with LOOKUP and COMMIT came with version 2."""
    return attachment.connection is not None and attachment.connection.version >= 2


def _leased(request: LeaseRequest) -> m.Leased:
    return m.Leased(request.slots.astype("<i4").tobytes(), request.generations.tobytes())


def _keys(blob: bytes) -> list[bytes]:
    count, rest = divmod(len(blob), m.KEY_BYTES)
    if rest or count > m.MAX_KEYS:
        raise ProtocolError(f"keys: {len(blob)} bytes; need a multiple of {m.KEY_BYTES}, at most {m.MAX_KEYS} keys")
    found: list[bytes] = np.frombuffer(blob, f"V{m.KEY_BYTES}").tolist()
    return found


def _slots(blob: bytes, client: Client, group: int) -> IntArray:
    slots = _words(blob, "slots")
    if len(slots) and not slots.max() < len(client.holdings[group].reserved):
        raise ProtocolError(f"slot {slots.max()}: layer group {group} has {len(client.holdings[group].reserved)}")
    return slots


def _words(blob: bytes, name: str) -> IntArray:
    if len(blob) % 4 or len(blob) > 4 * m.MAX_KEYS:
        raise ProtocolError(f"{name}: {len(blob)} bytes; need a multiple of 4, at most {m.MAX_KEYS} items")
    return np.frombuffer(blob, "<u4").astype(np.int64)


def _layout_of(fields: object) -> KVLayout:
    if not isinstance(fields, dict):
        raise ConfigError(f"layouts: {type(fields).__name__} is not a layout")
    return KVLayout.from_dict(fields)
