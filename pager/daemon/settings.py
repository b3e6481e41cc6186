"""Settings of pagerd: those of a pager without its device tier, where to listen, who may come, and what all may use.

One TOML file, which `kvtier serve --config` reads too (each takes what is its own). Flag > environment
(KVTIER_HOST__BYTES, KVTIER_LIMITS__DRAIN_S) > file > default. Namespaces come from files alone. Guards: a daemon never
starts on a setting that it does not understand or cannot keep, and prints none of its secrets.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...tiers.errors import ConfigError
from ...tiers.layout import parse_bytes
from ...tiers.nvme.codecs import is_encrypted
from ..config import PagerConfig, check_namespace, check_tags
from ..quota import NamespaceQuota, Size
from ..settings import names_of, read_settings, to_toml
from ..tier_formats import refuse_formats
from .secret_files import check_token_hash, derive_secret, read_secret

ENGINE_SETTINGS = (  # of a shared file: not for a daemon
    *("device_bytes", "staging_bytes", "require_pinned", "backend"),
    *("device", "host", "nvme", "pager_token_file", "pager_ca", "transfer"),
)
_MASKED = ("namespace_secrets", "tokens")
MAX_MODELS = 64
SOCKET_MODES = (0o600, 0o660, 0o666)


@dataclass(frozen=True, slots=True)
class Limits:
    """What all clients may use. Everything here can change while the daemon runs (SIGHUP)."""

    connections: int = 256  # of which one user, or another machine, may have all but an eighth
    hello_s: float = 10.0  # for a connection to say who it is
    requests_in_flight: int = 64  # of one connection, not answered yet
    bytes_in_flight: Size = "16MiB"  # of their frames
    drain_s: float = 30.0  # after SIGTERM, for what only memory holds

    def validate(self) -> None:
        """Raises ConfigError."""
        for name, least in (("connections", 1), ("hello_s", 1), ("requests_in_flight", 1), ("drain_s", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"limits.{name}={getattr(self, name)}: need at least {least}")
        if self.num_bytes_in_flight < 1 << 20:
            raise ConfigError(
                f"limits.bytes_in_flight={self.bytes_in_flight!r}: one frame may have 1 MiB; give that at least"
            )

    @property
    def connections_of_one(self) -> int:
        return self.connections - self.connections // 8

    @property
    def num_bytes_in_flight(self) -> int:
        return parse_bytes(self.bytes_in_flight, name="limits.bytes_in_flight")


@dataclass(frozen=True, slots=True)
class NamespaceSettings:
    """Who owns a namespace, its secret, and its quota (see quota.NamespaceQuota)."""

    uids: tuple[int, ...] = ()
    gids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()  # hashes of them
    secret_file: str | None = None  # else derived from root_secret_file
    trust_domain: str = ""  # namespaces of one domain share memory, and who maps it sees all of theirs
    host_floor: Size = 0
    host_ceiling: Size | None = None
    nvme_floor: Size = 0
    nvme_ceiling: Size | None = None
    write_bytes_per_s: Size | None = None
    pins: int | None = None

    def quota(self) -> dict[str, Size]:
        """What of it is a quota; nothing where nothing is limited."""
        given = {name: getattr(self, name) for name in names_of(NamespaceQuota)}
        return {name: value for name, value in given.items() if value not in (None, 0)}


@dataclass(frozen=True, slots=True)
class DaemonConfig(PagerConfig):
    """As PagerConfig, and what a daemon needs besides. Make it with `load_daemon_config`."""

    device_bytes: Size = 0
    host_bytes: Size = "1GiB"
    socket: str | None = None  # None: see default_socket
    socket_mode: int = 0o600  # 0o660, 0o666: others may connect too; HELLO lets in whom [namespaces] names
    listen: str | None = None  # "host:port", besides the Unix socket; needs tls_cert, tls_key and tokens
    tls_cert: str | None = None
    tls_key: str | None = None
    metrics: str | None = None  # unix:///path or 127.0.0.1:port; None: no metrics
    max_models: int = 1  # served at once, in equal parts; one model in two trust domains counts twice
    slab_uids: tuple[int, ...] = ()  # trusted with the slab itself, and so with every namespace of their domain
    allow_ipc: bool = False  # copy into the device memory of clients with the slab that ask for it (transfer = "ipc")
    root_secret_file: str | None = None
    log_format: str = "text"  # text (key=value) or json
    log_level: str = "info"
    limits: Limits = field(default_factory=Limits)
    namespaces: Mapping[str, NamespaceSettings] = field(default_factory=dict)

    def validate(self) -> DaemonConfig:
        """Check everything that can be checked without opening a socket or a store. Raises ConfigError."""
        PagerConfig.check_tiers(self)
        refuse_formats(self, who="a daemon")
        if self.host_size < 1:
            raise ConfigError(f"host_bytes={self.host_bytes!r}: the daemon's blocks live there; give it some memory")
        if not 1 <= self.max_models <= MAX_MODELS:
            raise ConfigError(f"max_models={self.max_models}: need 1 to {MAX_MODELS}")
        for name, choices in (("log_format", ("text", "json")), ("log_level", ("debug", "info", "warning", "error"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose {', '.join(choices)}")
        if self.socket_mode not in SOCKET_MODES:
            raise ConfigError(f"socket_mode={self.socket_mode:#o}: choose {', '.join(map(oct, SOCKET_MODES))}")
        if not isinstance(self.allow_ipc, bool):
            raise ConfigError(f"allow_ipc={self.allow_ipc!r}: choose true or false")
        self.limits.validate()
        self._check_namespaces()
        self._check_listen()
        return self

    def _check_namespaces(self) -> None:
        for name, settings in self.namespaces.items():
            where = f"namespaces.{check_namespace(name)}"
            for number in (*settings.uids, *settings.gids):
                if number < 0:
                    raise ConfigError(f"{where}: uid or gid {number} must not be negative")
            if settings.trust_domain:
                check_namespace(settings.trust_domain)
            for token_hash in settings.tokens:
                check_token_hash(token_hash, name=f"{where}.tokens")
            if settings.secret_file is None and self.root_secret_file is None:
                raise ConfigError(f"{where} has no secret: give {where}.secret_file, or root_secret_file for all")
        check_tags(self.namespaces, where="namespaces")
        if self._is_encrypted() and not self.namespaces:
            raise ConfigError(
                f"nvme_codec={self.nvme_codec!r} encrypts with the secrets of [namespaces]; there is none"
            )

    def _is_encrypted(self) -> bool:
        chosen = self._asked_codecs() or ()
        names = [chosen] if isinstance(chosen, str) else chosen.values() if isinstance(chosen, Mapping) else chosen
        return any(map(is_encrypted, names))

    def _check_listen(self) -> None:
        if self.listen is None:
            return
        if self.tls_cert is None or self.tls_key is None:
            raise ConfigError(f"listen={self.listen!r}: TCP is served with TLS only; give tls_cert and tls_key")
        if not any(settings.tokens for settings in self.namespaces.values()):
            raise ConfigError(f"listen={self.listen!r}: TCP clients show a token, and no namespace has tokens")

    def resolved(self) -> DaemonConfig:
        """With the secrets that its files hold, and quotas as a pager reads them. Raises ConfigError."""
        root = None if self.root_secret_file is None else read_secret(self.root_secret_file, name="root_secret_file")
        secrets, quotas = dict[str, str](), dict[str, Any]()
        for name, settings in self.namespaces.items():
            if settings.secret_file is not None:
                secret = read_secret(settings.secret_file, name=f"namespaces.{name}.secret_file")
            else:
                assert root is not None  # validate
                secret = derive_secret(root, name)
            secrets[name] = secret.hex()
            if settings.quota():
                quotas[name] = settings.quota()
        made = replace(self, namespace_secrets=secrets, namespace_quotas=quotas)
        return made.validate()

    @property
    def socket_path(self) -> Path:
        return Path(self.socket) if self.socket is not None else default_socket()

    def pager_settings(self) -> dict[str, Any]:
        """What each model's pager takes besides its share of memory and disk; quotas are shared out as those are."""
        kept = {name: getattr(self, name) for name in names_of(PagerConfig)}
        own = ("device_bytes", "host_bytes", "nvme_path", "nvme_bytes", "backend", "status_socket")
        shared = {name: _part(quota, self.max_models) for name, quota in self.quotas().items()}
        return {name: value for name, value in kept.items() if name not in own} | {"namespace_quotas": shared}


def load_daemon_config(
    path: str | os.PathLike[str] | None = None, *, env: Mapping[str, str] | None = None, **overrides: Any
) -> DaemonConfig:
    """Read, check, and resolve secrets. Without a path, the default files are looked for. Raises ConfigError."""
    where = default_config_file() if path is None else Path(path)
    config = read_settings(DaemonConfig, where, env=env, overrides=overrides)
    for name in ("namespace_secrets", "namespace_quotas"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: a daemon takes secrets and quotas of its [namespaces]; see pagerd --print-config"
            )
    return config.validate().resolved()


def print_config(config: DaemonConfig) -> str:
    """The configuration in force as TOML that could be read again, but for what is secret."""
    values = dataclasses.asdict(config)
    values["socket"] = str(config.socket_path)
    for name in (*ENGINE_SETTINGS, "namespace_secrets", "namespace_quotas"):
        del values[name]
    return to_toml(values, _MASKED)


def default_config_file(env: Mapping[str, str] | None = None) -> Path | None:
    """The user's, else the system's, else none."""
    env = os.environ if env is None else env
    home = env.get("XDG_CONFIG_HOME") or (f"{env['HOME']}/.config" if env.get("HOME") else "")
    for folder in filter(None, (home, "/etc")):
        file = Path(folder) / "kvtier" / "pagerd.toml"
        if file.is_file():
            return file
    return None


def default_socket(env: Mapping[str, str] | None = None) -> Path:
    """In systemd's runtime directory, else the user's, else /run/kvtier."""
    env = os.environ if env is None else env
    given = env.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given) / "pagerd.sock"
    runtime = env.get("XDG_RUNTIME_DIR")
    return Path(runtime or "/run") / "kvtier" / "pagerd.sock"


def _part(quota: NamespaceQuota, parts: int) -> dict[str, int]:
    given = {f.name: getattr(quota, f.name) for f in fields(quota)}
    return {name: value if name == "pins" else value // parts for name, value in given.items() if value}
