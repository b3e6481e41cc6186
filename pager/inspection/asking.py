"""Asking: where a target's answers come from. A running pager over its socket, its snapshot page, or a store at rest.

The client's side; starts without numpy and zarr. A target is a socket, the directory of a store, or nothing: then the
environment (KVTIER_SOCKET, RUNTIME_DIRECTORY) or the current directory says where to look.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tiers.errors import ConfigError, KvTierError, ProtocolError, TierUnavailableError
from ...tiers.nvme.below import stores_below
from .. import protocol
from .history import history_path, read_history
from .snapshot import page_path, read_snapshot, stop_watching

DAEMON_SOCKET = "pagerd.sock"
AT_REST = ("status", "sessions", "session", "blocks", "prefix", "explain", "doctor", "check")


class UnreachableError(TierUnavailableError):
    """Nothing answers there."""

    code = "unreachable"


class TimedOutError(TierUnavailableError):
    """Something is there and says nothing in time."""

    code = "timed_out"


class RefusedError(ConfigError):
    """The pager understood the question and says what is wrong with it."""

    code = "refused"


class Target:
    """One pager or store, found once and asked many times."""

    def __init__(self, socket_path: Path | None, store: Path | None, timeout_s: float) -> None:
        self.socket, self.store, self.timeout_s = socket_path, store, timeout_s
        self.model: int | None = None  # of a daemon that has several open

    @classmethod
    def find(cls, where: str | None, *, timeout_s: float = 2.0, env: Mapping[str, str] | None = None) -> Target:
        """Raises UnreachableError naming the places that were looked at."""
        env = os.environ if env is None else env
        places = [where] if where else _places(env)
        for place in places:
            path = Path(place.removeprefix("unix://"))
            if path.is_socket():
                return cls(path, None, timeout_s)
            if path.is_dir():
                live = [path / name for name in (protocol.STATUS_SOCKET, DAEMON_SOCKET) if (path / name).is_socket()]
                if live or (path / "store.json").exists():
                    return cls(live[0] if live else None, path if (path / "store.json").exists() else None, timeout_s)
        looked = ", ".join(places)
        below = "".join(stores_below(Path(place)) for place in places)
        raise UnreachableError(
            f"{looked}: no such socket or store. Is the pager running? Name its socket or its store's directory with "
            f"-s{below}"
        )

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """One answer. Raises: UnreachableError, TimedOutError, RefusedError, ProtocolError."""
        if self.socket is not None:
            try:
                chosen = {} if self.model is None else {"model": self.model}
                return self._ask_socket(self.socket, {"verb": verb, **arguments, **chosen})
            except UnreachableError:
                if self.store is None:
                    raise
                # its pager died and left the socket behind; the store itself can still be read
        assert self.store is not None
        if verb not in AT_REST:
            raise self._needs_a_pager(verb)
        from .at_rest import answer

        return answer(self.store, verb, arguments)

    def _needs_a_pager(self, verb: str) -> RefusedError:
        return RefusedError(
            f"{verb} needs a running pager; {self.store} is a store at rest (it answers {', '.join(AT_REST)})"
        )

    def snapshot(self, *, watch: bool) -> dict[str, Any]:
        """What the pager last published, without asking it. Raises UnreachableError, RefusedError."""
        if self.socket is None:
            raise self._needs_a_pager("a live view")
        try:
            return read_snapshot(page_path(self._need_socket()), watch=watch)
        except TierUnavailableError as error:
            raise UnreachableError(str(error)) from error

    def stop_watching(self) -> None:
        """We look no more; whoever else does, says so again."""
        if self.socket is not None:
            stop_watching(page_path(self.socket))

    def history(self, since_s: float) -> list[dict[str, float]]:
        """Raises UnreachableError."""
        try:
            return read_history(history_path(self._need_socket()), since_s)
        except TierUnavailableError as error:
            raise UnreachableError(str(error)) from error

    def _need_socket(self) -> Path:
        if self.socket is not None:
            return self.socket
        assert self.store is not None
        return self.store / protocol.STATUS_SOCKET  # a pager that is gone left its history there

    def _ask_socket(self, path: Path, body: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self.timeout_s)
            try:
                connection.connect(str(path))
                connection.sendall(protocol.encode(protocol.INSPECT_REQUEST, 1, body))
                kind, _, reply = protocol.read_frame(connection)
            except TimeoutError as error:
                raise TimedOutError(
                    f"pager at {path} did not answer in {self.timeout_s:g} s; `--offline` shows what it last published"
                ) from error
            except (OSError, EOFError) as error:
                raise UnreachableError(f"pager at {path} does not answer: {error}") from error
        if kind == protocol.ERROR_REPLY and isinstance(reply, dict):
            raise RefusedError(str(reply.get("message", "refused")))
        if kind != protocol.INSPECT_REPLY or not isinstance(reply, dict):
            raise ProtocolError(f"pager at {path} answered with frame type {kind}")
        return reply


def _places(env: Mapping[str, str]) -> list[str]:
    found = [env["KVTIER_SOCKET"]] if env.get("KVTIER_SOCKET") else []
    found += [f"{directory}/{DAEMON_SOCKET}" for directory in env.get("RUNTIME_DIRECTORY", "").split(":") if directory]
    return found or [f"/run/kvtier/{DAEMON_SOCKET}", "."]


__all__ = ["ConfigError", "KvTierError", "ProtocolError", "RefusedError", "Target", "TimedOutError", "UnreachableError"]
