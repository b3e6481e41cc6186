"""The verbs: what each takes, which question it asks, which screen it draws, and its exit code.

A verb with one answer is a row of VERBS; those that follow, record or draw a live screen have a function of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ...pager.inspection.asking import ConfigError, Target
from . import answers, screens
from .text import Style, size
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
    """One line per tick; the rates of what the counters did since the last."""
    target, given = context.target(), context.arguments
    before, before_s, ticks = target.ask("status"), time.monotonic(), 0
    while given.count is None or ticks < given.count:
        time.sleep(given.interval)
        now, now_s = target.ask("status"), time.monotonic()
        row = _tick(before, now, now_s - before_s)
        if context.as_json:
            print(json.dumps(row), flush=True)
        else:
            if ticks % 20 == 0:
                print("  ".join(f"{name:>11}" for name in _STAT_HEADS))
            print("  ".join(f"{cell:>11}" for cell in _stat_cells(row)), flush=True)
        before, before_s, ticks = now, now_s, ticks + 1
    return 0


_STAT_HEADS = (
    "TIME",
    "hbm hit/s",
    "host hit/s",
    "nvme hit/s",
    "miss/s",
    "ghost/s",
    "up B/s",
    "down B/s",
    "evict/s",
    "moving",
)


def _tick(before: dict[str, Any], now: dict[str, Any], seconds: float) -> dict[str, Any]:
    if before.get("source") != "pager":
        raise ConfigError("stat needs a running pager; a store at rest does nothing")
    row: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for tier in ("device", "host", "nvme"):
        old, new = before["tiers"].get(tier, {}), now["tiers"].get(tier, {})
        row[f"{tier}_hit_tokens_per_s"] = (new.get("hit_tokens", 0) - old.get("hit_tokens", 0)) / seconds
    for name in ("miss_tokens", "ghost_tokens"):
        row[f"{name}_per_s"] = (now[name] - before[name]) / seconds
    for name, directions in (("up", ("host_to_device", "nvme_to_host")), ("down", ("device_to_host", "host_to_nvme"))):
        row[f"{name}_bytes_per_s"] = (_moved(now, directions) - _moved(before, directions)) / seconds
    evicted = [sum(tier["evicted_blocks"] for tier in told["tiers"].values()) for told in (before, now)]
    row["evicted_blocks_per_s"] = (evicted[1] - evicted[0]) / seconds
    row["transfers_in_flight"] = now["transfers_in_flight"]
    return row


def _moved(told: dict[str, Any], directions: tuple[str, ...]) -> float:
    rows = (row for row in told["counters"] if row["name"] == "moved_bytes")
    return sum(row["value"] for row in rows if row["labels"]["direction"] in directions)


def _stat_cells(row: dict[str, Any]) -> list[str]:
    tokens = ["device_hit_tokens", "host_hit_tokens", "nvme_hit_tokens", "miss_tokens", "ghost_tokens"]
    cells = [row["time"][11:19], *(f"{row[f'{name}_per_s']:.0f}" for name in tokens)]
    cells += [size(row["up_bytes_per_s"]), size(row["down_bytes_per_s"]), f"{row['evicted_blocks_per_s']:.0f}"]
    return [*cells, str(row["transfers_in_flight"])]


def _record(context: Context) -> int:
    """Rows until interrupted or for --seconds; what is unfinished then comes last."""
    target, given = context.target(), context.arguments
    with nullcontext(sys.stdout) if given.out in (None, "-") else open(given.out, "w") as out:
        rows, told = _follow_requests(target, given.seconds, out)
    lost = f", {told['lost']} lost" if told["lost"] else ""
    print(f"{rows} requests{lost}; blocks of {told['block_size']} tokens", file=sys.stderr)
    return 0


def _follow_requests(target: Target, seconds: float | None, out: Any) -> tuple[int, dict[str, Any]]:
    until_s = time.monotonic() + seconds if seconds else float("inf")
    rows = 0
    try:
        while (left_s := until_s - time.monotonic()) > 0:
            rows += _write_rows(target.ask("record"), out)
            time.sleep(min(left_s, 0.5))
    except KeyboardInterrupt:
        pass
    while (told := target.ask("record", is_last=True))["rows"]:
        rows += _write_rows(told, out)
    return rows, told


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


# ---------------------------------------------------------------------- grammar
def _none(sub: argparse.ArgumentParser) -> None:
    pass


def _status_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", nargs="?", metavar="PATH|SOCKET", help="as -s")
    sub.add_argument("--exit-code", action="store_true", help="1 unless the verdict is ok")
    sub.add_argument("--offline", action="store_true", help="what the pager last published; for one that is stuck")


def _pages(sub: argparse.ArgumentParser, limit: int = 50) -> None:
    sub.add_argument("--limit", type=int, default=limit, metavar="N", help=f"rows (default {limit}, at most 1000)")
    sub.add_argument("--offset", type=int, metavar="N", help="skip so many")


def _sessions_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--sort", choices=("device", "host", "nvme", "tokens", "idle", "name"), help="default device")
    sub.add_argument("--namespace", metavar="NAME", help="only this one's")
    _pages(sub)


def _session_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("session", metavar="ID", help="as `sessions` lists it (seq:N for sequences without a session)")


def _blocks_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tier", choices=("device", "host", "nvme"), help="whose fastest copy is there")
    sub.add_argument("--state", choices=("clean", "dirty", "pinned", "moving", "unreferenced"))
    sub.add_argument("--group", type=int, metavar="N", help="one layer group")
    sub.add_argument("--key", metavar="DIGITS", help="the first eight hexadecimal digits")
    sub.add_argument("--sort", choices=("idle", "refs", "depth", "tokens", "block"), help="default idle, longest first")
    sub.add_argument("--reverse", action="store_true", default=None)
    _pages(sub)


def _prefix_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "prompt", metavar="FILE|TOKENS", help="a file of token ids (text, JSON list, .npy), - for stdin, or 1,2,3"
    )
    sub.add_argument("--namespace", default="default", metavar="NAME")


def _explain_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("about", metavar="BLOCK|SESSION", help="eight digits of a key, or a session")
    sub.add_argument("--limit", type=int, default=50, metavar="N")


def _trace_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    sub.add_argument(
        "--types", metavar="KIND,..", help="evicted, dropped, promoted, demoted, read, written, pinned, ..."
    )
    sub.add_argument("--interval", type=float, default=0.5, metavar="SEC")
    sub.add_argument("--limit", type=int, default=20, metavar="N", help="how many to begin with")


def _thrash_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--since", dest="since_s", type=_seconds, metavar="AGE", help="e.g. 90s, 10m (default), 1h")


def _why_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("request", nargs="?", metavar="REQUEST", help="its x-request-id, or req-N")
    sub.add_argument("--last", action="store_true", help="the last one (default)")
    sub.add_argument("--slowest", type=int, metavar="N")


def _stat_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("interval", nargs="?", type=float, default=1.0, metavar="SEC")
    sub.add_argument("count", nargs="?", type=int, metavar="COUNT")


def _top_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--once", action="store_true", help="print one screen and end")
    sub.add_argument("--offline", action="store_true", help="never ask the pager, only read what it publishes")
    sub.add_argument("--sort", choices=("device", "host", "nvme", "tokens", "idle", "name"), default="device")
    sub.add_argument("--filter", default="", metavar="TEXT", help="sessions and namespaces that contain it")
    sub.add_argument("--interval", type=float, default=1.0, metavar="SEC")


def _advise_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tier", choices=("device", "host", "nvme"), help="which one to size (default host)")
    sub.add_argument("--factor", type=float, metavar="X", help="also this size (default 2)")


def _history_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--hours", type=float, default=24.0, metavar="H", help="how far back (default 24)")


def _record_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="FILE", help="default stdout")
    sub.add_argument("--seconds", type=float, metavar="SEC", help="end then; else at Ctrl-C")


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--html", metavar="FILE", required=True, help="one page with everything in it; - is stdout")


def _completion_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))


def _seconds(text: str) -> float:
    factor = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        return float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 90s, 10m or 1h") from None


VERBS = (
    Verb("status", "verdict, tiers, what a restart would cost", _status_arguments, _status),
    Verb("stat", "one line of rates per tick", _stat_arguments, _stat),
    Verb("top", "live: tiers, rates, sessions", _top_arguments, _top),
    Verb(
        "sessions",
        "sessions and sequences with their bytes by tier",
        _sessions_arguments,
        _asking("sessions", screens.sessions, "sort", "namespace", "limit", "offset"),
    ),
    Verb(
        "session",
        "one session and the map of its blocks",
        _session_arguments,
        _asking("session", screens.session, "session"),
    ),
    Verb(
        "blocks",
        "blocks by tier, state, age",
        _blocks_arguments,
        _asking("blocks", screens.blocks, "tier", "state", "group", "key", "sort", "reverse", "limit", "offset"),
    ),
    Verb("prefix", "how far a prompt would hit, and where it breaks", _prefix_arguments, _prefix),
    Verb("why", "a request's time to first token as a ledger that sums", _why_arguments, _why),
    Verb(
        "explain",
        "why a block or a session is where it is",
        _explain_arguments,
        _asking("explain", answers.explain, "about", "limit"),
    ),
    Verb("trace", "decisions as they are made", _trace_arguments, _trace),
    Verb(
        "thrash",
        "what was evicted and asked for again",
        _thrash_arguments,
        _asking("thrash", answers.thrash, "since_s"),
    ),
    Verb("doctor", "what is wrong and what to change", _none, _findings("doctor", answers.doctor)),
    Verb("check", "invariants by name; for probes", _none, _findings("check", answers.check)),
    Verb(
        "advise", "what more memory would hit", _advise_arguments, _asking("advise", answers.advise, "tier", "factor")
    ),
    Verb("history", "the last day in sparklines", _history_arguments, _history),
    Verb("record", "live requests as a replay trace", _record_arguments, _record),
    Verb("export", "everything on one HTML page", _export_arguments, _export),
    Verb("completion", "a script for bash, zsh or fish", _completion_arguments, _completion),
)
