"""Copies that clients order (feature "ipc"): their pools mapped here, and blocks copied between pages and slots for them.

One desk for all attachments, on the loop; copies run on streams and are answered when their event is over. Guards: nothing
is copied but between pages of the client's own pool and slots that it has leased or reserved (rule 7); a slot whose copy runs
is neither released nor committed; and an attachment ends, with its slots and its mapping, only behind its last copy,
whatever has become of its process (rule 8).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...tiers.errors import KvTierError, ProtocolError, QueueFullError, TierUnavailableError
from ...tiers.exported import KINDS, MEMFD, PROBE_ROWS, MappedRows, map_exported
from ...tiers.streams import Event, IntArray
from ..rules import Rule, Rules
from ..wire import messages as m
from .fields import slots_in, words_in

if TYPE_CHECKING:
    from .attached import Attachment
    from .client import Client
    from .models import Models
    from .store import SharedStore

_RETRY_S = 0.002


@dataclass(slots=True, eq=False)
class Pool:
    """Of one client and layer group."""

    mapped: MappedRows
    num_pages: int


@dataclass(slots=True, eq=False)
class _Order:
    """One COPY under way."""

    attachment: Attachment
    request_id: int
    store: SharedStore
    client: Client
    group: int
    slots: IntArray
    event: Event


class CopyDesk:
    """Takes orders, and tells when an attachment has none left."""

    def __init__(self, models: Models, rules: Rules) -> None:
        self._models, self._rules = models, rules
        self._orders: list[_Order] = []
        self._waiting: list[tuple[Attachment, Callable[[], object]]] = []  # for the last copy of each

    @property
    def num_orders(self) -> int:
        return len(self._orders)

    # ------------------------------------------------------------------ pools
    def export(self, attachment: Attachment, request_id: int) -> None:
        """Answer with what a client needs to hand its pools over. Raises ProtocolError."""
        if not attachment.may_order or attachment.connection is None:
            raise ProtocolError("EXPORT: the feature 'ipc' was not granted in HELLO; see allow_ipc of the daemon")
        if attachment.channel is not None:
            raise ProtocolError("EXPORT a second time")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        attachment.channel = ours
        pidfd = os.pidfd_open(os.getpid())
        try:
            attachment.connection.reply_with_fds(request_id, m.Exporting(), [pidfd, theirs.fileno()])
        finally:
            os.close(pidfd)
            theirs.close()

    def plan_register(self, attachment: Attachment, message: m.Register) -> Callable[[], Pool]:
        """Check a registration; what is returned maps the pool, on any thread. Raises ProtocolError."""
        store, _ = attachment.client(self._models, message.store, message.group)
        layout = store.core.layouts[message.group]
        if attachment.channel is None:
            raise ProtocolError("REGISTER before EXPORT")
        if (message.store, message.group) in attachment.pools:
            raise ProtocolError(f"REGISTER: layer group {message.group} has a pool already")
        if message.kind not in KINDS or len(message.handle) > m.MAX_HANDLE_BYTES:
            raise ProtocolError(f"REGISTER: a pool of kind {message.kind!r}, {len(message.handle)} bytes of handle")
        if message.page_bytes != layout.block_bytes or not 1 <= message.num_pages < 1 << 31:
            raise ProtocolError(
                f"REGISTER: {message.num_pages} pages of {message.page_bytes} bytes; a block of layer group "
                f"{message.group} has {layout.block_bytes}"
            )
        fd = _take_fd(attachment.channel) if message.kind == MEMFD else None
        slab, backend = store.core.groups[message.group].slab.rows, store.core.backend

        def map_it() -> Pool:
            size = message.num_pages, message.page_bytes
            try:
                return Pool(map_exported(message.kind, message.handle, fd, *size, backend, slab), message.num_pages)
            finally:
                if fd is not None:
                    os.close(fd)

        return map_it

    def registered(self, attachment: Attachment, message: m.Register, pool: Pool) -> None:
        """On the loop. Raises ProtocolError when there is one already, or nobody to have it any more."""
        place = message.store, message.group
        if attachment.connection is None or place in attachment.pools:
            pool.mapped.close()
            raise ProtocolError(f"REGISTER: layer group {message.group} has a pool already")
        attachment.pools[place] = pool

    # ------------------------------------------------------------------ orders
    def copy(self, attachment: Attachment, request_id: int, message: m.Copy) -> None:
        """Begin what was ordered; `look` answers. Raises: ProtocolError, QueueFullError. Then nothing was begun."""
        store, client = attachment.client(self._models, message.store, message.group)
        pool = attachment.pools.get((message.store, message.group))
        if pool is None:
            raise ProtocolError(f"COPY: layer group {message.group} has no pool; send REGISTER first")
        pages, slots = words_in(message.pages, "pages"), slots_in(message.slots, client, message.group)
        self._check(attachment, pages, slots, pool, store.core.layouts[message.group].block_bytes)
        store.begin_copy(client, message.group, slots, to_write=message.is_write_back)
        slab = store.core.groups[message.group].slab.rows
        stream = pool.mapped.demote if message.is_write_back else pool.mapped.promote
        if message.is_write_back:
            stream.copy_rows(slab, slots, pool.mapped.rows, pages)
        else:
            stream.copy_rows(pool.mapped.rows, pages, slab, slots)
        order = _Order(attachment, request_id, store, client, message.group, slots, stream.record())
        self._orders.append(order)

    def _check(self, attachment: Attachment, pages: IntArray, slots: IntArray, pool: Pool, block_bytes: int) -> None:
        if not 0 < len(pages) == len(slots):
            raise ProtocolError(f"COPY: {len(pages)} pages and {len(slots)} slots; need as many of both, at least one")
        if len(pages) > max(1, m.MAX_COPY_BYTES // block_bytes):
            raise ProtocolError(f"COPY: {len(pages)} blocks; at most {m.MAX_COPY_BYTES} bytes, or one block, in one")
        if pages.max() >= pool.num_pages + PROBE_ROWS:
            raise ProtocolError(f"COPY: page {pages.max()}; the pool has {pool.num_pages}")
        if sum(order.attachment is attachment for order in self._orders) >= m.MAX_COPIES:
            raise QueueFullError(f"{m.MAX_COPIES} copies of this client are under way", retry_after_s=_RETRY_S)

    def look(self) -> None:
        """Answer what is over, then whoever waited for an attachment's last copy."""
        done = [order for order in self._orders if order.event.is_done()]
        if not done:
            return
        self._orders = [order for order in self._orders if order not in done]
        for order in done:
            order.store.end_copy(order.client, order.group, order.slots)
            self._answer(order)
        ready = [(who, call) for who, call in self._waiting if not self._is_busy(who)]
        self._waiting = [(who, call) for who, call in self._waiting if self._is_busy(who)]
        for _, call in ready:
            call()

    def _answer(self, order: _Order) -> None:
        connection, error = order.attachment.connection, order.event.error
        if connection is None:
            return
        if error is None:
            connection.reply(order.request_id, m.Copied(len(order.slots)))
        else:
            known = error if isinstance(error, KvTierError) else TierUnavailableError(f"the copy failed: {error}")
            connection.fail(order.request_id, known)

    # ------------------------------------------------------------------ the end
    def when_idle(self, attachment: Attachment, call: Callable[[], object]) -> None:
        """Call it once no copy of this attachment runs: now, or from `look`. In order."""
        if self._is_busy(attachment) and self._rules.holds(Rule.DROP_HALF_DONE):  # rule 8: after the drain
            self._waiting.append((attachment, call))
        else:
            call()

    def let_go(self, attachment: Attachment) -> None:
        """Of its pools; no copy of it runs."""
        for pool in attachment.pools.values():
            pool.mapped.close()
        attachment.pools.clear()
        self.close_channel(attachment)

    @staticmethod
    def close_channel(attachment: Attachment) -> None:
        """Descriptors that nobody took go with it."""
        if attachment.channel is not None:
            attachment.channel.close()
            attachment.channel = None

    def _is_busy(self, attachment: Attachment) -> bool:
        return any(order.attachment is attachment for order in self._orders)


def _take_fd(channel: socket.socket) -> int:
    """The next descriptor that the client has sent. Raises ProtocolError when there is not exactly one."""
    fds: list[int] = []
    with contextlib.suppress(BlockingIOError):
        _, fds, _, _ = socket.recv_fds(channel, 1, 2)
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"REGISTER: {len(fds)} descriptors came through the socket of EXPORT; one was awaited")
    return fds[0]
