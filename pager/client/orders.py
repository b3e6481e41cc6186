"""Orders: copies that the daemon drives between our pages and its slots, over one connection, and when each is over.

An order is over when its reply says so, or when the daemon refused it. A connection that breaks says nothing: the daemon may
still be writing into a page. Then an order stays in doubt, and its page in flight, until the daemon's process is gone (its
pidfd came with EXPORT) or the daemon says over a connection of its own that the earlier one's copies have ended (SETTLE).
That is found out by a thread that takes no lock of the pager. Guards rule 5 across processes: a page that somebody may still
write to is never FREE.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from ...tiers.errors import KvTierError, TierUnavailableError
from ...tiers.exported import ExportedRows
from ...tiers.streams import IntArray
from ..rules import Rule, Rules
from ..wire import messages as m
from .attachment import Attachment
from .connection import DaemonConnection

REGISTER_TIMEOUT_S = 60.0  # the first CUDA handle loads CuPy and starts a context
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between two questions to a daemon that lives
_LOST = "the daemon went away in the middle of a copy"


class Order(Protocol):
    """What an order is told; from any thread."""

    def over(self, error: KvTierError | None) -> None:
        """Once: nothing of it touches a page or a slot any more. Without an error all of it was copied."""

    def in_doubt(self) -> None:
        """Before that: nobody will say how it ended, so it will end with an error."""


class CopyOrders:
    """Of one attachment. `dial` makes another connection to the daemon, of this process and user."""

    def __init__(
        self,
        attachment: Attachment,
        pidfd: int,
        channel: socket.socket,
        rules: Rules,
        dial: Callable[[], DaemonConnection],
    ) -> None:
        self._attachment, self._pidfd, self._channel = attachment, pidfd, channel
        self._rules, self._dial = rules, dial
        self._guard = threading.Lock()  # of what follows
        self._doubts: list[Order] = []
        self._is_settled = False
        self._settled = os.eventfd(0, os.EFD_CLOEXEC)
        self._resolver: threading.Thread | None = None

    @classmethod
    def begin(cls, attachment: Attachment, rules: Rules, dial: Callable[[], DaemonConnection]) -> CopyOrders:
        """Raises what the daemon answers."""
        _, fds = attachment.connection.call_for_fds(m.Export(attachment.epoch), m.Exporting)
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise TierUnavailableError(f"{len(fds)} descriptors came with EXPORT's reply; two were awaited")
        return cls(attachment, fds[0], socket.socket(fileno=fds[1]), rules, dial)

    def register(self, group: int, exported: ExportedRows) -> None:
        """Let the daemon map a pool. Raises what it answers."""
        if exported.fd is not None:
            try:
                socket.send_fds(self._channel, [b"p"], [exported.fd])
            except OSError as error:
                raise TierUnavailableError(f"the daemon takes no descriptors: {error}") from error
        num_pages, page_bytes = exported.rows.shape
        where = self._attachment.epoch, self._attachment.store, group
        message = m.Register(*where, exported.kind, exported.handle, num_pages, page_bytes)
        self._attachment.connection.call_patiently(message, m.Registered, timeout_s=REGISTER_TIMEOUT_S)

    # ------------------------------------------------------------------ orders
    def copy(self, group: int, pages: IntArray, slots: IntArray, *, is_write_back: bool, order: Order) -> None:
        """Ask for one batch. Raises nothing: the order is told."""
        where = self._attachment.epoch, self._attachment.store, group
        blobs = pages.astype("<u4").tobytes(), slots.astype("<u4").tobytes()
        try:
            reply = self._attachment.connection.begin(m.Copy(*where, *blobs, is_write_back), m.Copied)
        except KvTierError:  # some of it may have been sent
            self._doubt(order)
            return

        def answered() -> None:
            if reply.is_in_doubt:
                self._doubt(order)
                return
            try:
                reply.result(0.0)
            except KvTierError as error:
                order.over(error)
            else:
                order.over(None)

        reply.when_over(answered)

    def _doubt(self, order: Order) -> None:
        """Quarantine: it is over when the copier is gone, or says so."""
        order.in_doubt()
        with self._guard:
            must_wait = not self._is_settled and self._rules.holds(Rule.COPY_IN_FLIGHT_IS_NOT_FREE)  # rule 5
            if must_wait:
                self._doubts.append(order)
                if self._resolver is None:
                    self._resolver = threading.Thread(target=self._resolve, name="kvtier-orders", daemon=True)
                    self._resolver.start()
        if not must_wait:
            order.over(TierUnavailableError(_LOST))

    # ------------------------------------------------------------------ doubts
    @property
    def num_in_doubt(self) -> int:
        with self._guard:
            return len(self._doubts)

    def _resolve(self) -> None:
        """Wait for the end of the daemon's process, and ask the daemon now and then while it lives."""
        poller, pause_s = select.poll(), FIRST_PAUSE_S
        for fd in (self._pidfd, self._settled):
            poller.register(fd, select.POLLIN)
        while not poller.poll(pause_s * 1000) and not self._ask():
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self.settle()

    def _ask(self) -> bool:
        """Whether the daemon says that no copy of our connection runs any more."""
        try:
            connection = self._dial()
        except KvTierError:
            return False
        try:
            if connection.welcome.boot != self._attachment.connection.welcome.boot:
                return False  # another daemon at the same address knows nothing of the one that is going
            connection.call(m.Settle(self._attachment.epoch), m.Settled)
            return True
        except KvTierError:
            return False
        finally:
            connection.close()

    def settle(self) -> None:
        """Nothing that was ordered here runs any more, or nobody cares."""
        with self._guard:
            doubts, self._doubts, was_settled, self._is_settled = self._doubts, [], self._is_settled, True
        if not was_settled:
            os.eventfd_write(self._settled, 1)
        for order in doubts:
            order.over(TierUnavailableError(_LOST))

    def close(self) -> None:
        """No order is under way or in doubt, or nobody waits for one any more."""
        self.settle()
        if self._resolver is not None:
            self._resolver.join()
        self._channel.close()
        for fd in (self._pidfd, self._settled):
            os.close(fd)
