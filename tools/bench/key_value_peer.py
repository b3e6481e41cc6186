"""A local Valkey or Redis server beside the daemon: the same blocks put and got, the same keys looked up, over a Unix socket.

Found on PATH at run time; where there is none, the rows say so and how to have one. It runs in memory alone, as fast as it
can be set up: no persistence, no TCP. The client below speaks RESP2 with pipelines, sends blocks from where they lie and
receives them where they shall be, so that what is measured is the server and the socket, not a library.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ...tiers.errors import ConfigError

PROGRAMS = ("valkey-server", "redis-server")
NOT_INSTALLED = "no valkey-server or redis-server on PATH: apt install valkey-server (or redis-server)"
START_S = 10.0
PIPELINE = 16  # blocks in flight; more gained nothing
KEYS_IN_FLIGHT = 1024


class KeyValuePeer:
    """Started at once, ended with `close`. Raises ConfigError when it does not start."""

    def __init__(self, folder: Path, program: str) -> None:
        folder.mkdir()
        self._socket_path = folder / "s"
        settings = ("--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", str(self._socket_path))
        self._process = subprocess.Popen(
            [program, *settings, "--dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._buffer = bytearray(1 << 16)
        try:
            self._socket = self._connect()
            self.name = f"{Path(program).name.partition('-')[0].title()} {self._version()}"
        except BaseException:
            self.close()
            raise

    @staticmethod
    def find() -> str | None:
        """The program, or None."""
        return next(filter(None, map(shutil.which, PROGRAMS)), None)

    def __enter__(self) -> KeyValuePeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ cases
    def put(self, keys: Sequence[bytes], rows: Sequence[memoryview]) -> None:
        """All blocks are in the server's memory when this returns."""
        for first in range(0, len(keys), PIPELINE):
            part = range(first, min(first + PIPELINE, len(keys)))
            for i in part:
                head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(keys[i]), keys[i], rows[i].nbytes)
                self._socket.sendall(head)
                self._socket.sendall(rows[i])
                self._socket.sendall(b"\r\n")
            for _ in part:
                if self._line() != b"+OK":
                    raise ConfigError(f"{self.name} did not take a block")

    def get(self, keys: Sequence[bytes], rows: Sequence[memoryview]) -> None:
        """Into the rows, in order."""
        for first in range(0, len(keys), PIPELINE):
            part = range(first, min(first + PIPELINE, len(keys)))
            self._socket.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(keys[i]), keys[i]) for i in part))
            for i in part:
                if self._line() != b"$%d" % rows[i].nbytes:
                    raise ConfigError(f"{self.name} does not hold a block that was put")
                self._into(rows[i])
                self._line()

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        """One EXISTS per key, pipelined: a single EXISTS of many keys tells only how many there are."""
        found: list[bool] = []
        for first in range(0, len(keys), KEYS_IN_FLIGHT):
            part = keys[first : first + KEYS_IN_FLIGHT]
            self._socket.sendall(b"".join(b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(key), key) for key in part))
            found += [self._line() == b":1" for _ in part]
        return found

    def close(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        self._process.terminate()
        self._process.wait(10)

    # ------------------------------------------------------------------ RESP
    def _connect(self) -> socket.socket:
        deadline_s = time.monotonic() + START_S
        while True:
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                one.connect(str(self._socket_path))
                self._start = self._end = 0
                return one
            except OSError:
                one.close()
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise ConfigError("the server that was found on PATH does not start") from None
                time.sleep(0.02)

    def _version(self) -> str:
        self._socket.sendall(b"INFO server\r\n")
        body = bytearray(int(self._line()[1:]))
        self._into(memoryview(body))
        self._line()
        lines = dict(line.partition(b":")[::2] for line in bytes(body).split(b"\r\n"))
        return (lines.get(b"valkey_version") or lines[b"redis_version"]).decode()

    def _line(self) -> bytes:
        """The next line, without its end."""
        while (end := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            self._fill()
        line = bytes(self._buffer[self._start : end])
        self._start = end + 2
        return line

    def _fill(self) -> None:
        rest = self._end - self._start
        self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest
        count = self._socket.recv_into(memoryview(self._buffer)[rest:])
        if not count:
            raise ConfigError("the server closed its connection")
        self._end += count

    def _into(self, target: memoryview) -> None:
        """What was read ahead, then straight from the socket."""
        ahead = min(self._end - self._start, target.nbytes)
        target[:ahead] = self._buffer[self._start : self._start + ahead]
        self._start += ahead
        left = target[ahead:]
        while left.nbytes:
            count = self._socket.recv_into(left)
            if not count:
                raise ConfigError("the server closed its connection in the middle of a block")
            left = left[count:]
