"""Processes that speak with one daemon over a simulated network: the real codec, connections, service and store.

    python tests/simulation/sim_clients.py SEED [STEPS]

Each has the socket's verbs and, where it may map the slab, copies of its own that run on when the socket is gone. What is
checked: every byte read under a lease is what was written under that key, also after resets; what is held does not
vanish; keys of another tenant are absent; each request is answered once; the books agree; and when all
processes are gone, nothing is held. There is no disk here: the store is memory alone (sim_world.py has disks).
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from sim_events import Clock, Trace
from sim_network import SimProcesses, SimTransport, VirtualLoop

from kvtier.pager.daemon.connection import Connection
from kvtier.pager.daemon.models import Budget, Models
from kvtier.pager.daemon.service import Service
from kvtier.pager.daemon.settings import Limits
from kvtier.pager.daemon.tenants import Tenant
from kvtier.pager.keys import owner_tag
from kvtier.pager.rules import ALL_RULES, Rules
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, META_LENGTH, pack, pack_raw, parse_header, unpack
from kvtier.tiers.layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
SIZE, SLOTS, KEYS = LAYOUT.block_bytes, 20, 14
TENANTS = ("one", "two")
STEPS = 3000
CHECK_EVERY = 10  # steps; the books are walked whole
MOST_WAITS = 4000  # steps that the end may take
Answer = Callable[[int, dict[str, Any], bytes], None]


def key_of(tenant: str, number: int) -> bytes:
    return hashlib.blake2b(f"{tenant} {number}".encode(), digest_size=32).digest()


def bytes_of(key: bytes) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(key[:8], "little")).integers(0, 256, SIZE, np.uint8)


@dataclass
class Copy:
    """Of one block by a process, in two halves. `is_over`: nobody waits for it any more."""

    slot: int
    key: bytes
    is_write: bool
    done: int = 0
    generation: int = 0
    found: np.ndarray = field(default_factory=lambda: np.zeros(SIZE, np.uint8))


class Process:
    """One client: its connection, what it was given, and what it does next."""

    def __init__(self, world: World, pid: int, tenant: str, *, maps: bool) -> None:
        self.world, self.pid, self.tenant, self.maps = world, pid, tenant, maps
        self.transport: SimTransport | None = None
        self.previous = (b"", 0)
        self.boot, self.epoch, self.store = b"", 0, 0
        self.copies: list[Copy] = []
        self._forget()

    def _forget(self) -> None:
        """All that belongs to an attachment."""
        self.pending: dict[int, Answer] = {}
        self.given_up: set[int] = set()
        self.inbox, self.next_id = bytearray(), 1
        self.held: set[bytes] = set()
        self.written: dict[int, bytes] = {}  # reserved slots that hold a whole block
        self.store = 0

    # ------------------------------------------------------------------ the wire
    def connect(self) -> None:
        if self.copies:
            return  # says HELLO again only when no copy of its earlier attachment runs
        self._forget()
        connection = Connection(self.world.service, self.world.loop)  # type: ignore[arg-type]
        self.transport = SimTransport(self.world.loop, connection)
        connection.connection_made(self.transport)  # type: ignore[arg-type]
        connection.uid, connection.pid = 1, self.pid if self.maps else -1
        hello = m.Hello(m.OLDEST_VERSION, m.VERSION, list(m.FEATURES), "sim", self.tenant, *self.previous)
        self.ask(hello, self._welcome)

    def _welcome(self, kind: int, fields: dict[str, Any], _: bytes) -> None:
        assert kind == m.Welcome.KIND, fields
        self.boot, self.epoch = fields["boot"], fields["epoch"]
        self.ask(m.Open([LAYOUT.to_dict()], "sim", want_slab=False), self._opened)

    def _opened(self, kind: int, fields: dict[str, Any], _: bytes) -> None:
        assert kind == m.Opened.KIND, fields
        self.store = fields["store"]
        attached = self.world.service.attachments.by_connection.values()
        for own in (one for one in attached if one.epoch == self.epoch):
            own.was_given_slab = self.maps  # no descriptor passes this network

    def ask(self, message: Any, then: Answer, payload: bytes | None = None) -> int:
        number, self.next_id = self.next_id, self.next_id + 1
        self.pending[number] = then
        fields = m.to_fields(message)
        frame = pack(message.KIND, number, fields)
        if payload is not None:
            frame = pack_raw(message.KIND, number, fields, len(payload)) + payload
        assert self.transport is not None
        self.transport.to_daemon += frame
        return number

    def receive(self, data: bytes) -> None:
        self.inbox += data
        while len(self.inbox) >= HEADER.size:
            header = parse_header(self.inbox)
            end = HEADER.size + header.size
            if len(self.inbox) < end:
                return
            body = bytes(self.inbox[HEADER.size : end])
            del self.inbox[:end]
            payload = b""
            if header.is_raw:
                size = META_LENGTH.unpack_from(body)[0]
                body, payload = body[META_LENGTH.size : META_LENGTH.size + size], body[META_LENGTH.size + size :]
            then = self.pending.pop(header.request_id, None)
            self.world.trace.event("reply", f"{self.pid} {header.request_id} {header.kind}")
            assert then is not None or header.request_id in self.given_up, f"an answer to nobody: {unpack(body)}"
            self.given_up.discard(header.request_id)
            if then is not None:
                then(header.kind, unpack(body), payload)

    @property
    def is_attached(self) -> bool:
        return self.transport is not None and not self.transport.is_over and self.store > 0

    def lost(self) -> None:
        """The connection ended. Copies go on; nothing that was not answered is known to have happened."""
        if self.epoch:
            self.previous = (self.boot, self.epoch)
        self.transport = None
        self._forget()

    # ------------------------------------------------------------------ verbs
    def keys(self, most: int = 4, tenant: str | None = None) -> list[bytes]:
        count = self.world.choose.randrange(1, most + 1)
        return [key_of(tenant or self.tenant, self.world.choose.randrange(KEYS)) for _ in range(count)]

    def look_up(self) -> None:
        other = TENANTS[1 - TENANTS.index(self.tenant)]
        tenant, hold = self.world.choose.choice([self.tenant, self.tenant, other]), self.world.choose.random() < 0.3
        keys = self.keys(tenant=tenant)

        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.Found.KIND and len(fields["held"]) == len(keys), fields
            if tenant != self.tenant:
                assert not any(fields["held"]), "a block of another tenant was seen"
            self.held |= {key for key, found in zip(keys, fields["held"], strict=True) if found & m.IS_HELD}

        self.ask(m.Lookup(self.store, b"".join(keys), False, hold), then)

    def reserve(self) -> None:
        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            if kind == m.ERROR:
                assert fields["retry_ms"] > 0, fields
                return
            for slot in np.frombuffer(fields["slots"], "<i4").tolist():
                is_own = self.world.writer.get(slot) == self.tenant
                assert is_own or not self.world.row(self)[slot].any(), "bytes of another tenant"
                self.world.writer[slot] = self.tenant
                (key,) = self.keys(1)
                self._fill(slot, key)

        self.ask(m.Reserve(self.epoch, self.store, 0, self.world.choose.randrange(1, 4)), then)

    def _fill(self, slot: int, key: bytes) -> None:
        if self.maps:
            self.copies.append(Copy(slot, key, is_write=True))
            return

        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.Written.KIND, fields
            self.written[slot] = key

        self.ask(m.Write(self.epoch, self.store, 0, slot), then, bytes_of(key).tobytes())

    def commit(self) -> None:
        slots = list(self.written)
        if not slots:
            return
        keys, hold = [self.written.pop(slot) for slot in slots], self.world.choose.random() < 0.5

        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.Committed.KIND, fields
            results = fields["results"]
            assert all(result & m.STORED in (m.TAKEN, m.HELD_ALREADY) for result in results), list(results)
            self.held |= {key for key, result in zip(keys, results, strict=True) if result & m.IS_HELD}
            self.release(slots)

        words = np.full(len(slots), 4, "<u4").tobytes(), np.full(len(slots), owner_tag(self.tenant), "<u4").tobytes()
        blobs = np.array(slots, "<u4").tobytes(), b"".join(keys), bytes(32 * len(keys))
        self.ask(m.Commit(self.epoch, self.store, 0, *blobs, *words, hold), then)

    def release(self, slots: list[int]) -> None:
        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.Done.KIND and all(fields["flags"]), fields

        self.ask(m.Release(self.epoch, self.store, 0, np.array(slots, "<u4").tobytes()), then)

    def lease(self) -> None:
        keys = list(dict.fromkeys(self.keys()))
        was_held = self.held.intersection(keys)

        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.Leased.KIND, fields
            generations = np.frombuffer(fields["generations"], np.uint64)
            for i, slot in enumerate(np.frombuffer(fields["slots"], "<i4").tolist()):
                assert slot != -1 or keys[i] not in was_held & self.held, "what was held is gone"
                if slot >= 0:
                    self._fetch(Copy(slot, keys[i], is_write=False, generation=int(generations[i])))

        message = m.Lease(self.epoch, self.store, 0, b"".join(keys), self.world.choose.choice([0, 50, 500]))
        self.ask(message, then)

    def _fetch(self, copy: Copy) -> None:
        if self.maps:
            self.copies.append(copy)
            return

        def then(kind: int, fields: dict[str, Any], payload: bytes) -> None:
            assert kind == m.Bytes.KIND and payload == bytes_of(copy.key).tobytes(), "wrong bytes over the socket"
            self.release([copy.slot])

        self.ask(m.Read(self.epoch, self.store, 0, np.array([copy.slot], "<u4").tobytes()), then)

    def unhold(self) -> None:
        if self.held and not self.pending:  # an answer under way may say that it is held again
            key = min(self.held)
            self.held.discard(key)
            self.ask(m.Unhold(self.epoch, self.store, 0, key), lambda kind, fields, _: None)

    def cancel(self) -> None:
        """A look-up that is not answered: its answer may come all the same."""
        lookups = [number for number, then in self.pending.items() if "look_up" in then.__qualname__]
        if lookups:
            del self.pending[lookups[0]]
            self.given_up.add(lookups[0])
            assert self.transport is not None
            self.transport.to_daemon += pack(m.Cancel.KIND, 0, {"request": lookups[0]})

    def ask_late(self) -> None:
        """With the epoch of an attachment before."""

        def then(kind: int, fields: dict[str, Any], _: bytes) -> None:
            assert kind == m.ERROR and fields["code"] == "stale_lease", fields

        self.ask(m.Reserve(self.epoch - 1, self.store, 0, 1), then)

    def go_on_copying(self) -> None:
        """Half a block further, connected or not."""
        if not self.copies:
            return
        copy = self.world.choose.choice(self.copies)
        row, half = self.world.row(self)[copy.slot], slice(copy.done, copy.done + SIZE // 2)
        if copy.is_write:
            row[half] = bytes_of(copy.key)[half]
        else:
            copy.found[half] = row[half]
        copy.done += SIZE // 2
        if copy.done < SIZE:
            return
        self.copies.remove(copy)
        if not copy.is_write:
            assert (copy.found == bytes_of(copy.key)).all(), f"process {self.pid} read wrong bytes in slot {copy.slot}"
        if self.is_attached and copy.is_write:
            self.written[copy.slot] = copy.key
        elif self.is_attached:
            self.release([copy.slot])

    def leave(self) -> None:
        if not self.copies and not self.pending:
            self.store = 0  # the last word
            self.ask(m.Goodbye(self.epoch), self._left)

    def _left(self, kind: int, fields: dict[str, Any], _: bytes) -> None:
        assert kind == m.Bye.KIND, fields
        assert self.transport is not None
        self.transport.reset()
        self.previous = (b"", 0)
        self.epoch = 0


class Tenants:
    """By token; both share one slab, as processes of one user do."""

    def find(self, uid: int, token: str, gids: Any = ()) -> Tenant | None:
        return Tenant(token, {token: token.encode()}) if token in TENANTS else None


class World:
    """The daemon, the network and the processes of one seed."""

    def __init__(self, seed: int, rules: Rules = ALL_RULES) -> None:
        self.choose = random.Random(seed)
        self.clock, self.trace = Clock(), Trace()
        self.loop = VirtualLoop(self.clock)
        self.models = Models(Budget(SLOTS * SIZE, settings={"host_prefault": False}), self.clock)
        limits = Limits(requests_in_flight=self.choose.choice([2, 8, 64]), hello_s=1e6)  # its network takes its time
        self.processes_of_daemon = SimProcesses(rules)
        self.service = Service(
            self.models,
            Tenants(),
            self.loop,  # type: ignore[arg-type]
            rules=rules,
            limits=limits,
            processes=self.processes_of_daemon,
            clock=self.clock,
            random_bytes=self.choose.randbytes,
        )

        self.writer: dict[int, str] = {}  # whose bytes are in a slot
        self.processes: list[Process] = []
        self.orphans: list[SimTransport] = []  # what killed processes have sent is still under way
        self._pids = iter(range(100, 1 << 20))
        for _ in range(4):
            self.spawn()

    def spawn(self) -> None:
        tenant, maps = self.choose.choice(TENANTS), self.choose.random() < 0.6
        self.processes.append(Process(self, next(self._pids), tenant, maps=maps))

    def row(self, process: Process) -> np.ndarray:
        """The slab, as a process maps it."""
        (store,) = self.models._stores.values()
        return store.core.groups[0].slab.rows

    # ------------------------------------------------------------------ steps
    def run(self, steps: int) -> None:
        for number in range(steps):
            self.step(may_harm=True)
            if number % CHECK_EVERY == 0:
                self.models.check_integrity()
        self._end()

    def step(self, *, may_harm: bool) -> None:
        self.clock.now_s += 1e-4
        process, chance = self.choose.choice(self.processes), self.choose.random()
        if chance < 0.45:
            self._network()
        elif chance < 0.65:
            self._loop()
        elif chance < 0.78:
            process.go_on_copying()
        elif chance < 0.784 and may_harm:
            self._harm(process)
        elif process.transport is None:
            process.connect()
        elif process.transport.is_over:
            process.lost()
        elif process.is_attached and may_harm and len(process.pending) < 12:
            self._act(process)

    def _act(self, process: Process) -> None:
        verbs = (process.look_up, process.reserve, process.commit, process.lease, process.unhold, process.ask_late)
        verb = self.choose.choices((*verbs, process.leave, process.cancel), (4, 5, 5, 6, 2, 1, 1, 1))[0]
        self.trace.event("call", f"{process.pid} {verb.__name__}")
        verb()

    def _network(self) -> None:
        """Some bytes arrive somewhere; those of the dead too, and then their end."""
        if self.orphans and self.choose.random() < 0.3:
            orphan = self.orphans[0]
            if orphan.can_deliver():
                orphan.deliver(self.choose.choice([7, 100, 1 << 20]))
            else:
                self.orphans.pop(0).reset()
            return
        process = self.choose.choice(self.processes)
        transport = process.transport
        if transport is None or transport.is_over:
            return
        most = self.choose.choice([1, 7, 100, 5000, 1 << 20])
        if self.choose.random() < 0.5:
            if transport.can_deliver():
                self.trace.event("sent", f"{process.pid} {transport.deliver(most)}")
        else:
            data = transport.take(most)
            self.trace.event("came", f"{process.pid} {len(data)}")
            process.receive(data)

    def _loop(self) -> None:
        """The daemon's loop or one of its threads goes on."""
        if self.loop.ready:
            self.loop.run_ready()
        elif self.loop.jobs:
            self.loop.jobs.pop(self.choose.randrange(len(self.loop.jobs)))()
        else:
            self.loop.run_due_timers()

    def _harm(self, process: Process) -> None:
        if self.choose.random() < 0.6:
            if process.transport is not None and not process.transport.is_over:
                self.trace.event("reset", str(process.pid))
                process.transport.reset()
            return
        self.trace.event("killed", str(process.pid))
        self.kill(process)
        self.spawn()

    def kill(self, process: Process) -> None:
        self.processes.remove(process)
        self.processes_of_daemon.dead.add(process.pid)
        if process.transport is not None:
            self.orphans.append(process.transport)

    def _end(self) -> None:
        """Everything is answered; then everybody goes, and nothing is left."""
        for _ in range(MOST_WAITS):
            self.step(may_harm=False)
            for process in self.processes:
                if process.is_attached and process.written:
                    process.commit()
            if not any(process.pending or process.copies for process in self.processes):
                break
        left = {process.pid: len(process.pending) for process in self.processes if process.pending}
        assert not left, f"requests without an answer, by process: {left}"
        for process in list(self.processes):
            self.kill(process)
        for orphan in self.orphans:
            orphan.reset()
        for _ in range(200):
            self._loop()
        self.models.check_integrity()
        assert self.models.pinned_slots() == 0 and not len(self.service.processes), "the dead hold something"
        (store,) = self.models._stores.values() or (None,)
        assert store is None or not store.clients
        self.models.close(0.0)

    def report(self) -> str:
        return f"{self.trace.total} events ({dict(self.trace.counts)}), trace {self.trace.digest()}"


def run(seed: int, steps: int = STEPS, rules: Rules = ALL_RULES) -> World:
    """One whole run. Whatever goes wrong comes out with the seed, the last events and how to see it again."""
    world = World(seed, rules)
    try:
        world.run(steps)
    except BaseException as error:
        for store in world.models._stores.values():
            store.core.backend.close(5)  # its threads
        again = f"python tests/simulation/sim_clients.py {seed} {steps}"
        raise AssertionError(
            f"seed {seed}: {type(error).__name__}: {error}\nafter {world.report()}\n"
            f"{''.join(world.trace.last)}again: {again}"
        ) from error
    return world


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    print(f"seed {given[0]}: {run(*given).report()}")
