"""How figures become text: sizes, ages, bars, tables, colour. Pure functions of values and a `Style`; prints nothing.

Colour says severity and is never its only carrier. Without a terminal there is neither colour nor bars.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

_CODES = {"red": "31", "yellow": "33", "green": "32", "dim": "2", "bold": "1"}
SEVERITY = {"crit": "red", "warn": "yellow", "info": "dim", "ok": "green"}
SCREEN_TIERS = {"device": "hbm", "host": "host", "nvme": "nvme"}


@dataclass(frozen=True, slots=True)
class Style:
    """What the place that text goes to can show."""

    color: bool = False
    bars: bool = False
    ascii: bool = False
    width: int = 100

    def paint(self, text: str, color: str) -> str:
        return f"\x1b[{_CODES[color]}m{text}\x1b[0m" if self.color and color in _CODES else text

    def severity(self, text: str, severity: str) -> str:
        return self.paint(text, SEVERITY.get(severity, ""))

    def bar(self, share: float, width: int = 10) -> str:
        """A share of 0 to 1 as a bar; nothing where bars are not wanted."""
        if not self.bars:
            return ""
        full = round(min(max(share, 0.0), 1.0) * width)
        on, off = ("#", ".") if self.ascii else ("▇", "░")
        return on * full + off * (width - full)

    def spark(self, values: Sequence[float], width: int) -> str:
        """Values as a line of bars of eight heights, scaled to the largest; the last `width` of them."""
        shown, steps = list(values)[-width:], "_.-=+*%#" if self.ascii else "▁▂▃▄▅▆▇█"
        top = max(shown, default=0.0) or 1.0
        return "".join(steps[min(7, max(0, int(value / top * 7.999)))] for value in shown)


def style_for(stream: TextIO, env: Mapping[str, str], *, no_color: bool = False, ascii_only: bool = False) -> Style:
    """Colour and bars on a terminal, unless NO_COLOR, TERM=dumb or a flag says otherwise."""
    is_terminal = stream.isatty()
    color = is_terminal and not no_color and not env.get("NO_COLOR") and env.get("TERM") != "dumb"
    can_draw = (stream.encoding or "").lower().replace("-", "") == "utf8"
    width = shutil.get_terminal_size((100, 40)).columns if is_terminal else int(os.environ.get("COLUMNS") or 100)
    return Style(color, is_terminal, ascii_only or not can_draw, width)


def tier_name(tier: str, backend: str = "cuda") -> str:
    """As screens say it: hbm for the device tier of a GPU."""
    if tier == "device":
        return "hbm" if backend == "cuda" else backend
    return tier


def size(n: float | None, *, raw: bool = False) -> str:
    """Bytes in binary units: 1.5G is 1.5 GiB."""
    if n is None:
        return "-"
    if raw:
        return f"{n:.0f}"
    for unit in ("", "K", "M", "G"):
        if abs(n) < 1024:
            return f"{n:.0f}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1024
    return f"{n:.1f}T"


def count(n: float | None) -> str:
    """Tokens or blocks: 1.2k, 3.4M."""
    if n is None:
        return "-"
    for unit in ("", "k", "M"):
        if abs(n) < 1000:
            return f"{n:.0f}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}G"


def age(seconds: float | None) -> str:
    """0.4s, 42s, 7m, 2h11, 6d04h."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours < 1:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02}" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


def millis(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if abs(seconds) < 0.1 else f"{seconds * 1e3:,.0f} ms"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> list[str]:
    """Columns as wide as they need, the first `left` of them aligned left."""
    cells = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return [line(row).rstrip() for row in cells]


def shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 6]}..{name[-4:]}"
