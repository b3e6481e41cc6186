"""`kvtier store`: check, repair and slim a store that nobody has open, and carry its blocks to another one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..tiers.layout import format_bytes
from ..tiers.nvme import maintenance
from ..tiers.nvme.codecs import CODECS, ENCRYPTED

MOST_NAMED = 20  # sessions, in a line for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, what in (
        ("check", "read every block and say what is bad, changing nothing; exit code 1 when anything is"),
        ("repair", "as check, and take what is bad out of the listing"),
        ("gc", "remove segments without blocks, and history from the journal"),
        ("export", "copy blocks and sessions into a new store at TARGET"),
        ("import", "copy blocks and sessions from the store at TARGET into this one"),
    ):
        one = verbs.add_parser(verb, help=what)
        one.add_argument("path", metavar="PATH", help="directory of the store")
        if verb in ("export", "import"):
            one.add_argument("target", metavar="TARGET", help="directory of the other store")
            one.add_argument(
                "--replace",
                action="store_true",
                help="put sessions also in the place of those that the other side has under the same id (default: those stay, "
                "and are named)",
            )
        if verb == "export":
            one.add_argument(
                "--codec",
                metavar="NAME",
                help=f"how a new store keeps blocks: {', '.join((*CODECS, *ENCRYPTED))}, or fewer "
                "bits of them, such as int4 (default: as this one)",
            )
        if verb != "gc":
            one.add_argument(
                "--config", metavar="FILE", help="TOML file with the secrets of namespaces, for encrypted stores"
            )
        one.add_argument("--json", action="store_true")
        one.set_defaults(run=run_store, verb=verb)


def run_store(arguments: argparse.Namespace) -> int:
    """Returns 1 when check found damage. Raises ConfigError and its kinds for stores that cannot be used."""
    path = Path(arguments.path)
    secrets = {} if arguments.verb == "gc" else _secrets(arguments.config)
    maintenance.stored_identity(path)
    with _progress(arguments.verb, enabled=not arguments.json) as show:
        if arguments.verb in ("check", "repair"):
            report = maintenance.check(path, show, repair=arguments.verb == "repair", secrets=secrets)
        elif arguments.verb == "gc":
            report = maintenance.collect(path, show)
        elif arguments.verb == "export":
            target, replace = Path(arguments.target), arguments.replace
            report = maintenance.copy(path, target, show, codec=arguments.codec, secrets=secrets, replace=replace)
        else:
            report = maintenance.copy(Path(arguments.target), path, show, secrets=secrets, replace=arguments.replace)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print(", ".join(_said(name, value) for name, value in report.to_dict().items() if value or name == "blocks"))
    return 1 if arguments.verb == "check" and report.is_damaged else 0


def _secrets(config: str | None) -> dict[int, bytes]:
    """Of an engine's file or of pagerd's, and of the environment; by owner tag. Raises ConfigError."""
    from ..pager.config import load_config
    from ..pager.daemon.settings import load_daemon_config
    from ..pager.settings import read_toml

    if config is not None and "namespaces" in read_toml(Path(config)):
        return load_daemon_config(config).secrets_by_owner()
    return load_config(config, defaults={"device_bytes": 1}).secrets_by_owner()


def _said(name: str, value: int | list[str]) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - MOST_NAMED:,} more" if len(value) > MOST_NAMED else ""
        return f"{len(value):,} {name.replace('_', ' ')} ({', '.join(map(repr, value[:MOST_NAMED]))}{more})"
    return f"freed {format_bytes(value)}" if name == "freed_bytes" else f"{value:,} {name.replace('_', ' ')}"


@contextmanager
def _progress(verb: str, *, enabled: bool) -> Iterator[maintenance.Progress]:
    """A bar on a terminal, nothing elsewhere."""
    if not enabled or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        task: Any = bars.add_task(verb, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
