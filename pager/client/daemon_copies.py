"""Daemon copies: whether the daemon drives the copies between our pages and its slots (transfer="ipc"), and since when.

Asks for it at every attachment, registers the pools, and tries each with a block both ways before anything depends on it. What
is refused costs nothing but a notice: we copy ourselves, as without it. Guards: who copies changes only while no copy is
under way; and memory that a daemon may still write to is never given back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ...tiers.cpu import HostEvent
from ...tiers.errors import KvTierError, TierUnavailableError
from ...tiers.exported import ExportedRows, keep_for_good
from ...tiers.streams import Event, IntArray
from ..core import Core
from ..wire import messages as m
from .attachment import Attachment
from .connection import DaemonConnection
from .ordered import Lane, OrderedStream
from .orders import CopyOrders

_PROBE_S = 10.0  # for each step of trying a pool
_LOG = logging.getLogger("kvtier.client")


class DaemonCopies:
    """Of one pager that asked for it. `notice` says why we copy ourselves, where we do."""

    def __init__(self, core: Core, dial: Callable[[], DaemonConnection]) -> None:
        self._core, self._dial = core, dial
        self.notice = ""
        self._orders: CopyOrders | None = None  # also of a daemon that is lost, until there is another
        notify = core.backend.notify
        self._in, self._out = Lane("promote", notify), Lane("demote", notify)
        for group in core.groups:
            group.copies_in = OrderedStream(self._in, group.index, group.pool.rows, core.backend.promote)
            group.copies_out = OrderedStream(self._out, group.index, group.pool.rows, core.backend.demote)

    # ------------------------------------------------------------------ asking for it
    def prepare(self, attachment: Attachment) -> CopyOrders | None:
        """What takes our orders over this attachment, or None: then `notice` says why. Not under the pager's lock."""
        orders: CopyOrders | None = None
        try:
            pools = self._pools(attachment)
            orders = CopyOrders.begin(attachment, self._core.rules, self._dial)
            for index, pool in enumerate(pools):
                orders.register(index, pool)
                self._try(attachment, orders, index, pool)
        except KvTierError as error:
            if orders is not None:
                orders.close()
            self.notice = f"transfer='ipc' is not used, copies are ours: {error}"
            _LOG.warning("event=transfer_refused reason=%s", error)
            return None
        self.notice = ""
        return orders

    def _pools(self, attachment: Attachment) -> list[ExportedRows]:
        """Raises TierUnavailableError where they cannot be handed over."""
        if not attachment.has_slab:
            raise TierUnavailableError(
                "the daemon's memory is not mapped here (another machine, or not trusted with it)"
            )
        if m.IPC not in attachment.connection.welcome.features:
            raise TierUnavailableError("the daemon does not offer it; set allow_ipc = true in its configuration")
        pools = [group.pool.exported for group in self._core.groups]
        refused = next((group.pool.refusal for group in self._core.groups if group.pool.exported is None), "")
        if refused:
            raise TierUnavailableError(refused)
        return [pool for pool in pools if pool is not None]

    def _try(self, attachment: Attachment, orders: CopyOrders, index: int, pool: ExportedRows) -> None:
        """One block from a slot to the row behind the pages, another one back. Raises KvTierError."""
        rows, _ = attachment.reserve(index, 1, _PROBE_S)
        slab, page, backend = attachment.rows[index], np.array([len(pool.rows)]), self._core.backend
        first, second = (np.random.default_rng(seed).integers(0, 256, slab.shape[1], np.uint8) for seed in (1, 2))
        own = backend.alloc_host(1, slab.shape[1])
        zero = np.zeros(1, np.int64)
        try:
            slab[rows[0]] = first
            _order_now(orders, index, page, rows, is_write_back=False)
            backend.demote.copy_rows(own, zero, pool.probe, zero)
            _finish(backend.demote.record())
            is_right = bool((own[0] == first).all())
            own[0] = second
            backend.promote.copy_rows(pool.probe, zero, own, zero)
            _finish(backend.promote.record())
            _order_now(orders, index, page, rows, is_write_back=True)
            is_right &= bool((slab[rows[0]] == second).all())
        finally:
            attachment.release(index, rows)
        if not is_right:
            raise TierUnavailableError(f"layer group {index}: a block that the daemon copied came out wrong")

    # ------------------------------------------------------------------ changing over
    def use(self, orders: CopyOrders | None) -> None:
        """From now on these take our orders. Under the pager's lock, while no copy is under way."""
        previous, self._orders = self._orders, orders
        self._in.orders = self._out.orders = orders
        if previous is not None:
            previous.close()

    def lost(self) -> None:
        """The daemon is gone: we copy ourselves from here on. Under the lock; orders under way end as orders.py says."""
        self._in.orders = self._out.orders = None

    @property
    def is_used(self) -> bool:
        return self._in.orders is not None

    def status(self) -> dict[str, Any]:
        return {
            "copies": "daemon" if self.is_used else "client",
            "copies_in_doubt": 0 if self._orders is None else self._orders.num_in_doubt,
            "transfer_notice": self.notice,
        }

    # ------------------------------------------------------------------ the end
    def close(self, timeout_s: float, *, is_over: bool) -> None:
        """`is_over`: the daemon has answered GOODBYE, or never had our pools; else they live as long as this process."""
        self._in.orders = self._out.orders = None
        for lane in (self._in, self._out):
            lane.close(timeout_s)
        if self._orders is not None:
            self._orders.close()
        for group in self._core.groups:
            if (exported := group.pool.exported) is not None:
                exported.close()
                if not is_over and self._orders is not None:
                    keep_for_good(exported)


class _Waited:
    """An order that its giver waits for."""

    def __init__(self) -> None:
        self.event = HostEvent()

    def over(self, error: KvTierError | None) -> None:
        self.event.finish(error)

    def in_doubt(self) -> None:
        pass


def _order_now(orders: CopyOrders, index: int, page: IntArray, rows: IntArray, *, is_write_back: bool) -> None:
    waited = _Waited()
    orders.copy(index, page, rows, is_write_back=is_write_back, order=waited)
    _finish(waited.event)


def _finish(event: Event) -> None:
    """Raises KvTierError."""
    if not event.wait(_PROBE_S):
        raise TierUnavailableError(f"a copy to try a pool with did not end in {_PROBE_S} s")
    if event.error is not None:
        raise event.error if isinstance(event.error, KvTierError) else TierUnavailableError(str(event.error))
