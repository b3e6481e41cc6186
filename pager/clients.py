"""Clients and their pins: holds belong to a process and die with it, not with its socket.

An end of file on a connection only says that nobody will ask for more; copies that the process started may still read
the pinned slots. The pidfd says when the process is really gone (rule 10): in measurements the end of file came first
every time.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field

from ..tiers.errors import ConfigError
from .rules import ALL_RULES, Rule, Rules


@dataclass(slots=True)
class Client:
    """A process that holds something. `releases` undo its holds, newest first."""

    pid: int
    pidfd: int
    is_disconnected: bool = False
    releases: list[Callable[[], None]] = field(default_factory=list)


class Clients:
    """Who is attached. Call `reap` now and then; it never blocks."""

    def __init__(self, rules: Rules = ALL_RULES) -> None:
        self._rules = rules
        self._by_id: dict[int, Client] = {}
        self._next_id = 1

    def attach(self, pid: int) -> int:
        """Raises ConfigError when there is no such process."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise ConfigError(f"client pid={pid}: {error.strerror}") from error
        client_id = self._next_id
        self._next_id += 1
        self._by_id[client_id] = Client(pid, pidfd)
        return client_id

    def hold(self, client_id: int, release: Callable[[], None]) -> None:
        """Remember how to undo a hold of this client."""
        self._by_id[client_id].releases.append(release)

    def pid(self, client_id: int) -> int:
        """Of its process; -1 when it is gone."""
        client = self._by_id.get(client_id)
        return -1 if client is None else client.pid

    def release(self, client_id: int) -> None:
        """Undo its holds now: the process itself says that no copy of its runs any more."""
        if client_id in self._by_id:
            self._let_go(client_id)

    def disconnected(self, client_id: int) -> None:
        """Its socket closed. Its holds stay until the process is gone."""
        client = self._by_id.get(client_id)
        if client is None:
            return
        client.is_disconnected = True
        if not self._rules.holds(Rule.PINS_DIE_WITH_THE_PROCESS):
            self._let_go(client_id)  # a test took rule 10 out

    def reap(self) -> int:
        """Release the holds of every process that has ended. Returns how many clients went."""
        if not self._by_id:
            return 0
        poller = select.poll()
        ids = {client.pidfd: client_id for client_id, client in self._by_id.items()}
        for fd in ids:
            poller.register(fd, select.POLLIN)
        gone = [ids[fd] for fd, _ in poller.poll(0)]
        for client_id in gone:
            self._let_go(client_id)
        return len(gone)

    def close(self) -> None:
        for client_id in list(self._by_id):
            self._let_go(client_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def _let_go(self, client_id: int) -> None:
        client = self._by_id.pop(client_id)
        for release in reversed(client.releases):
            release()
        os.close(client.pidfd)
