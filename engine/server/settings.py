"""What an operator decides about a server, and the rule that nobody serves the world by accident."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...pager.config import check_namespace
from ...pager.keys import SALT_MARK
from ...tiers.errors import ConfigError

DEFAULT_NAMESPACE = "default"
MIN_KEY_CHARS = 16  # shorter ones can be guessed over a network
MAX_BASE_CHARS = 64 - len(SALT_MARK) - 16  # a salted namespace has a mark and 16 hex digits behind its name


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and names of one server. Without `api_keys` everybody is in the namespace "default"."""

    model_name: str
    max_context: int | None = None  # tokens of prompt and answer; None: what the model and the tiers can do
    max_concurrency: int = 256  # requests that generate at a time
    max_request_bytes: int = 16 << 20
    keep_alive_s: float = 5.0  # a silent stream says so this often
    drain_s: float = 30.0  # running requests may go on so long after SIGTERM
    request_timeout_s: float | None = None
    idle_s: float = 300.0  # a session unused for so long is parked
    max_sessions: int = 10_000  # per namespace
    pinned_share: float = 0.5  # of what all tiers hold, for pins of clients
    api_keys: Mapping[str, str] = field(default_factory=dict)  # key -> namespace

    def __post_init__(self) -> None:
        for name in ("max_context", "max_concurrency", "max_request_bytes", "max_sessions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: need at least 1")
        if min(self.keep_alive_s, self.idle_s) <= 0 or self.drain_s < 0:
            raise ConfigError("keep_alive_s and idle_s must be above 0, drain_s must not be negative")


def load_api_keys(path: str) -> dict[str, str]:
    """Read a TOML file of lines `"key" = "namespace"`. Raises: ConfigError, which never shows a key."""
    try:
        raw: dict[str, Any] = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --api-keys {path!r}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--api-keys {path!r} is not valid TOML: {error}") from error
    if not raw:
        raise ConfigError(f'--api-keys {path!r} holds no key; add lines such as "KEY" = "namespace"')
    for number, (key, namespace) in enumerate(raw.items(), 1):
        _check_entry(f"--api-keys {path!r}, entry {number}", key, namespace)
    return raw


def _check_entry(where: str, key: str, namespace: Any) -> None:
    if not isinstance(namespace, str):
        raise ConfigError(f'{where}: give lines such as "KEY" = "namespace", without tables')
    if len(key) < MIN_KEY_CHARS or not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"{where}: a key needs at least {MIN_KEY_CHARS} printable ASCII characters and no space")
    check_namespace(namespace)
    if SALT_MARK in namespace or len(namespace) > MAX_BASE_CHARS:
        raise ConfigError(
            f"{where}: namespace {namespace!r} needs at most {MAX_BASE_CHARS} characters and no {SALT_MARK!r}, which "
            "marks a cache_salt"
        )


def check_exposure(host: str, settings: ServerSettings) -> None:
    """Raises ConfigError for an address that others can reach, when no key is asked for."""
    if not settings.api_keys and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: others can reach this address and no API key would be asked for; give --api-keys FILE, or "
            "stay on --host 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
