"""Who is attached: a process with its tenant, its epoch and all that it holds, from HELLO until it is gone.

What a client holds belongs to its attachment: a process, known by its pidfd, with an epoch that every request names. Guards
rules 9 and 10: a request of another epoch changes nothing, and an attachment ends with its process or its GOODBYE, not with
its socket.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...tiers.errors import ConfigError, ProtocolError, QueueFullError, StaleLeaseError
from ..clients import Clients
from ..rules import Rule, Rules
from ..wire import messages as m
from .connection import Connection
from .models import Models
from .settings import Limits
from .tenants import Tenant, Tenants

if TYPE_CHECKING:
    from .client import Client
    from .copying import CopyDesk, Pool
    from .store import SharedStore

MAX_LEFT = 64  # attachments of one process whose connections are gone; each keeps a pidfd and its books
_LOG = logging.getLogger("kvtier.pagerd")


@dataclass(eq=False)
class Attachment:
    """One attached process: everything that it holds is in here, by store."""

    epoch: int
    tenant: Tenant
    token: str = field(repr=False)  # it let this client in, and is asked for again when tokens change
    process: int  # of Clients; 0 for a peer on another machine
    connection: Connection | None
    pid: int = 0  # 0 for a peer on another machine
    may_order: bool = False  # copies: the feature "ipc"
    stores: dict[int, Client] = field(default_factory=dict)
    pools: dict[tuple[int, int], Pool] = field(default_factory=dict)  # by store and layer group
    channel: socket.socket | None = None  # through which descriptors of pools come
    has_left: bool = False  # said GOODBYE
    was_given_slab: bool = False  # copies of its own may run when its socket is gone

    def client(self, models: Models, number: int, group: int = 0) -> tuple[SharedStore, Client]:
        """Of a store that it has opened. Raises ProtocolError."""
        client = self.stores.get(number)
        if client is None:
            raise ProtocolError(f"store {number} is not open in this connection; send OPEN first")
        if not group < len(client.holdings):
            raise ProtocolError(f"layer group {group}: store {number} has {len(client.holdings)}")
        client.holds_apart = not self.speaks(2)
        return models.store(number), client

    def say(self, request_id: int, answer: object) -> None:
        if self.connection is not None:
            self.connection.reply(request_id, answer)

    def speaks(self, version: int) -> bool:
        return self.connection is not None and self.connection.version >= version


class Attachments:
    """Of one daemon. `left`: connection gone, process alive, by epoch; `ending`: only a last copy of ours is left of them."""

    def __init__(
        self,
        models: Models,
        tenants: Tenants,
        processes: Clients,
        rules: Rules,
        copies: CopyDesk,
        *,
        newest_version: int,
        random_bytes: Callable[[int], bytes],
        allow_ipc: bool,
    ) -> None:
        self._models, self._tenants, self._rules, self._newest = models, tenants, rules, newest_version
        self.processes, self._copies, self._allow_ipc = processes, copies, allow_ipc
        self.boot = random_bytes(16)
        self.by_connection: dict[Connection, Attachment] = {}
        self.left: dict[int, Attachment] = {}
        self.ending: dict[int, Attachment] = {}
        self._next_epoch = int.from_bytes(random_bytes(7), "little")
        self.num_stale = 0
        self.drop: Callable[[Connection], None]  # nothing that comes from there has a say any more

    # ------------------------------------------------------------------ coming
    def hello(self, connection: Connection, request_id: int, hello: m.Hello, limits: Limits) -> None:
        if connection in self.by_connection:
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
        self._end_previous(connection.pid, hello)
        if sum(left.pid == connection.pid for left in self.left.values()) >= MAX_LEFT:
            what = (
                f"{MAX_LEFT} connections of process {connection.pid} ended without GOODBYE, and it may use their slots"
            )
            connection.refuse(QueueFullError(f"{what}: end it, or say previous_epoch in HELLO", retry_after_s=1.0))
            return
        self._next_epoch += 1
        attachment = Attachment(self._next_epoch, tenant, hello.token, 0, connection, max(connection.pid, 0))
        if connection.pid > 0:
            try:
                attachment.process = self.processes.attach(connection.pid)
            except ConfigError as error:  # killed with its HELLO under way
                raise ProtocolError(str(error)) from error
            self.processes.hold(attachment.process, lambda: self._process_ended(attachment))
        self.by_connection[connection] = attachment
        connection.version = version
        features = self._features(hello, tenant, connection)
        attachment.may_order = m.IPC in features
        namespaces: dict[object, object] = {name: secret for name, secret in tenant.namespaces.items()}
        welcome = m.Welcome(
            version,
            list(features),
            self.boot,
            attachment.epoch,
            namespaces,
            tenant.owns_all,
            limits.requests_in_flight,
            limits.num_bytes_in_flight,
        )
        connection.reply(request_id, welcome)
        _LOG.info("event=attach pid=%d tenant=%s version=%d", connection.pid, tenant.name, version)

    def _features(self, hello: m.Hello, tenant: Tenant, connection: Connection) -> list[str]:
        """Of what a client asks for, what it may have."""
        refused = set() if tenant.maps_slab else {m.SLAB}
        if not (self._allow_ipc and tenant.maps_slab and m.SLAB in hello.features and connection.pid > 0):
            refused.add(m.IPC)
        return [name for name in m.ALL_FEATURES if name in hello.features and name not in refused]

    def earlier(self, attachment: Attachment, epoch: int) -> Attachment | None:
        """The attachment of that epoch, if it was the same process's and its copies may still run."""
        known = [*self.left.values(), *self.ending.values(), *self.by_connection.values()]
        return next((one for one in known if one.epoch == epoch and one.pid == attachment.pid > 0), None)

    def _end_previous(self, pid: int, hello: m.Hello) -> None:
        """The same process is back and says that no copy of its earlier attachment runs any more."""
        if hello.previous_boot != self.boot:
            return
        for connection, attachment in list(self.by_connection.items()):
            if attachment.epoch == hello.previous_epoch and attachment.pid == pid > 0:
                connection.close()  # its end has not been noticed yet
                self.drop(connection)
        previous = self.left.get(hello.previous_epoch)
        if previous is not None and self.processes.pid(previous.process) == pid:
            self.processes.release(previous.process)

    def check_epoch(self, attachment: Attachment, message: Any) -> None:
        epoch = getattr(message, "epoch", attachment.epoch)
        if epoch != attachment.epoch and self._rules.holds(Rule.OLD_EPOCH_CHANGES_NOTHING):  # rule 9
            self.num_stale += 1
            raise StaleLeaseError(f"epoch {epoch} is over; this attachment has epoch {attachment.epoch}")

    def share(self, tenant: str | None, nbytes: int) -> tuple[int, list[Connection]]:
        """A tenant's part of so many bytes, of which each that is attached has as much, and the tenant's connections."""
        attached = self.by_connection.items()
        own = [connection for connection, attachment in attached if attachment.tenant.name == tenant]
        return nbytes // max(1, len({attachment.tenant.name for _, attachment in attached})), own

    # ------------------------------------------------------------------ going
    def show_out(self) -> None:
        """After a reload: who may no longer have what its connection was given, loses the connection at once.

        Requests under way change nothing more. What its process still holds goes when the process does (rule 10).
        """
        for connection, attachment in list(self.by_connection.items()):
            now = self._tenants.find(connection.uid, attachment.token, connection.gids)
            if now is None or not now.covers(attachment.tenant):
                _LOG.warning("event=show_out pid=%d tenant=%s", connection.pid, attachment.tenant.name)
                connection.refuse(ProtocolError("the daemon's configuration has changed: not let in as before"))
                self.drop(connection)

    def goodbye(self, attachment: Attachment) -> None:
        """No copy of the process runs: everything goes at once."""
        attachment.has_left = True
        if attachment.process:
            self.processes.release(attachment.process)
        else:
            self._end(attachment)

    def disconnected(self, connection: Connection) -> Attachment | None:
        """Nobody will ask for more; copies of the process may still run (rule 10). Returns who that was."""
        attachment = self.by_connection.pop(connection, None)
        if attachment is None:
            return None
        attachment.connection = None
        self._copies.close_channel(attachment)
        for client in attachment.stores.values():
            client.gone()
        if attachment.process and attachment.was_given_slab:
            self.left[attachment.epoch] = attachment
            self.processes.disconnected(attachment.process)
        elif attachment.process:
            self.processes.release(attachment.process)  # none of its copies can be under way: bytes went by the socket
        else:
            self._end(attachment)  # the same: not on this machine, or its process is gone
        return attachment

    def _process_ended(self, attachment: Attachment) -> None:
        """Its socket may live on in a child: what still comes there must not go into slots that are given back (rule 7)."""
        if (connection := attachment.connection) is not None and not attachment.has_left:
            connection.close()
            self.drop(connection)
        self._end(attachment)

    def _end(self, attachment: Attachment) -> None:
        """Its process is gone, or its own copies are over; those that it ordered from us may still run."""
        self.left.pop(attachment.epoch, None)
        attachment.process = 0  # what a last word of it opens all the same ends with its connection
        self.ending[attachment.epoch] = attachment
        self._copies.when_idle(attachment, lambda: self._let_go(attachment))  # rules 7, 8

    def _let_go(self, attachment: Attachment) -> None:
        """Of everything: no copy runs, theirs or ours."""
        self.ending.pop(attachment.epoch, None)
        self._copies.let_go(attachment)
        for number, client in attachment.stores.items():
            self._models.detach(number, client)
        attachment.stores.clear()
