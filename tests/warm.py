"""Processes for tests that start warm: forked from one that has imported what they need, and done nothing else.

`kvtier serve` spends six seconds of CPU on importing torch and transformers before it does anything, `pagerd` half a second;
what a test of their behaviour is about comes after that. A process made here is one like any other: a pid of its own that is
killed, waited for and counted as a child of the test. That commands start from nothing is tested where it is the point
(test_packaging.py, test_layers.py, and whoever asks for a cold start).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

LIGHT = (
    *("kvtier.tools.pagerd", "kvtier.pager.daemon.server", "kvtier.pager.daemon.store", "kvtier.pager.daemon.table"),
    *("kvtier.pager.daemon.manners", "kvtier.pager.daemon.logs", "kvtier.pager.pager", "kvtier.pager.client.remote"),
    *("kvtier.tiers.nvme.store", "kvtier.tools.inspect.verbs"),
)
HEAVY = (
    *(
        "kvtier.tools.cli",
        "kvtier.tools.serve",
        "kvtier.engine.engine",
        "kvtier.engine.needle",
        "kvtier.engine.server.app",
    ),
    *("kvtier.engine.server.run", "kvtier.engine.prefix_cache", "transformers.models.auto"),
)
_SUBREAPER = 36  # prctl: who is left behind by a descendant becomes a child of ours
_MOST_BYTES = 1 << 18  # of a request


class Process:
    """A child, with what of subprocess.Popen the tests use."""

    def __init__(self, pid: int, stdin: IO[str] | None, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if self.poll() is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                select.select([pidfd], [], [], timeout)
            finally:
                os.close(pidfd)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Parent:
    """Of processes that begin with these modules; made by the first who wants one, ends with us."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules, self._link, self._lock = modules, None, threading.Lock()

    def start(self, *arguments: object, stdin=None, stdout=None, stderr=None, env=None, cwd=None) -> Process:
        """As subprocess.Popen([sys.executable, *arguments], ..., text=True) would: `-m module`, `-c code` or a script."""
        ours: list[IO[str] | None] = []
        theirs: list[int] = []
        for number, given in enumerate((stdin, stdout, stderr)):
            if given == subprocess.PIPE:
                reader, writer = os.pipe()
                theirs.append(writer if number else reader)
                ours.append(open(reader if number else writer, "r" if number else "w"))  # noqa: SIM115
            else:
                theirs.append(os.dup(number if given is None else given.fileno()))
                ours.append(None)
        request = [list(map(str, arguments)), dict(os.environ if env is None else env), str(cwd or os.getcwd())]
        try:
            with self._lock:
                link = self._connected()
                socket.send_fds(link, [json.dumps(request).encode()], theirs)
                pid = int(link.recv(64))
        finally:
            for fd in theirs:
                os.close(fd)
        return Process(pid, *ours)

    def run(self, *arguments, input: str = "", timeout=None, env=None, cwd=None) -> subprocess.CompletedProcess[str]:
        """As subprocess.run([sys.executable, *arguments], capture_output=True, text=True) would."""
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            process = self.start(*arguments, **dict(zip(("stdin", "stdout", "stderr"), files)), env=env, cwd=cwd)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
                process.wait()
            for file in files:
                file.seek(0)
            return subprocess.CompletedProcess(arguments, code, files[1].read(), files[2].read())

    def _connected(self) -> socket.socket:
        if self._link is None:
            ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
            self._link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(other.fileno()), *self._modules]
            process = subprocess.Popen(command, pass_fds=[other.fileno()])
            other.close()
            atexit.register(lambda: (self._link.close(), process.wait(60)))
        return self._link


light, heavy = Parent(LIGHT), Parent(HEAVY)


def serve(link: socket.socket) -> list[str] | None:
    """Fork whenever asked. Returns what to run in each child, and None in the end."""
    while True:
        data, fds, _, _ = socket.recv_fds(link, _MOST_BYTES, 3)
        if not data:
            return None
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid:
                os.write(writer, str(pid).encode())
                os._exit(0)
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
            link.close()
            os.closerange(3, 3 + max(reader, writer, *fds))
            arguments, environ, folder = json.loads(data)
            os.environ.clear()
            os.environ.update(environ)
            os.chdir(folder)
            return arguments
        os.waitpid(between, 0)  # its child is another's now
        link.send(os.read(reader, 64))
        for fd in (reader, writer, *fds):
            os.close(fd)


def be(arguments: list[str]) -> None:
    """What python does with these arguments."""
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # it is run, not imported
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        main_module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main_module.__dict__)
    else:
        sys.argv = arguments
        if not sys.flags.safe_path:
            sys.path[:0] = [str(Path(what).resolve().parent)]
        runpy.run_path(what, run_name="__main__")


def main(fd: str, *modules: str) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is never walked over is never copied
    asked = serve(socket.socket(fileno=int(fd)))
    os._exit(0 if asked is None else whole_life(asked))  # taking torch apart, piece by piece, costs a second


def whole_life(arguments: list[str]) -> int:
    """The exit code, when threads and those who wait for the exit have ended as they do in any process."""
    code: Any = 0
    try:
        be(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


__all__ = ["Process", "heavy", "light"]

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    main(*sys.argv[1:])
