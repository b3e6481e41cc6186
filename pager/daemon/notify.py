"""What systemd asks of a service: say when it is ready and alive (sd_notify), and take over sockets that it opened.

Both are a few bytes in the environment; nothing here needs systemd to be there. Guards: variables meant for another process
are left alone, and a socket that was handed over is not inherited by what we start.
Source: sd_notify(3), sd_listen_fds(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

from ...tiers.errors import ConfigError

FIRST_FD = 3
STATE_S = 10.0  # for a manager that is held up; its queue may hold ten messages
_LOG = logging.getLogger("kvtier.pagerd")


class Notifier:
    """Datagrams to the service manager; does nothing where there is none."""

    def __init__(self, env: MutableMapping[str, str]) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(env)

    def send(self, *fields: str, wait_s: float = STATE_S) -> None:
        """READY=1, STATUS=..., WATCHDOG=1 and the like. A manager that does not listen is no reason to fail.

        Waits while its queue is full: of a change of state it hears once, and without it would wait for ever.
        """
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
                one.settimeout(wait_s)
                one.connect(address)
                one.send("\n".join(fields).encode())
        except OSError as error:
            _LOG.warning("event=notify_failed reason=%s", error.strerror or error)


def _watchdog_s(env: MutableMapping[str, str]) -> float | None:
    """How often to say that we live: half of what the manager waits for. None: it does not wait."""
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        interval_s = int(env.get("WATCHDOG_USEC", "0")) / 2e6
    except ValueError:
        return None
    return interval_s if interval_s > 0 else None


def inherited_sockets(env: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """Sockets of socket activation by name (`unknown` where they have none), and their variables taken away.

    Raises: ConfigError for a descriptor that is no listening stream socket.
    """
    is_ours = env.get("LISTEN_PID") == str(os.getpid())
    count, names = env.get("LISTEN_FDS", ""), env.get("LISTEN_FDNAMES", "").split(":")
    if not is_ours or not count.isdecimal():
        return {}
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        env.pop(name, None)
    found: dict[str, socket.socket] = {}
    for index in range(int(count)):
        name = names[index] if index < len(names) and names[index] else "unknown"
        if name in found:
            raise ConfigError(
                f"socket activation: two sockets are named {name!r}; give each a FileDescriptorName of its own"
            )
        found[name] = _listening(FIRST_FD + index, name)
    return found


def _listening(fd: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        one = socket.socket(fileno=fd)
        is_listening = one.type == socket.SOCK_STREAM and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ConfigError(f"socket activation: descriptor {fd} ({name}) is no socket: {error.strerror}") from error
    if not is_listening:
        raise ConfigError(f"socket activation: socket {name!r} does not listen; use ListenStream= in the .socket unit")
    one.setblocking(False)
    return one
