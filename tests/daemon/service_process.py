"""A real pagerd in a process of its own, with a service manager that listens to it, and the verbs of a raw client."""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.pager.client.connection import DaemonConnection, Greeting
from kvtier.pager.keys import owner_tag
from kvtier.pager.wire import messages as m
from kvtier.tiers.layout import KVLayout

from .. import warm

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", name="full")
BLOCK = LAYOUT.block_bytes
WAIT_S = 60.0
_LAUNCH = 'LISTEN_PID=$$ exec "$0" "$@"'  # sd_listen_fds wants the pid of the process itself


def free_port() -> int:
    """One that no connection is given by chance before its server has it: below those that the kernel picks itself."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = secrets.randbelow(low - 10_000) + 10_000
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue


class Pagerd:
    """Started at once; `ready` says that it serves. Use as a context."""

    def __init__(self, folder: Path, config: str = "", *flags: str, listener: socket.socket | None = None, **env: str):
        self.folder, self.socket = folder, folder / "d.sock"
        self.config = folder / "pagerd.toml"
        self.config.write_text(config)
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(folder / f"notify{time.monotonic_ns()}"))
        self.log_file = folder / f"log{time.monotonic_ns()}"
        command = [sys.executable, "-m", "kvtier.tools.pagerd", "--config", str(self.config), *flags]
        command += [] if listener is not None else ["--socket", str(self.socket)]
        settings = {**os.environ, "NOTIFY_SOCKET": self._manager.getsockname(), **env}
        extra: dict = {}
        if listener is not None:
            command = ["/bin/sh", "-c", _LAUNCH, *command]
            settings |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "pagerd"}
            fd = listener.fileno()
            extra = {"pass_fds": (3,), "preexec_fn": lambda: os.dup2(fd, 3)}
            self.socket = Path(listener.getsockname())
        with open(self.log_file, "w") as log:
            how: dict[str, Any] = dict(stderr=log, stdout=log, env=settings, cwd="/")
            if listener is None:
                self.process = warm.light.start(*command[1:], **how)
            else:
                self.process = subprocess.Popen(command, **how, **extra)

    def __enter__(self) -> Pagerd:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._manager.close()

    def hear(self, wanted: str) -> list[str]:
        """Everything that it tells its manager, up to a line that begins like this."""
        heard: list[str] = []
        deadline_s = time.monotonic() + WAIT_S
        while not any(line.startswith(wanted) for line in heard):
            has_ended = self.process.poll() is not None  # what it said is in the queue then
            is_there = bool(select.select([self._manager], [], [], 0.0 if has_ended else 0.2)[0])
            assert (is_there or not has_ended) and time.monotonic() < deadline_s, (heard, self.log())
            if is_there:
                heard += self._manager.recv(4096).decode().split("\n")
        return heard

    def ready(self) -> Pagerd:
        self.hear("READY=1")
        return self

    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for_log(self, text: str, times: int = 1) -> str:
        deadline_s = time.monotonic() + WAIT_S
        while self.log().count(text) < times:
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.01)
        return self.log()

    def reload(self, config: str) -> None:
        self.config.write_text(config)
        self.process.send_signal(signal.SIGHUP)
        self.hear("RELOADING=1")
        self.hear("READY=1")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    def connect(self, token: str = "") -> RawClient:
        address, greeting = f"unix://{self.socket}", Greeting("test", token)
        return RawClient(DaemonConnection.open(address, greeting, timeout_s=WAIT_S))


class RawClient:
    """One connection, one model, blocks over the socket."""

    def __init__(self, connection: DaemonConnection) -> None:
        self.connection, self.epoch = connection, connection.welcome.epoch
        self.namespaces = {str(name): secret for name, secret in connection.welcome.namespaces.items()}

    def open(self, fingerprint: str = "test") -> RawClient:
        message = m.Open([LAYOUT.to_dict()], fingerprint, want_slab=False)
        opened = self.connection.call(message, m.Opened, timeout_s=WAIT_S)
        self.store, self.num_slots = opened.store, opened.num_slots[0]
        self.limit = opened.lease_limits[0]
        return self

    def reserve(self, count: int) -> np.ndarray:
        reply = self.connection.call_patiently(m.Reserve(self.epoch, self.store, 0, count), m.Slots, timeout_s=WAIT_S)
        return np.frombuffer(reply.slots, "<i4")

    def write(self, slot: int, block: bytes) -> None:
        message = m.Write(self.epoch, self.store, 0, int(slot))
        self.connection.begin(message, m.Written, memoryview(block)).result(WAIT_S)

    def commit(self, slots, keys: list[bytes], namespace: str, *, hold: bool = False) -> list[int]:
        n = len(keys)
        words = np.full(n, LAYOUT.block_size, "<u4").tobytes(), np.full(n, owner_tag(namespace), "<u4").tobytes()
        blob, none = b"".join(keys), bytes(32 * n)
        message = m.Commit(self.epoch, self.store, 0, np.asarray(slots, "<i4").tobytes(), blob, none, *words, hold)
        return list(self.connection.call(message, m.Committed, timeout_s=WAIT_S).results)

    def put(self, keys: list[bytes], blocks: list[bytes], namespace: str, *, hold: bool = False) -> list[int]:
        """One by one, as a client with few slots would."""
        results = []
        for key, block in zip(keys, blocks, strict=True):
            slots = self.reserve(1)
            self.write(slots[0], block)
            results += self.commit(slots, [key], namespace, hold=hold)
            self.release(slots)
        return results

    def release(self, slots) -> None:
        message = m.Release(self.epoch, self.store, 0, np.asarray(slots, "<i4").tobytes())
        self.connection.call(message, m.Done, timeout_s=WAIT_S)

    def lookup(self, keys: list[bytes]) -> list[int]:
        message = m.Lookup(self.store, b"".join(keys), prefix=False)
        reply = self.connection.call(message, m.Found, timeout_s=WAIT_S)
        return list(reply.held)

    def lease(self, keys: list[bytes], wait_ms: int = 60_000) -> np.ndarray:
        message = m.Lease(self.epoch, self.store, 0, b"".join(keys), wait_ms)
        reply = self.connection.call(message, m.Leased, timeout_s=wait_ms / 1000 + WAIT_S)
        return np.frombuffer(reply.slots, "<i4")

    def read(self, slots) -> list[bytes]:
        rows = [bytearray(BLOCK) for _ in slots]
        message = m.Read(self.epoch, self.store, 0, np.asarray(slots, "<i4").tobytes())
        self.connection.begin_read(message, [memoryview(row) for row in rows]).result(WAIT_S)
        return [bytes(row) for row in rows]

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        found = []
        for key in keys:
            slots = self.lease([key])
            found.append(self.read(slots)[0] if slots[0] >= 0 else None)
            if slots[0] >= 0:
                self.release(slots)
        return found

    def flush(self) -> None:
        self.connection.call(m.Flush(self.epoch, self.store, 60_000), m.Flushed, timeout_s=2 * WAIT_S)

    def close(self) -> None:
        self.connection.close()
