"""Blocks over the socket, for clients that do not map the slab: READ sends leased slots, WRITE fills a reserved one.

A payload goes straight into its slot, and what is sent is a copy, so a slot may be reused before the peer has read the last
byte. Guards the daemon's memory, and one tenant from another's slow readers: their blocks do not pile up here, and wait for
each other alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...tiers.errors import KvTierError, ProtocolError
from ..wire import messages as m
from ..wire.frames import Fields, Header
from .attached import Attachment, Attachments
from .connection import Connection
from .fields import slots_in
from .models import Models

if TYPE_CHECKING:
    from .client import Client

MAX_UNSENT_BYTES = 4 << 20  # of replies, in equal parts for the tenants that are attached; further blocks wait


class BlockTransfers:
    """Of all connections of one daemon."""

    def __init__(self, models: Models, attachments: Attachments) -> None:
        self._models, self._attachments = models, attachments
        self._unsent: dict[str, deque[Callable[[], None]]] = {}  # by tenant
        self._writing: dict[Connection, Client] = {}  # whose payload is on its way into a slot

    # ------------------------------------------------------------------ out
    def read(self, attachment: Attachment, request_id: int, message: m.Read) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        slots = slots_in(message.slots, client, message.group)
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

        connection.when_read(lambda: self._send_in_turn(attachment.tenant.name, send))
        return None

    def _send_in_turn(self, tenant: str, send: Callable[[], None]) -> None:
        """Blocks for many slow readers do not pile up here: beyond its tenant's part they wait for those before them."""
        if tenant in self._unsent or not self._has_room(tenant):
            self._unsent.setdefault(tenant, deque()).append(send)
        else:
            send()

    def _has_room(self, tenant: str) -> bool:
        part, own = self._attachments.share(tenant, MAX_UNSENT_BYTES)
        return sum(connection.unsent_bytes for connection in own) <= part

    def drained(self) -> None:
        """Some connection's replies have been read."""
        for tenant, queue in list(self._unsent.items()):
            while queue and self._has_room(tenant):
                queue.popleft()()
            if not queue:
                self._unsent.pop(tenant, None)

    # ------------------------------------------------------------------ in
    def begin_write(
        self, attachment: Attachment, header: Header, fields: Fields, payload_bytes: int
    ) -> memoryview | None:
        """Where the payload goes. Raises ProtocolError for a frame that carries none; a refused WRITE is skipped."""
        connection = attachment.connection
        if header.kind != m.Write.KIND or connection is None:
            raise ProtocolError(f"message {header.kind} carries no blocks")
        try:
            message = m.from_fields(m.Write, fields)
            self._attachments.check_epoch(attachment, message)
            store, client = attachment.client(self._models, message.store, message.group)
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

    def is_writing(self, connection: Connection | None) -> bool:
        return connection in self._writing

    def payload_done(self, connection: Connection, header: Header) -> None:
        client = self._writing.pop(connection, None)
        if client is not None:
            client.writing = None
            connection.reply(header.request_id, m.Written())

    def forget(self, connection: Connection) -> None:
        """It is gone, in the middle of a payload or not."""
        client = self._writing.pop(connection, None)
        if client is not None:
            client.writing = None
