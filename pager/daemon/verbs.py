"""Verbs: what a request asks of the store, and its answer. One method per message, but for blocks over the socket.

A method answers, or returns None and answers later: when a lease's blocks are up, or from a thread for what waits (a model
that is opened, a flush, sessions). Everything here runs on the loop; nothing of it waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ...tiers.errors import InvariantError, KvTierError, ProtocolError, TierUnavailableError
from ..wire import messages as m
from .attached import Attachment
from .connection import Connection
from .fields import keys_in, layout_in, leased, slots_in, words_in
from .models import Models
from .session_names import id_of
from .threads import Threads

if TYPE_CHECKING:
    from .client import Client
    from .copying import CopyDesk, Pool
    from .store import SharedStore

SESSIONS_PER_REPLY = 1000
MAX_WAIT_S = 60.0
MAX_PIN_MS = 7 * 24 * 3600 * 1000  # of one hint; nobody pins for ever
_LOG = logging.getLogger("kvtier.pagerd")
T = TypeVar("T")
Verb = Callable[[Attachment, int, Any], object]


class Verbs:
    """`threads`: for what waits. `waiting`: lease requests without an answer, by their id()."""

    def __init__(self, models: Models, threads: Threads, copies: CopyDesk) -> None:
        self._models, self._threads, self._copies = models, threads, copies
        self.waiting: dict[int, tuple[Attachment, int, int]] = {}  # who, request id, store
        self.is_draining = False
        self.by_kind: dict[int, Verb] = {
            m.Open.KIND: self._open,
            m.Lookup.KIND: self._lookup,
            m.Reserve.KIND: self._reserve,
            m.Commit.KIND: self._commit,
            m.Lease.KIND: self._lease,
            m.Release.KIND: self._release,
            m.Hold.KIND: self._hold,
            m.Unhold.KIND: self._unhold,
            m.Flush.KIND: self._flush,
            m.PutSession.KIND: self._put_session,
            m.GetSession.KIND: self._get_session,
            m.DropSession.KIND: self._drop_session,
            m.ListSessions.KIND: self._list_sessions,
            m.FindModel.KIND: self._find_model,
            m.Hint.KIND: self._hint,
            m.Used.KIND: self._used,
            m.Export.KIND: self._export,
            m.Register.KIND: self._register,
            m.Copy.KIND: self._copy,
        }

    # ------------------------------------------------------------------ models
    def _open(self, attachment: Attachment, request_id: int, message: m.Open) -> object:
        """On a thread: a store that is new to this process is made or recovered there."""
        if self.is_draining:
            raise TierUnavailableError("the daemon is shutting down")
        layouts = tuple(layout_in(fields) for fields in message.layouts)
        about = {str(name): value for name, value in message.about.items()}

        def attach() -> tuple[int, SharedStore, Client]:
            return self._models.attach(layouts, message.model_fingerprint, about, attachment.tenant)

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
            attachment.was_given_slab = True
            attachment.connection.reply_with_fds(request_id, opened, store.fds)
        else:
            attachment.connection.reply(request_id, opened)

    def _find_model(self, attachment: Attachment, request_id: int, message: m.FindModel) -> object:
        if not attachment.speaks(2):
            raise ProtocolError("FIND_MODEL came with version 2 of the protocol; this connection speaks an older one")
        domain = attachment.tenant.domain
        self._on_thread(  # it looks on the disk
            attachment,
            request_id,
            lambda: self._models.block_size_of(message.model_fingerprint, domain),
            lambda size: attachment.say(request_id, m.ModelFound(size)),
        )
        return None

    # ------------------------------------------------------------------ blocks
    def _lookup(self, attachment: Attachment, request_id: int, message: m.Lookup) -> object:
        store, client = attachment.client(self._models, message.store)
        found = store.lookup(
            client,
            keys_in(message.keys),
            prefix=message.prefix,
            hold=message.hold and attachment.speaks(2),
            counts=message.counts,
        )
        return m.Found(found.tobytes(), found.shape[1])

    def _reserve(self, attachment: Attachment, request_id: int, message: m.Reserve) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        slots, generations = store.reserve(client, message.group, min(message.count, m.MAX_KEYS))
        return m.Slots(slots.astype("<i4").tobytes(), generations.tobytes())

    def _commit(self, attachment: Attachment, request_id: int, message: m.Commit) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        keys, parents = keys_in(message.keys), keys_in(message.parents)
        slots = slots_in(message.slots, client, message.group)
        tokens, owners = words_in(message.tokens, "tokens"), words_in(message.owners, "owners")
        if not len(keys) == len(parents) == len(slots) == len(tokens) == len(owners):
            raise ProtocolError("COMMIT: slots, keys, parents, tokens and owners differ in number")
        owners32 = owners.astype(np.uint32)
        results, generations = store.commit(
            client, message.group, slots, keys, parents, tokens, owners32, hold=message.hold and attachment.speaks(2)
        )
        return m.Committed(results.tobytes(), generations.tobytes())

    def _lease(self, attachment: Attachment, request_id: int, message: m.Lease) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        wait_s = min(message.wait_ms / 1000, MAX_WAIT_S)
        request = store.lease(client, message.group, keys_in(message.keys), wait_s)
        if request in client.requests:
            self.waiting[id(request)] = (attachment, request_id, message.store)
            return None
        return leased(request)

    def _release(self, attachment: Attachment, request_id: int, message: m.Release) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        slots = slots_in(message.slots, client, message.group)
        return m.Done(store.release(client, message.group, slots).tobytes())

    def _hold(self, attachment: Attachment, request_id: int, message: m.Hold) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        return m.Held(store.hold(client, message.group, keys_in(message.keys)).tobytes())

    def _unhold(self, attachment: Attachment, request_id: int, message: m.Unhold) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        store.unhold(client, message.group, keys_in(message.keys))
        return m.Unheld()

    def _hint(self, attachment: Attachment, request_id: int, message: m.Hint) -> object:
        store, client = attachment.client(self._models, message.store)
        store.hint(client, keys_in(message.keys), message.hint, min(message.ttl_ms, MAX_PIN_MS) / 1000)
        return m.Hinted()

    def _used(self, attachment: Attachment, request_id: int, message: m.Used) -> object:
        store, client = attachment.client(self._models, message.store)
        by_tier = message.device_tokens, message.host_tokens, message.nvme_tokens
        if sum(by_tier) > message.tokens:
            raise ProtocolError(f"USED: {sum(by_tier)} tokens found of {message.tokens}")
        store.used(client, keys_in(message.keys), message.tokens, by_tier, is_turn=message.is_turn)
        return m.Noted()

    # ------------------------------------------------------------------ copies that clients order
    def _export(self, attachment: Attachment, request_id: int, message: m.Export) -> object:
        self._copies.export(attachment, request_id)
        return None

    def _register(self, attachment: Attachment, request_id: int, message: m.Register) -> object:
        """On a thread: the first CUDA handle loads CuPy."""
        map_it = self._copies.plan_register(attachment, message)

        def mapped(pool: Pool) -> None:
            self._copies.registered(attachment, message, pool)
            attachment.say(request_id, m.Registered())

        self._on_thread(attachment, request_id, map_it, mapped)
        return None

    def _copy(self, attachment: Attachment, request_id: int, message: m.Copy) -> object:
        self._copies.copy(attachment, request_id, message)
        return None

    # ------------------------------------------------------------------ lease requests that wait
    def look(self) -> None:
        """Answer those that have all that they will get."""
        for request in self._models.advance():
            attachment, request_id, _ = self.waiting.pop(id(request), (None, 0, 0))
            if attachment is not None:
                attachment.say(request_id, leased(request))

    def cancel(self, connection: Connection, request_id: int) -> bool:
        """Whether it was one of them; it gets no answer then."""
        for key, (attachment, waiting_id, _) in self.waiting.items():
            if attachment.connection is connection and waiting_id == request_id:
                self._cancel(key)
                return True
        return False

    def forget(self, attachment: Attachment) -> None:
        """Nobody waits for its answers any more, so nobody is told of the slots: they outlive no socket."""
        for key in [key for key, (who, _, _) in self.waiting.items() if who is attachment]:
            self._cancel(key)

    def _cancel(self, key: int) -> None:
        attachment, _, number = self.waiting.pop(key)
        if (client := attachment.stores.get(number)) is not None:  # else it has let go of everything already
            self._models.cancel(number, client, key)

    # ------------------------------------------------------------------ durability and sessions
    def _flush(self, attachment: Attachment, request_id: int, message: m.Flush) -> object:
        store, client = attachment.client(self._models, message.store, message.group)
        timeout_s = min(message.timeout_ms / 1000, MAX_WAIT_S)
        keys = keys_in(message.keys) if attachment.speaks(2) else []
        self._on_thread(
            attachment,
            request_id,
            lambda: store.keeper.flush(
                client, timeout_s, message.group, lambda: store.find(client, message.group, keys)
            ),
            lambda _: attachment.say(request_id, m.Flushed()),
            waits=True,
        )
        return None

    def _put_session(self, attachment: Attachment, request_id: int, message: m.PutSession) -> object:
        store, client = attachment.client(self._models, message.store)
        timeout_s, record = min(message.timeout_ms / 1000, MAX_WAIT_S), {str(k): v for k, v in message.record.items()}
        self._on_thread(
            attachment,
            request_id,
            lambda: store.keeper.put_session(client, message.session_id, record, timeout_s),
            lambda _: attachment.say(request_id, m.SessionPut()),
            waits=True,
        )
        return None

    def _get_session(self, attachment: Attachment, request_id: int, message: m.GetSession) -> object:
        store, client = attachment.client(self._models, message.store)
        record: dict[Any, Any] = store.keeper.get_session(client, message.session_id, take=message.take)
        self._when_read(attachment, request_id, m.Session(record))
        return None

    def _drop_session(self, attachment: Attachment, request_id: int, message: m.DropSession) -> object:
        store, client = attachment.client(self._models, message.store)
        store.keeper.drop_session(client, message.session_id, keep=message.keep, released=message.released)
        return m.SessionDropped()

    def _list_sessions(self, attachment: Attachment, request_id: int, message: m.ListSessions) -> object:
        store, client = attachment.client(self._models, message.store)
        entries, more = store.keeper.list_sessions(client, message.after, SESSIONS_PER_REPLY)
        rows: list[object] = [
            [
                id_of(e),
                e.namespace,
                len(e.token_ids),
                e.num_computed,
                store.keeper.is_taken(e),
                e.is_durable,
            ]
            for e in entries
        ]
        self._when_read(attachment, request_id, m.Sessions(rows, more))
        return None

    def _when_read(self, attachment: Attachment, request_id: int, answer: object) -> None:
        """A large answer waits until the peer has read what there is for it."""
        if (connection := attachment.connection) is not None:
            connection.when_read(lambda: connection.reply(request_id, answer))

    def _on_thread(
        self,
        attachment: Attachment,
        request_id: int,
        work: Callable[[], T],
        then: Callable[[T], None],
        *,
        waits: bool = False,
    ) -> None:
        """Run `work` on a thread, then `then` on the loop. What `waits` for other clients queues apart from the rest."""

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

        self._threads.run((attachment.tenant.name, waits), work).add_done_callback(done)
