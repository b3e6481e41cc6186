"""Every verb with ids that mean something, in orders that no client of ours would choose; the books are checked after each.

    python tests/simulation/sim_verbs.py SEED [STEPS]

The real connection, service and store on a virtual loop. Callers name keys and slots once, twice or after they gave them
back, their own and each other's, leave in the middle of a WRITE, with a word or without one, and die with a child that
goes on sending. A model beside them says what each has: the books must say the same, the bytes of a leased slot
stay as they were, and a reserved one holds nothing of another tenant. There is no disk here, so nothing waits.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from sim_clients import LAYOUT, SIZE, TENANTS, Tenants, bytes_of, key_of
from sim_events import Clock
from sim_network import SimProcesses, SimTransport, VirtualLoop

from kvtier.pager.daemon.connection import Connection
from kvtier.pager.daemon.models import Budget, Models
from kvtier.pager.daemon.service import Service
from kvtier.pager.daemon.store import SharedStore
from kvtier.pager.keys import owner_tag
from kvtier.pager.rules import ALL_RULES
from kvtier.pager.wire import messages as m
from kvtier.pager.wire.frames import HEADER, META_LENGTH, pack, pack_raw, parse_header, unpack

SLOTS, KEYS, CALLERS = 12, 10, 4
STEPS = 1500
Fields = dict[str, Any]


class Caller:
    """One process with one connection, and what the daemon has said that it has."""

    def __init__(self, world: World, pid: int, tenant: str, *, maps: bool) -> None:
        self.world, self.pid, self.tenant, self.maps = world, pid, tenant, maps
        self.leases: Counter[int] = Counter()
        self.reserved: set[int] = set()
        self.seen: dict[int, bytes] = {}  # bytes of leased slots, as they were when the lease began
        self.unsent = b""  # rest of a WRITE
        self.next_id, self.is_connected = 1, True
        connection = Connection(world.service, world.loop)  # type: ignore[arg-type]
        self.transport = SimTransport(world.loop, connection)
        connection.connection_made(self.transport)  # type: ignore[arg-type]
        connection.uid, connection.pid = 1, pid
        hello = m.Hello(m.OLDEST_VERSION, m.VERSION, list(m.FEATURES), "verbs", tenant)
        self.epoch = self.ask(hello)[1]["epoch"]
        self.store = self.ask(m.Open([LAYOUT.to_dict()], "verbs", want_slab=False))[1]["store"]
        self.attachment = world.service.attachments.by_connection[connection]
        self.attachment.was_given_slab = maps  # no descriptor passes this network

    # ------------------------------------------------------------------ the wire
    def ask(self, message: Any, payload: bytes | None = None) -> tuple[int, Fields, bytes]:
        """One request and its answer, at once."""
        number, self.next_id = self.next_id, self.next_id + 1
        fields = m.to_fields(message)
        frame = pack(message.KIND, number, fields)
        if payload is not None:
            frame = pack_raw(message.KIND, number, fields, len(payload)) + payload
        data = self.send(frame)
        header = parse_header(data)
        assert header.request_id == number and HEADER.size + header.size == len(data), unpack(data[HEADER.size :])
        body, rest = data[HEADER.size :], b""
        if header.is_raw:
            size = META_LENGTH.unpack_from(body)[0]
            body, rest = body[META_LENGTH.size : META_LENGTH.size + size], body[META_LENGTH.size + size :]
        answer = unpack(body)
        assert header.kind != m.ERROR or answer["code"] != "error", answer
        return header.kind, answer, rest

    def send(self, data: bytes) -> bytes:
        """Whatever comes back for it."""
        self.transport.to_daemon += data
        while self.transport.can_deliver():
            self.transport.deliver(1 << 20)
            self.world.settle()
        self.world.settle()
        return self.transport.take(1 << 30)

    def forget(self) -> None:
        self.leases.clear()
        self.reserved.clear()
        self.seen.clear()

    # ------------------------------------------------------------------ what is named
    def keys(self) -> list[bytes]:
        choose = self.world.choose
        tenant = choose.choice([self.tenant, self.tenant, self.tenant, *TENANTS])
        return [key_of(tenant, choose.randrange(KEYS)) for _ in range(choose.choice([1, 1, 2, 4, 9]))]

    def slots(self) -> list[int]:
        """Its own most of the time, some of them twice, and in between any."""
        choose, own = self.world.choose, [*self.leases.elements(), *self.reserved]
        count = choose.choice([1, 1, 2, 3, 6])
        anywhere = choose.random() < 0.2 or not own
        return [choose.randrange(SLOTS) if anywhere else choose.choice(own) for _ in range(count)]

    # ------------------------------------------------------------------ verbs about slots
    def reserve(self) -> None:
        kind, answer, _ = self.ask(m.Reserve(self.epoch, self.store, 0, self.world.choose.randrange(5)))
        if kind == m.ERROR:
            assert answer["retry_ms"] > 0, answer
            return
        for slot in np.frombuffer(answer["slots"], "<i4").tolist():
            own = self.world.writer.get(slot) == self.tenant
            assert own or not self.world.rows[slot].any(), f"slot {slot} has bytes of another tenant"
            self.world.writer[slot] = self.tenant
            self.reserved.add(slot)

    def write(self) -> None:
        slot, (key, *_) = self.slots()[0], self.keys()
        kind, _, _ = self.ask(m.Write(self.epoch, self.store, 0, slot), bytes_of(key).tobytes())
        assert (kind == m.Written.KIND) == (slot in self.reserved)

    def write_half(self) -> None:
        """The rest comes later, or never."""
        if self.reserved:
            slot, payload = min(self.reserved), bytes_of(self.keys()[0]).tobytes()
            write = m.Write(self.epoch, self.store, 0, slot)
            frame = pack_raw(write.KIND, self.next_id, m.to_fields(write), SIZE) + payload
            self.next_id += 1
            assert not self.send(frame[: -SIZE // 2])
            self.unsent = frame[-SIZE // 2 :]

    def commit(self) -> None:
        slots, choose = self.slots(), self.world.choose
        keys = [key_of(self.tenant, choose.randrange(KEYS)) for _ in slots]
        owner = owner_tag(choose.choice([self.tenant] * 5 + list(TENANTS)))
        tokens = np.full(len(slots), choose.choice([4, 4, 4, 0, 5]), "<u4").tobytes()
        blobs = np.array(slots, "<u4").tobytes(), b"".join(keys), bytes(32 * len(keys))
        owners, hold = np.full(len(slots), owner, "<u4").tobytes(), choose.random() < 0.3
        kind, answer, _ = self.ask(m.Commit(self.epoch, self.store, 0, *blobs, tokens, owners, hold))
        assert kind == m.Committed.KIND, answer
        for slot, result in zip(slots, answer["results"], strict=True):
            if result & m.STORED == m.TAKEN:
                self.reserved.remove(slot)
                self._leased(slot)

    def lease(self) -> None:
        keys = self.keys()
        kind, answer, _ = self.ask(m.Lease(self.epoch, self.store, 0, b"".join(keys), 0))
        assert kind == m.Leased.KIND, answer
        for slot, key in zip(np.frombuffer(answer["slots"], "<i4").tolist(), keys, strict=True):
            if slot >= 0:
                assert any(key == key_of(self.tenant, number) for number in range(KEYS)), "a block of another tenant"
                self._leased(slot)

    def _leased(self, slot: int) -> None:
        self.leases[slot] += 1
        self.seen.setdefault(slot, self.world.rows[slot].tobytes())

    def release(self) -> None:
        slots = self.slots()
        kind, answer, _ = self.ask(m.Release(self.epoch, self.store, 0, np.array(slots, "<u4").tobytes()))
        assert kind == m.Done.KIND, answer
        assert list(answer["flags"]) == [self._released(slot) for slot in slots]

    def _released(self, slot: int) -> int:
        if self.leases[slot]:
            self.leases[slot] -= 1
            if not self.leases[slot]:
                del self.leases[slot], self.seen[slot]
            return 1
        if slot in self.reserved:
            self.reserved.remove(slot)
            return 1
        return 0

    def read(self) -> None:
        slots = self.slots()
        kind, _, payload = self.ask(m.Read(self.epoch, self.store, 0, np.array(slots, "<u4").tobytes()))
        may = all(slot in self.seen for slot in slots)
        assert (kind == m.Bytes.KIND) == may
        assert not may or payload == b"".join(self.seen[slot] for slot in slots), "READ gave other bytes"

    # ------------------------------------------------------------------ verbs about keys and sessions
    def name_keys(self) -> None:
        keys, choose, group = b"".join(self.keys()), self.world.choose, (self.epoch, self.store, 0)
        flag = choose.random() < 0.5
        messages = (
            m.Lookup(self.store, keys, flag, choose.random() < 0.5),
            m.Hold(*group, keys),
            m.Unhold(*group, keys),
            m.Hint(self.epoch, self.store, keys, m.RELEASE if flag else m.PREFETCH),
            m.Used(self.epoch, self.store, keys, 40),
        )
        kind, answer, _ = self.ask(choose.choice(messages))
        assert kind != m.ERROR, answer

    def keep(self) -> None:
        choose, name = self.world.choose, self.world.choose.choice(["chat", "other"])
        record = {
            "version": 1,
            "namespace": choose.choice([self.tenant, *TENANTS]),
            "token_ids": b"",
            "num_computed": 0,
        }
        messages = (
            m.PutSession(self.epoch, self.store, name, {**record, "extra": {"of": self.tenant}}, 100),
            m.GetSession(self.epoch, self.store, name, choose.random() < 0.5),
            m.DropSession(self.epoch, self.store, name, choose.random() < 0.5),
            m.ListSessions(self.store, ""),
            m.Flush(self.epoch, self.store, 100),
            m.FindModel("verbs"),
        )
        kind, answer, _ = self.ask(choose.choice(messages))
        if kind == m.Session.KIND:
            assert answer["record"]["extra"]["of"] == self.tenant, "a session of another tenant"
        assert kind != m.ERROR or answer["code"] in ("busy", "unknown_session"), answer

    def say_nonsense(self) -> None:
        """With an epoch that is over, or of what is nowhere."""
        slots = np.array(self.slots(), "<u4").tobytes()
        far = np.array([SLOTS], "<u4").tobytes()
        wrong = (
            m.Release(self.epoch - 1, self.store, 0, slots),
            m.Release(self.epoch, self.store, 1, slots),
            m.Release(self.epoch, self.store + 1, 0, slots),
            m.Read(self.epoch, self.store, 0, far),
            m.Settle(self.epoch),
        )
        kind, answer, _ = self.ask(self.world.choose.choice(wrong))
        assert kind == m.ERROR and answer["code"] in ("stale_lease", "protocol"), answer

    # ------------------------------------------------------------------ going
    def send_rest(self) -> None:
        """Of a WRITE; to a daemon that may have let its slot go meanwhile."""
        rest, self.unsent = self.unsent, b""
        if rest and not self.transport.is_over:
            self.send(rest)

    def hang_up(self) -> None:
        """The process lives on. What it may still copy from stays as it is; who cannot copy has nothing any more."""
        self.transport.reset()
        self.world.settle()
        self.is_connected = False
        if not self.maps:
            self.forget()

    def check(self) -> None:
        client = self.attachment.stores.get(self.store)
        assert client is not None or not (self.leases or self.reserved), f"process {self.pid} lost what it had"
        if client is not None:
            (books,) = client.holdings
            leased = {slot: int(books.leased[slot]) for slot in np.flatnonzero(books.leased).tolist()}
            assert leased == self.leases, f"process {self.pid} leases {dict(self.leases)}, the books say {leased}"
            assert set(np.flatnonzero(books.reserved).tolist()) == self.reserved
        for slot, was in self.seen.items():
            assert self.world.rows[slot].tobytes() == was, f"slot {slot} changed under a lease of process {self.pid}"


class World:
    """The daemon, and callers of one seed."""

    def __init__(self, seed: int) -> None:
        self.choose, clock = random.Random(seed), Clock()
        self.loop = VirtualLoop(clock)
        self.models = Models(Budget(SLOTS * SIZE, settings={"host_prefault": False}), clock)
        self.processes = SimProcesses(ALL_RULES)
        self.service = Service(
            self.models,
            Tenants(),
            self.loop,  # type: ignore[arg-type]
            processes=self.processes,
            clock=clock,
            random_bytes=self.choose.randbytes,
        )
        self.writer: dict[int, str] = {}  # whose bytes are in a slot
        self._pids = iter(range(100, 1 << 20))
        self.callers = [self.spawn() for _ in range(CALLERS)]
        self.counts: Counter[str] = Counter()

    def spawn(self) -> Caller:
        return Caller(self, next(self._pids), self.choose.choice(TENANTS), maps=self.choose.random() < 0.5)

    @property
    def store(self) -> SharedStore:
        (store,) = self.models._stores.values()
        return store

    @property
    def rows(self) -> np.ndarray:
        return self.store.core.groups[0].slab.rows

    def settle(self) -> None:
        """Until the daemon has nothing to do but wait."""
        while self.loop.ready or self.loop.jobs:
            if self.loop.ready:
                self.loop.run_ready()
            else:
                self.loop.jobs.pop(0)()

    # ------------------------------------------------------------------ steps
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.loop.clock.now_s += 1e-3
            self.step(self.choose.randrange(len(self.callers)))
            self.models.check_integrity()
            for caller in self.callers:
                caller.check()
        for number in range(len(self.callers)):
            self.kill(number)
        assert self.models.pinned_slots() == 0 and len(self.processes) == CALLERS, "the dead hold something"
        self.models.close(0.0)

    def step(self, number: int) -> None:
        caller, chance = self.callers[number], self.choose.random()
        if chance < (0.3 if caller.unsent else 0.02):
            self._count("kill_in_write" if caller.unsent else "kill")
            self.kill(number)
        elif not caller.is_connected:
            return
        elif caller.unsent:
            self._count("send_rest")
            caller.send_rest()
        elif chance < 0.03:
            self._count("hang_up")
            caller.hang_up()
            if not caller.maps:
                self.callers[number] = self.spawn()
        elif chance < 0.04:
            self._count("goodbye")
            assert caller.ask(m.Goodbye(caller.epoch))[0] == m.Bye.KIND
            caller.forget()
            caller.transport.reset()
            self.settle()
            self.callers[number] = self.spawn()
        else:
            verbs = (caller.reserve, caller.write, caller.commit, caller.lease, caller.release, caller.read)
            rest = (caller.name_keys, caller.keep, caller.say_nonsense, caller.write_half)
            verb = self.choose.choices((*verbs, *rest), (5, 4, 6, 6, 6, 3, 4, 2, 1, 1))[0]
            self._count(verb.__name__)
            verb()

    def _count(self, what: str) -> None:
        self.counts[what] += 1

    def kill(self, number: int) -> None:
        """A child of it has the socket, and sends what was left to send when the daemon has noticed."""
        caller = self.callers[number]
        self.processes.dead.add(caller.pid)
        while any(client.pid == caller.pid for client in self.processes._by_id.values()):
            self.loop.run_due_timers()
            self.settle()
        caller.forget()
        before = self.rows.copy()
        caller.send_rest()
        assert (self.rows == before).all(), f"a child of process {caller.pid} wrote into a slot that was given back"
        self.callers[number] = self.spawn()


def run(seed: int, steps: int = STEPS) -> World:
    """One whole run. Whatever goes wrong comes out with the seed and how to see it again."""
    world = World(seed)
    try:
        world.run(steps)
    except BaseException as error:
        again = f"python tests/simulation/sim_verbs.py {seed} {steps}"
        said = f"seed {seed}: {type(error).__name__}: {error}\nafter {dict(world.counts)}\nagain: {again}"
        raise AssertionError(said) from error
    return world


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    print(f"seed {given[0]}: {dict(run(*given).counts)}")
