"""Requests to a daemon that serves: the real connection, service and store, with ids, slots and keys that are valid until one
part of them is changed. Behind a reply that is a FAILURE the books are looked at now and then.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from mutate import mutated_bytes, mutated_value

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "simulation"))
from sim_events import Clock
from sim_network import SimProcesses, SimTransport, VirtualLoop

from kvtier.pager.daemon.connection import Connection
from kvtier.pager.daemon.models import Budget, Models
from kvtier.pager.daemon.service import Service
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.keys import owner_tag
from kvtier.pager.rules import ALL_RULES
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, pack_raw, parse_header, unpack
from kvtier.tiers.errors import ProtocolError
from kvtier.tiers.layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
SLOTS, CHECK_EVERY = 24, 50
KEYS = [bytes([number]) * 32 for number in range(1, 17)]
FUZZED = [kind for kind in m.REQUESTS if kind not in (m.Hello, m.Write, m.Goodbye)]


class Everybody:
    def find(self, uid: int, token: str, gids: Any = ()) -> Tenant:
        return Tenant("one", {"one": b"s" * 32}, maps_slab=False)


class Daemon:
    """A service without threads and sockets, and one client of it that is always attached."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.loop = VirtualLoop(self.clock)
        self.models = Models(Budget(SLOTS * LAYOUT.block_bytes, settings={"host_prefault": False}), self.clock)
        self.service = Service(
            self.models,
            Everybody(),
            self.loop,  # type: ignore[arg-type]
            processes=SimProcesses(ALL_RULES),
            clock=self.clock,
            random_bytes=bytes,
        )
        self.number = 0
        self.attach()

    def attach(self) -> None:
        connection = Connection(self.service, self.loop)  # type: ignore[arg-type]
        self.transport = SimTransport(self.loop, connection)
        connection.connection_made(self.transport)  # type: ignore[arg-type]
        connection.uid = 1
        self.slots: list[int] = []  # reserved or leased, as far as we know
        _, welcome = self.ask(m.Hello(1, m.VERSION, list(m.FEATURES)))
        self.epoch = welcome["epoch"]
        kind, opened = self.ask(m.Open([LAYOUT.to_dict()], "fuzz", want_slab=False))
        assert kind == m.Opened.KIND, opened
        self.store = opened["store"]

    def ask(self, message: Any) -> tuple[int, dict[str, Any]]:
        return self.send(message.KIND, m.to_fields(message))

    def send(self, kind: int, fields: Any, *, payload: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """The reply; ERROR and nothing more where the connection ended without one."""
        self.number += 1
        if payload is not None:
            raw = pack_raw(kind, self.number, fields, len(payload)) + payload
        else:
            body = msgpack.packb(fields, default=str, unicode_errors="surrogatepass")
            raw = HEADER.pack(len(body), 1, kind, 0, self.number) + body
        return self.deliver(raw)

    def deliver(self, raw: bytes) -> tuple[int, dict[str, Any]]:
        self.transport.to_daemon += raw
        while self.transport.can_deliver():
            self.transport.deliver(1 << 20)
            self.run()
        self.run()
        said = self.transport.take(1 << 24)
        self.run()
        if len(said) < HEADER.size:
            return m.ERROR, {}
        header = parse_header(said)
        return header.kind, {} if header.is_raw else unpack(said[HEADER.size : HEADER.size + header.size])

    def run(self) -> None:
        while self.loop.ready or self.loop.jobs:
            if self.loop.jobs:
                self.loop.jobs.pop(0)()
            else:
                self.loop.run_ready()

    @property
    def is_attached(self) -> bool:
        return not self.transport.is_closing()

    def drop(self) -> None:
        """The connection ends without a word."""
        self.transport.reset()
        self.run()

    def end(self) -> None:
        self.drop()
        self.models.check_integrity()
        assert self.models.pinned_slots() == 0, "who is gone holds something"
        self.service.close()
        self.models.close(0.0)


@contextmanager
def daemon_requests(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    log = logging.getLogger("kvtier.pagerd")
    log.disabled = True  # a line for each refused connection
    Daemon().end()  # what is loaded once is no input's
    daemon, count, seeded = Daemon(), 0, random.Random()

    def call(choose: random.Random) -> None:
        nonlocal daemon, count, seeded
        if choose is not seeded:  # a batch of its own, so that its seed alone says what happens in it
            daemon.end()
            daemon, count, seeded = Daemon(), 0, choose
        count += 1
        if count % CHECK_EVERY == 0:
            daemon.loop.run_due_timers()
            daemon.models.check_integrity()
        if choose.random() < 0.002:
            daemon.drop()
        if not daemon.is_attached:
            daemon.attach()
        if choose.random() < 0.15:
            kind, said = _write(daemon, choose)
        else:
            message = choose.choice(FUZZED)
            fields = _fields(daemon, choose, message)
            if choose.random() < 0.5:
                fields = mutated_value(choose, fields)
            kind, said = daemon.send(message.KIND, fields)
        if kind in (m.Slots.KIND, m.Leased.KIND):
            daemon.slots += [slot for slot in np.frombuffer(said["slots"], "<i4").tolist() if slot >= 0]
            daemon.slots = daemon.slots[-SLOTS:]
        assert said.get("code") != "error", said  # of the daemon itself
        if kind == m.ERROR:
            raise ProtocolError("refused")

    yield call
    daemon.end()
    log.disabled = False


def _write(daemon: Daemon, choose: random.Random) -> tuple[int, dict[str, Any]]:
    slot = choose.choice(daemon.slots or [0])
    payload = bytes(LAYOUT.block_bytes) if choose.random() < 0.8 else choose.randbytes(choose.randrange(2000))
    fields = m.to_fields(m.Write(daemon.epoch, daemon.store, 0, slot))
    if choose.random() < 0.9:
        return daemon.send(m.Write.KIND, fields, payload=payload)
    daemon.number += 1
    raw = pack_raw(m.Write.KIND, daemon.number, fields, len(payload)) + payload
    found = daemon.deliver(mutated_bytes(choose, raw))
    daemon.drop()  # the rest of a frame that never comes
    return found


def _fields(daemon: Daemon, choose: random.Random, message: type) -> dict[str, Any]:
    """What a client would say, more or less."""
    many = choose.randrange(1, 5)
    keys = choose.sample(KEYS, many)
    slots = np.array(choose.sample(daemon.slots, min(many, len(daemon.slots))), "<u4")
    words = np.full(len(slots), 4, "<u4").tobytes()
    record = {"version": 1, "namespace": "one", "token_ids": b"\1\0\0\0" * 8, "num_computed": 4 * choose.randrange(3)}
    known: dict[str, Any] = {
        "epoch": daemon.epoch,
        "store": daemon.store,
        "group": 0,
        "count": many,
        "keys": b"".join(keys[: len(slots)] if message is m.Commit else keys),
        "parents": bytes(32 * len(slots)),
        "slots": slots.tobytes(),
        "tokens": 16 if message is m.Used else words,
        "owners": np.full(len(slots), owner_tag("one"), "<u4").tobytes(),
        "wait_ms": 0,
        "timeout_ms": 0,
        "session_id": choose.choice(["a", "b", "c"]),
        "record": record | {"extra": {}},
        "hint": choose.choice(["release", "prefetch"]),
        "layouts": [LAYOUT.to_dict()],
        "model_fingerprint": choose.choice(["fuzz", "other"]),
        "about": {},
        "previous_epoch": daemon.epoch - 1,
        "request": daemon.number,
    }
    samples = {int: 1, str: "memfd", bytes: b"", list: [], dict: {}, bool: choose.random() < 0.5, float: 0.5}
    return {name: known.get(name, samples[kind]) for name, kind in m._kinds(message).items()}
