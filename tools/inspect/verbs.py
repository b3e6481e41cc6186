"""The verbs: what each takes, which question it asks, which screen it draws, and its exit code.

A verb with one answer is a row of VERBS; those that follow, record or draw a live screen have a function of their own.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from ...pager.inspection.asking import ConfigError, Target
from . import answers, arguments, screens
from .text import Style
from .tokens import read_tokens

FINDINGS = 1
_RATE_WINDOW_S = 0.1
Draw = Callable[[dict[str, Any], Style], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Context:
    """One call of the program."""

    target: Callable[[], Target]
    style: Style
    as_json: bool
    arguments: argparse.Namespace

    def show(self, told: Any, draw: Callable[[Any, Style], Iterable[str]]) -> None:
        if self.as_json:
            print(json.dumps(told), flush=True)
        else:
            for line in draw(told, self.style):
                print(line)


@dataclass(frozen=True, slots=True)
class Verb:
    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Context], int]


# ---------------------------------------------------------------------- one question, one screen
def _asking(verb: str, draw: Draw, *names: str) -> Callable[[Context], int]:
    """Ask with the arguments of these names, as far as they were given."""

    def run(context: Context) -> int:
        given = {name: getattr(context.arguments, name, None) for name in names}
        told = context.target().ask(verb, **{name: value for name, value in given.items() if value is not None})
        context.show(told, draw)
        return 0

    return run


def _status(context: Context) -> int:
    target = context.target()
    if getattr(context.arguments, "offline", False):
        found = target.snapshot(watch=False)
        told = found["status"]
        if not context.as_json:
            print(f"as published {found['snapshot_age_s']:.1f} s ago")
        context.show(told | {"snapshot_age_s": found["snapshot_age_s"]}, screens.status)
        return 0
    told = target.ask("status")
    if told.get("source") == "pager":
        _add_rates(told, target)
    context.show(told, screens.status)
    is_bad = told.get("verdict", "ok") != "ok"
    return FINDINGS if is_bad and getattr(context.arguments, "exit_code", False) else 0


def _add_rates(told: dict[str, Any], target: Target) -> None:
    """Bytes per second each way, from two looks."""
    started_s = time.monotonic()
    time.sleep(_RATE_WINDOW_S)
    later = target.ask("status")
    seconds = time.monotonic() - started_s
    for name, tier in told["tiers"].items():
        for way in ("in", "out"):
            moved = later["tiers"][name][f"bytes_{way}"] - tier[f"bytes_{way}"]
            tier[f"rate_{way}_bytes_per_s"] = moved / seconds


def _prefix(context: Context) -> int:
    tokens = read_tokens(context.arguments.prompt)
    told = context.target().ask("prefix", tokens=tokens, namespace=context.arguments.namespace)
    context.show(told, screens.prefix)
    return 0


def _advise(context: Context) -> int:
    from .advising import advised

    given = {name: getattr(context.arguments, name) for name in ("tier", "factor")}
    told = advised(context.target(), **{name: value for name, value in given.items() if value is not None})
    context.show(told, answers.advise)
    return 0


def _why(context: Context) -> int:
    given = context.arguments
    if given.request and (given.slowest or given.last):
        raise ConfigError("why: name a request, or --last, or --slowest N, not two of them")
    told = context.target().ask("why", request=given.request or "", slowest=given.slowest or 0)
    context.show(told, answers.why)
    return 0


def _findings(verb: str, draw: Draw) -> Callable[[Context], int]:
    """A verb whose findings are its exit code."""

    def run(context: Context) -> int:
        told = context.target().ask(verb)
        context.show(told, draw)
        found = told["findings"]
        if isinstance(found, list):
            found = sum(finding["severity"] != "info" for finding in found)
        return FINDINGS if found else 0

    return run


# ---------------------------------------------------------------------- following
def _trace(context: Context) -> int:
    target, types = context.target(), context.arguments.types or ""
    told = target.ask("trace", types=types, limit=context.arguments.limit)
    _show_events(context, told)
    while context.arguments.follow:
        time.sleep(context.arguments.interval)
        told = target.ask("trace", types=types, since=told["next"], limit=1000)
        _show_events(context, told)
    return 0


def _show_events(context: Context, told: dict[str, Any]) -> None:
    if not context.as_json:
        for line in answers.trace(told, context.style):
            print(line, flush=True)
        return
    for row in told["events"]:
        print(json.dumps(row), flush=True)


def _stat(context: Context) -> int:
    from .stat import run

    return run(context)


def _record(context: Context) -> int:
    """Rows until interrupted or for --seconds; what is unfinished then comes last."""
    target, given = context.target(), context.arguments
    with nullcontext(sys.stdout) if given.out in (None, "-") else _opened(given.out) as out:
        rows, told = _follow_requests(target, given.seconds, out)
    lost = f", {told['lost']} lost" if told["lost"] else ""
    print(f"{rows} requests{lost}; blocks of {told['block_size']} tokens", file=sys.stderr)
    return 0


def _opened(path: str) -> TextIO:
    try:
        return open(path, "w")
    except OSError as error:
        raise ConfigError(f"--out {path!r} cannot be written: {error.strerror}") from error


def _follow_requests(target: Target, seconds: float | None, out: Any) -> tuple[int, dict[str, Any]]:
    until_s = time.monotonic() + seconds if seconds else float("inf")
    rows = 0
    with _interrupted() as is_over:
        while not is_over.is_set() and (left_s := until_s - time.monotonic()) > 0:
            rows += _write_rows(target.ask("record"), out)
            is_over.wait(min(left_s, 0.5))
    while (told := target.ask("record", is_last=True))["rows"]:
        rows += _write_rows(told, out)
    return rows, told


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which ends nothing by itself: rows that the pager has handed out are not lost on their way."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _write_rows(told: dict[str, Any], out: Any) -> int:
    for row in told["rows"]:
        out.write(json.dumps(row) + "\n")
    out.flush()
    return len(told["rows"])


def _history(context: Context) -> int:
    since_s = time.time() - context.arguments.hours * 3600
    rows = context.target().history(since_s)
    context.show({"rows": rows} if context.as_json else rows, answers.history)
    return 0


def _top(context: Context) -> int:
    from .top import run  # draws with rich: imported only here

    return run(context)


def _export(context: Context) -> int:
    from .html import export

    return export(context)


def _completion(context: Context) -> int:
    from .cli import parser
    from .completion import script

    print(script(context.arguments.shell, parser()), end="")
    return 0


VERBS = (
    Verb("status", "verdict, tiers, what a restart would cost", arguments.status, _status),
    Verb("stat", "one line of rates per tick", arguments.stat, _stat),
    Verb("top", "live: tiers, rates, sessions", arguments.top, _top),
    Verb(
        "sessions",
        "sessions and sequences with their bytes by tier",
        arguments.sessions,
        _asking("sessions", screens.sessions, "sort", "namespace", "limit", "offset"),
    ),
    Verb(
        "session",
        "one session and the map of its blocks",
        arguments.session,
        _asking("session", screens.session, "session"),
    ),
    Verb(
        "blocks",
        "blocks by tier, state, age",
        arguments.blocks,
        _asking("blocks", screens.blocks, "tier", "state", "group", "key", "sort", "reverse", "limit", "offset"),
    ),
    Verb("prefix", "how far a prompt would hit, and where it breaks", arguments.prefix, _prefix),
    Verb("why", "a request's time to first token as a ledger that sums", arguments.why, _why),
    Verb(
        "explain",
        "why a block or a session is where it is",
        arguments.explain,
        _asking("explain", answers.explain, "about", "limit"),
    ),
    Verb("trace", "decisions as they are made", arguments.trace, _trace),
    Verb(
        "thrash",
        "what was evicted and asked for again",
        arguments.thrash,
        _asking("thrash", answers.thrash, "since_s"),
    ),
    Verb("doctor", "what is wrong and what to change", arguments.nothing, _findings("doctor", answers.doctor)),
    Verb("check", "invariants by name; for probes", arguments.nothing, _findings("check", answers.check)),
    Verb("advise", "what more memory, or another policy, would hit", arguments.advise, _advise),
    Verb("history", "the last day in sparklines", arguments.history, _history),
    Verb("record", "live requests as a replay trace", arguments.record, _record),
    Verb("export", "everything on one HTML page", arguments.export, _export),
    Verb("completion", "a script for bash, zsh or fish", arguments.completion, _completion),
)
