"""`pagerd`: the daemon that keeps one memory of blocks for many processes; also checks and prints a configuration.

Starts without torch and zarr. Exit codes: 0 ended as asked, 2 refused to start, 70 a bug in the books.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..pager.config import load_config
from ..tiers.errors import ConfigError, KvTierError
from ..tiers.layout import parse_bytes


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.check_config or arguments.print_config:
            config = load_config(arguments.config)
            text = (
                json.dumps(dataclasses.asdict(config), default=str, indent=1) if arguments.print_config else "config ok"
            )
            print(text)
            return 0
        return _serve(arguments)
    except KvTierError as error:
        print(f"pagerd: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pagerd", description="One memory of KV blocks for many processes.")
    parser.add_argument(
        "--socket", metavar="PATH", help="where to listen (default: $XDG_RUNTIME_DIR/kvtier/pagerd.sock)"
    )
    parser.add_argument(
        "--host-bytes", metavar="SIZE", default="1GiB", help="memory for blocks, of all models together"
    )
    parser.add_argument("--nvme-path", metavar="DIR", help="where stores lie; without it, memory only")
    parser.add_argument("--nvme-bytes", metavar="SIZE", help="disk for blocks, of all models together")
    parser.add_argument("--max-models", metavar="N", type=int, default=1, help="models served at once, in equal parts")
    parser.add_argument("--durability", default="batch", choices=("none", "batch", "always"))
    parser.add_argument("--no-prefault", action="store_true", help="take memory only as it is used")
    parser.add_argument("--config", metavar="FILE", help="TOML file")
    parser.add_argument("--check-config", action="store_true", help="say whether the configuration is good, and end")
    parser.add_argument("--print-config", action="store_true", help="print the configuration in force as JSON, and end")
    parser.add_argument(
        "--protocol", type=int, default=None, help=argparse.SUPPRESS
    )  # tests: speak this version at most
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    from ..pager.daemon.models import Budget
    from ..pager.daemon.server import Daemon
    from ..pager.wire.messages import VERSION

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if arguments.max_models < 1:
        raise ConfigError(f"--max-models={arguments.max_models}: need at least 1")
    if arguments.nvme_bytes is not None and arguments.nvme_path is None:
        raise ConfigError(f"--nvme-bytes={arguments.nvme_bytes} without --nvme-path: say where the stores lie")
    budget = Budget(
        parse_bytes(arguments.host_bytes, name="--host-bytes"),
        None if arguments.nvme_path is None else Path(arguments.nvme_path),
        None if arguments.nvme_bytes is None else parse_bytes(arguments.nvme_bytes, name="--nvme-bytes"),
        arguments.max_models,
        {"durability": arguments.durability, "host_prefault": not arguments.no_prefault},
    )
    path = Path(arguments.socket) if arguments.socket else _default_socket()
    return Daemon(path, budget, newest_version=arguments.protocol or VERSION).run()


def _default_socket() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "kvtier" if runtime else Path("/run/kvtier")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); say where to listen with --socket") from error
    return folder / "pagerd.sock"


if __name__ == "__main__":
    sys.exit(main())
