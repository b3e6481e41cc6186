"""A client that registers a pool and orders copies in the protocol's own words, and is told how each ended."""

from __future__ import annotations

import numpy as np

from kvtier.pager.client.attachment import Attachment
from kvtier.pager.client.connection import DaemonConnection
from kvtier.pager.client.orders import CopyOrders
from kvtier.pager.rules import ALL_RULES, Rules
from kvtier.pager.wire import messages as m
from kvtier.tiers.cpu import CpuBackend, HostEvent
from kvtier.tiers.exported import export_rows

from .raw import SIZE, attach

PAGES = 8


class Told:
    """An order whose giver is told."""

    def __init__(self) -> None:
        self.event, self.doubts = HostEvent(), 0

    def over(self, error) -> None:
        self.event.finish(error)

    def in_doubt(self) -> None:
        self.doubts += 1


class Ordering:
    """One process's pool of PAGES pages."""

    def __init__(self, address: str, rules: Rules = ALL_RULES, *, register: bool = True) -> None:
        self.attachment: Attachment = attach(address, features=m.ALL_FEATURES)
        self.backend = CpuBackend()
        self.pool = export_rows(self.backend, PAGES, SIZE)
        self.orders = CopyOrders.begin(self.attachment, rules, lambda: DaemonConnection.open(address))
        if register:
            self.orders.register(0, self.pool)

    def order(self, pages, slots, *, is_write_back: bool) -> Told:
        told = Told()
        self.orders.copy(0, np.array(pages), np.array(slots), is_write_back=is_write_back, order=told)
        return told

    def say(self, message: object, kind: type) -> object:
        return self.attachment.connection.call(message, kind)

    def copy_message(self, pages, slots, *, is_write_back: bool = False) -> m.Copy:
        blobs = np.array(pages, "<u4").tobytes(), np.array(slots, "<u4").tobytes()
        return m.Copy(self.attachment.epoch, self.attachment.store, 0, *blobs, is_write_back)

    def close(self) -> None:
        self.attachment.goodbye()
        self.orders.close()
        self.pool.close()
        self.backend.close(5.0)
