"""`stat`: one line of rates per tick, of the columns that were asked for. What a column means stands in one table.

A rate is what a counter did between two looks; a level is what it is now. Nothing is averaged over longer, so that a
second in which something went wrong shows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...pager.inspection.asking import ConfigError
from .text import count, millis, size

if TYPE_CHECKING:
    from .verbs import Context

HEAD_EVERY = 20  # lines
WIDTH = 11
Told = dict[str, Any]
Figure = Callable[[Told, Told, float], float | None]  # of the status before, the status now, the seconds between


@dataclass(frozen=True, slots=True)
class Column:
    """`name` is the field of a JSON row, with its unit; `short` what -f takes, `head` what a screen shows."""

    short: str
    head: str
    name: str
    what: str
    of: Figure
    show: Callable[[float], str]


def _counter(get: Callable[[Told], float]) -> Figure:
    return lambda before, now, seconds: (get(now) - get(before)) / seconds


def _sum(told: Told, counter: str, *directions: str) -> float:
    rows = (row for row in told["counters"] if row["name"] == counter)
    return float(sum(row["value"] for row in rows if row["labels"]["direction"] in directions))


def _hits(tier: str) -> Figure:
    return _counter(lambda told: told["tiers"].get(tier, {}).get("hit_tokens", 0))


def _moved(*directions: str) -> Figure:
    return _counter(lambda told: _sum(told, "moved_bytes", *directions))


def _wait(direction: str) -> Figure:
    def of(before: Told, now: Told, _: float) -> float | None:
        moves = _sum(now, "moves", direction) - _sum(before, "moves", direction)
        seconds = _sum(now, "move_seconds", direction) - _sum(before, "move_seconds", direction)
        return seconds / moves if moves else None

    return of


def _queue(direction: str, field: str) -> Figure:
    return lambda before, now, _: now["queues"][direction][field]


def _rate(n: float) -> str:
    return f"{n:.0f}"


WAYS = {"h>d": "host_to_device", "n>h": "nvme_to_host", "d>h": "device_to_host", "h>n": "host_to_nvme"}
_USUAL = (
    Column("hbm", "hbm hit/s", "device_hit_tokens_per_s", "tokens found in the device tier", _hits("device"), _rate),
    Column("host", "host hit/s", "host_hit_tokens_per_s", "tokens found in the host tier", _hits("host"), _rate),
    Column("nvme", "nvme hit/s", "nvme_hit_tokens_per_s", "tokens found on nvme", _hits("nvme"), _rate),
    Column("miss", "miss/s", "miss_tokens_per_s", "tokens not found", _counter(lambda t: t["miss_tokens"]), _rate),
    Column(
        *("ghost", "ghost/s", "ghost_tokens_per_s", "tokens not found that had been evicted"),
        _counter(lambda told: told["ghost_tokens"]),
        _rate,
    ),
    Column("up", "up B/s", "up_bytes_per_s", "bytes towards the device", _moved(WAYS["h>d"], WAYS["n>h"]), size),
    Column("down", "down B/s", "down_bytes_per_s", "bytes away from it", _moved(WAYS["d>h"], WAYS["h>n"]), size),
    Column(
        *("evict", "evict/s", "evicted_blocks_per_s", "blocks that left a tier, of all tiers"),
        _counter(lambda told: sum(tier["evicted_blocks"] for tier in told["tiers"].values())),
        _rate,
    ),
    Column(
        "moving", "moving", "transfers_in_flight", "moves under way", lambda b, n, _: n["transfers_in_flight"], _rate
    ),
)
_BYTES = tuple(
    Column(way, f"{way} B/s", f"{name}_bytes_per_s", f"bytes moved {name.replace('_', ' ')}", _moved(name), size)
    for way, name in WAYS.items()
)
_LATENCY = tuple(
    Column(
        *(
            f"wait.{way}",
            f"{way} wait",
            f"{name}_wait_s",
            f"mean time of a move {name.replace('_', ' ')}, queued and copying",
        ),
        _wait(name),
        millis,
    )
    for way, name in WAYS.items()
)
_QUEUES = tuple(
    Column(
        f"{short}.{way}",
        f"{way} {head}",
        f"{name}_{field}",
        f"{what} {name.replace('_', ' ')}",
        _queue(name, key),
        show,
    )
    for way, name in WAYS.items()
    for short, head, field, key, what, show in (
        ("queue", "queue", "queued_blocks", "blocks", "blocks under way", count),
        ("age", "age", "oldest_s", "oldest_s", "age of the oldest move", millis),
    )
)
COLUMNS = {column.short: column for column in (*_USUAL, *_BYTES, *_LATENCY, *_QUEUES)}


def run(context: Context) -> int:
    """Ticks until COUNT of them are told, or until interrupted. Returns the exit code."""
    given = context.arguments
    if given.fields:
        for column in COLUMNS.values():
            print(f"{column.short:<10} {column.head:<12} {column.name:<30} {column.what}")
        return 0
    columns, target = chosen(given.field, latency=given.latency, queues=given.queues), context.target()
    if not given.interval > 0:
        raise ConfigError(f"stat: INTERVAL {given.interval:g} must be more than 0 seconds")
    before, before_s, ticks = _status(target), time.monotonic(), 0
    while given.count is None or ticks < given.count:
        time.sleep(given.interval)
        now, now_s = _status(target), time.monotonic()
        row = row_of(before, now, now_s - before_s, columns)
        if context.as_json:
            print(json.dumps(row), flush=True)
        else:
            _print(row, columns, with_heads=ticks % HEAD_EVERY == 0 and not given.no_heads)
        before, before_s, ticks = now, now_s, ticks + 1
    return 0


def chosen(field: str | None, *, latency: bool = False, queues: bool = False) -> tuple[Column, ...]:
    """Raises ConfigError naming the known ones."""
    if field is None:
        return (*_USUAL, *(_LATENCY if latency else ()), *(_QUEUES if queues else ()))
    names = [name.strip() for name in field.split(",") if name.strip()]
    for name in names or [field]:
        if name not in COLUMNS:
            raise ConfigError(f"stat: -f {name!r} is unknown; `stat --fields` explains {', '.join(COLUMNS)}")
    return tuple(COLUMNS[name] for name in names)


def row_of(before: Told, now: Told, seconds: float, columns: tuple[Column, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return row | {column.name: column.of(before, now, seconds) for column in columns}


def _status(target: Any) -> Told:
    told: Told = target.ask("status")
    if told.get("source") == "store":
        raise ConfigError("stat needs a running pager; a store at rest does nothing")
    if "tiers" not in told:
        raise ConfigError("stat: no model is open: a client of the daemon opens one")
    return told


def _print(row: dict[str, Any], columns: tuple[Column, ...], *, with_heads: bool) -> None:
    if with_heads:
        print("  ".join(f"{head:>{WIDTH}}" for head in ("TIME", *(column.head for column in columns))))
    cells = ["-" if row[column.name] is None else column.show(row[column.name]) for column in columns]
    print("  ".join(f"{cell:>{WIDTH}}" for cell in (row["time"][11:19], *cells)))
    sys.stdout.flush()
