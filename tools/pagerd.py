"""`pagerd`: the daemon that keeps one memory of blocks for many processes; also checks and prints a configuration, and
makes secrets and tokens for it.

Starts without torch and zarr. Exit codes: 0 ended as asked, 2 refused to start, 70 a bug in the books.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tiers.errors import ConfigError, KvTierError

if TYPE_CHECKING:
    import socket

    from ..pager.daemon.settings import DaemonConfig

_LOG = logging.getLogger("kvtier.pagerd")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except KvTierError as error:
        print(f"pagerd: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pagerd",
        description="One memory of KV blocks for many processes.",
        epilog="A flag is stronger than the environment (KVTIER_HOST__BYTES, KVTIER_LIMITS__DRAIN_S), that than the file.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file (default: ~/.config/kvtier/pagerd.toml, then /etc/kvtier/pagerd.toml)",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen (default: $XDG_RUNTIME_DIR/kvtier/pagerd.sock, or in /run)"
    )
    parser.add_argument("--host-bytes", metavar="SIZE", help="memory for blocks, of all models together (default 1GiB)")
    parser.add_argument("--nvme-path", metavar="DIR", help="where stores lie; without it, memory only")
    parser.add_argument(
        "--nvme-bytes", metavar="SIZE", help="disk for blocks, of all models that are open; stores of others stay"
    )
    parser.add_argument(
        "--nvme-codec", metavar="NAME", help="how new stores keep blocks: none, zstd, aes, zstd+aes, ..."
    )
    parser.add_argument("--max-models", metavar="N", type=int, help="models served at once, in equal parts (default 1)")
    parser.add_argument("--durability", choices=("none", "batch", "always"))
    parser.add_argument("--no-prefault", action="store_true", help="take memory only as it is used")
    parser.add_argument(
        "--allow-ipc",
        action="store_true",
        help="copy into the device memory of clients that ask for it and map the slab",
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="TCP with TLS and tokens besides the socket")
    parser.add_argument("--metrics", metavar="ADDRESS", help="Prometheus at unix:///path or 127.0.0.1:port")
    parser.add_argument("--log-format", choices=("text", "json"))
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    once = parser.add_mutually_exclusive_group()
    once.add_argument("--check-config", action="store_true", help="say whether the configuration is good, and end")
    once.add_argument(
        "--print-config", action="store_true", help="print the configuration in force as TOML, secrets masked, and end"
    )
    once.add_argument("--new-secret", metavar="FILE", help="make a secret in a new file of mode 0600, and end")
    once.add_argument("--new-token", action="store_true", help="print a token for a client and its hash, and end")
    once.add_argument("--hash-token", action="store_true", help="read a token from stdin, print its hash, and end")
    parser.add_argument("--protocol", type=int, help=argparse.SUPPRESS)  # tests: speak this version at most
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from ..pager.daemon import secret_files
    from ..pager.daemon.settings import print_config

    if arguments.new_secret:
        secret_files.write_new_secret(arguments.new_secret)
        return 0
    if arguments.new_token:
        token, kept = secret_files.new_token()
        print(f"token (for the client): {token}\nhash (for tokens of its namespace): {kept}")
        return 0
    if arguments.hash_token:
        return _hash_token(sys.stdin.readline().strip())
    config = _load(arguments)
    if arguments.check_config:
        _check(config)
        print("config ok")
        return 0
    if arguments.print_config:
        print(print_config(config), end="")
        return 0
    return _serve(arguments, config)


def _hash_token(token: str) -> int:
    from ..pager.daemon.secret_files import hash_token, is_token

    if not is_token(token):
        raise ConfigError("stdin does not hold a token of pagerd --new-token; words that somebody chose are not taken")
    print(hash_token(token))
    return 0


def _load(arguments: argparse.Namespace) -> DaemonConfig:
    from ..pager.daemon.settings import load_daemon_config

    names = (
        "socket",
        "host_bytes",
        "nvme_path",
        "nvme_bytes",
        "nvme_codec",
        "max_models",
        "durability",
        "listen",
        "metrics",
    )
    given: dict[str, Any] = {name: getattr(arguments, name) for name in (*names, "log_format", "log_level")}
    given["host_prefault"] = False if arguments.no_prefault else None
    given["allow_ipc"] = True if arguments.allow_ipc else None
    return load_daemon_config(arguments.config, **given)


def _check(config: DaemonConfig) -> None:
    """What needs files and libraries besides. Raises ConfigError."""
    from ..pager.daemon.metrics import check_metrics
    from ..pager.daemon.tls import server_context
    from ..pager.wire.hosts import parse_host

    if config.metrics is not None:
        check_metrics(config.metrics)
    if config.listen is not None and config.tls_cert is not None and config.tls_key is not None:
        parse_host(config.listen, name="listen")
        server_context(config.tls_cert, config.tls_key)


def _serve(arguments: argparse.Namespace, config: DaemonConfig) -> int:
    from ..pager.daemon.logs import set_up_logs
    from ..pager.daemon.manners import Manners
    from ..pager.daemon.models import Budget
    from ..pager.daemon.notify import Notifier, inherited_sockets
    from ..pager.daemon.server import Daemon
    from ..pager.daemon.table import tenants_of
    from ..pager.wire.messages import VERSION

    set_up_logs(config.log_format, config.log_level, under_systemd="JOURNAL_STREAM" in os.environ)
    _check(config)
    sockets = inherited_sockets(os.environ)
    inherited = _take_unix(sockets)
    if inherited is None and config.socket is None:
        _make_folder(config.socket_path.parent)
    where = config.socket_path if inherited is None else Path(inherited.getsockname())
    budget = Budget(
        config.host_size,
        None if config.nvme_path is None else Path(config.nvme_path),
        config.nvme_size,
        config.max_models,
        config.pager_settings(),
    )
    daemon = Daemon(
        where,
        budget,
        tenants_of(config),
        arguments.protocol or VERSION,
        Manners(config, lambda: _load(arguments), Notifier(os.environ)),
        config.socket_mode,
        inherited,
        _tcp(config),
    )
    return daemon.run()


def _take_unix(sockets: dict[str, socket.socket]) -> socket.socket | None:
    """The socket that systemd listens on for us. Raises ConfigError for others: TLS and limits are ours to set up."""
    import socket

    local = [name for name, one in sockets.items() if one.family == socket.AF_UNIX]
    if len(local) > 1 or len(local) < len(sockets):
        raise ConfigError(f"socket activation: give one Unix socket, not {', '.join(sockets)}; TCP is set with listen")
    return sockets[local[0]] if local else None


def _tcp(config: DaemonConfig) -> Any:
    from ..pager.daemon.tls import server_context, tcp_listener

    if config.listen is None or config.tls_cert is None or config.tls_key is None:
        return None  # validate refused an address without both
    context = server_context(config.tls_cert, config.tls_key)
    return tcp_listener(config.listen, name="listen"), context


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); say where to listen with --socket") from error


if __name__ == "__main__":
    sys.exit(main())
