"""`top`: tiers, rates and sessions, live. Reads the snapshot page; the pager is not asked and cannot be held up.

Draws with rich, which is imported where the screen begins. Keys: s sort, / filter, p pause, q quit.
"""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import screens
from .text import Style, count, table

if TYPE_CHECKING:
    from .verbs import Context

SORTS = ("device", "host", "nvme", "tokens", "idle", "name")
_NEXT_S, _GRACE_S = 5.0, 2.0  # two publications missed and this much more: the pager hangs, or is stopped
_POLL_S = 0.15  # the writer notices that it is watched within this
_SECOND_LOOK_S = 3.0  # rates need two snapshots; a pager that publishes seldom, to stay cheap, gets this long


@dataclass(slots=True)
class View:
    """What the keys have chosen, and the last two snapshots."""

    sort: str = "device"
    filter: str = ""
    is_paused: bool = False
    is_typing: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)

    def take(self, found: dict[str, Any]) -> None:
        """A new snapshot; the older one is kept for rates."""
        if not self.last or found["taken_s"] != self.last["taken_s"]:
            self.before, self.last = self.last, found
        else:
            self.last["snapshot_age_s"] = found["snapshot_age_s"]

    def key(self, pressed: str) -> bool:
        """False to end."""
        if self.is_typing:
            if pressed in "\r\n\x1b":
                self.is_typing = False
            elif pressed in "\x7f\b":
                self.filter = self.filter[:-1]
            elif pressed.isprintable():
                self.filter += pressed
            return True
        if pressed == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif pressed == "/":
            self.is_typing, self.filter = True, ""
        elif pressed == "p":
            self.is_paused = not self.is_paused
        return pressed not in ("q", "\x03", "\x04")

    # ------------------------------------------------------------------ what is drawn
    def lines(self, style: Style, height: int) -> Iterator[str]:
        told = self.last["status"]
        yield from screens.header(told | self._verdict(), style)
        age_s = self.last["snapshot_age_s"]
        if age_s > 2 * self.last.get("next_s", _NEXT_S) + _GRACE_S:
            yield style.severity(f"  ! CRIT nothing published for {age_s:.0f} s: the pager hangs or is stopped", "crit")
        yield ""
        yield from screens.tiers(self._with_rates(), style)
        yield self._traffic()
        yield ""
        paused, typing = "  PAUSED" if self.is_paused else "", "_" if self.is_typing else ""
        shown = [row for row in self.last["sessions"] if self.filter in row["name"] or self.filter in row["namespace"]]
        yield (
            f"sessions {self.last['num_sessions']}  shown {len(shown)}  sort {self.sort}  filter {self.filter or '-'}{typing}  "
            f"[s] sort [/] filter [p] pause [q] quit{paused}"
        )
        shown.sort(key=self._rank)
        room = max(3, height - 9 - len(told["tiers"]))
        yield from table(screens.SESSION_HEADS, [screens.session_cells(row) for row in shown[:room]], left=3)

    def _verdict(self) -> dict[str, Any]:
        return {"uptime_s": self.last["status"].get("uptime_s", 0.0)}

    def _rank(self, row: dict[str, Any]) -> Any:
        if self.sort == "name":
            return row["name"]
        name = {"tokens": "tokens", "idle": "idle_s"}.get(self.sort, f"{self.sort}_bytes")
        return -(row[name] if row[name] is not None else -1)

    def _seconds(self) -> float:
        return self.last["taken_s"] - self.before["taken_s"] if self.before else 0.0

    def _with_rates(self) -> dict[str, Any]:
        told, seconds = self.last["status"], self._seconds()
        if not seconds:
            return dict(told)
        tiers = {}
        for name, tier in told["tiers"].items():
            old = self.before["status"]["tiers"][name]
            rates = {f"rate_{w}_bytes_per_s": (tier[f"bytes_{w}"] - old[f"bytes_{w}"]) / seconds for w in ("in", "out")}
            tiers[name] = tier | rates
        return told | {"tiers": tiers}

    def _traffic(self) -> str:
        """Rates of tokens and how much of what was missed had been evicted: the thrash index."""
        seconds, told = self._seconds(), self.last["status"]
        if not seconds:
            return "rates come with the next snapshot"
        old = self.before["status"]
        hits = sum(t["hit_tokens"] - old["tiers"][n]["hit_tokens"] for n, t in told["tiers"].items())
        missed, ghosts = told["miss_tokens"] - old["miss_tokens"], told["ghost_tokens"] - old["ghost_tokens"]
        ratio = f"{hits / (hits + missed):.1%}" if hits + missed else "-"
        thrash = f"{ghosts / missed:.1%}" if missed else "-"
        return (
            f"hits {count(hits / seconds)} tok/s  missed {count(missed / seconds)} tok/s  hit rate {ratio}  thrash {thrash}  "
            f"copies in flight {told['transfers_in_flight']}  over {seconds:.1f} s"
        )


def run(context: Context) -> int:
    """Returns the exit code."""
    target, given = context.target(), context.arguments
    view = View(given.sort, given.filter)
    view.take(target.snapshot(watch=not given.offline))
    if given.once or context.as_json or not sys.stdout.isatty():
        deadline_s = time.monotonic() + _SECOND_LOOK_S
        while not given.offline and not view.before and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            view.take(target.snapshot(watch=True))
        if context.as_json:
            print(json.dumps(view.last))
            return 0
        for line in view.lines(context.style, 1000):
            print(line)
        return 0
    return _live(context, target, view)


def _live(context: Context, target: Any, view: View) -> int:
    from rich.live import Live
    from rich.text import Text

    def drawn() -> Text:
        rows, columns = os.get_terminal_size().lines, os.get_terminal_size().columns
        style = Style(context.style.color, True, context.style.ascii, columns)
        lines = list(view.lines(style, rows))[: rows - 1]
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop")

    with _watching(target, context), _keys() as pressed, Live(drawn(), screen=True, auto_refresh=False) as live:
        while True:
            key = pressed(context.arguments.interval)
            if key and not view.key(key):
                return 0
            if not view.is_paused:
                view.take(target.snapshot(watch=not context.arguments.offline))
            live.update(drawn(), refresh=True)


@contextmanager
def _watching(target: Any, context: Context) -> Iterator[None]:
    """The pager publishes as often as somebody looks, and no longer than that."""
    try:
        yield
    finally:
        if not context.arguments.offline:
            target.stop_watching()


@contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and returns it, or an empty string."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda seconds: os.read(fd, 1).decode(errors="ignore") if select.select([fd], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
