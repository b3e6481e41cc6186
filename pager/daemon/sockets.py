"""Unix sockets of the daemon: how one is made at a path, and how it goes without taking what a successor has put there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ...tiers.errors import ConfigError

BACKLOG = 64
MAX_PATH_BYTES = 100  # sun_path holds 108


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening Unix socket of that mode. A socket that nobody answers on is taken over.

    Raises ConfigError: path too long, another daemon there, directory missing or not writable.
    """
    if len(str(path).encode()) > MAX_PATH_BYTES:
        raise ConfigError(f"socket={str(path)!r} has more than {MAX_PATH_BYTES} bytes; choose a shorter path")
    if path.exists() and not path.is_socket():
        raise ConfigError(f"socket={str(path)!r} is there already and is no socket; choose another path")
    if not path.parent.is_dir():
        folder = str(path.parent)
        raise ConfigError(f"socket={str(path)!r} cannot be made: there is no directory {folder!r}; make it first")
    if path.is_socket() and _answers(path):
        raise ConfigError(f"socket={str(path)!r}: another daemon listens there; stop it or choose another path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o777 & ~mode)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise ConfigError(f"socket={str(path)!r} cannot be made: {error.strerror}") from error
    finally:
        os.umask(previous)
    listener.listen(BACKLOG)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


class Claim:
    """A file at a path that is ours to remove. An open descriptor keeps its inode from being given to another file."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)

    def remove(self) -> None:
        """Unless another one lies there by now: a successor may have taken the path over while we drained."""
        try:
            if os.path.samestat(os.fstat(self._fd), self._path.lstat()):
                self._path.unlink()
        except FileNotFoundError:
            pass
        finally:
            os.close(self._fd)
