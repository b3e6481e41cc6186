"""Panels of lines, drawn as one HTML page with SVG inside it (nothing is loaded from anywhere), or as a PNG by matplotlib."""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....tiers.errors import ConfigError

COLORS = (
    *("#0b6e4f", "#c0392b", "#2c5d9b", "#b7791f", "#6b3fa0", "#1b9aaa", "#8c564b", "#d6568f"),
    *("#556b2f", "#e07b39", "#4b5d67", "#93a000", "#264653", "#a83279", "#5f8dd3", "#7f7f7f"),
)
LEGEND_LINES = 3  # fit into a panel; more are listed under it
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 280, 58, 12, 34, 44
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1320px;padding:0 1em;color:#222}
svg{max-width:100%}table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px;border-bottom:1px solid #ddd;
text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}text{font:12px system-ui,sans-serif}"""


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over the same places of the x axis. A line may lack places at its end."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[str]
    lines: Mapping[str, Sequence[float]]
    is_log: bool = False


def check_png() -> None:
    """Raises: ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib, which is not installed: pip install matplotlib, or use --html FILE")


def save_html(path: Path, panels: Sequence[Panel], result: Mapping[str, Any]) -> None:
    """The panels, and below them the result's rows as a table."""
    machine = result["machine"]
    head = f"{result['command']} ({result['date']}, {machine['cpu']}, {machine['cores']} cores)"
    page = ["<table><tr><th>case<th>metric<th>value<th>unit<th>reference<th>its value<th>ratio</tr>"]
    for row in result["rows"]:
        texts = [html.escape(str(row[name])) for name in ("case", "metric", "unit", "reference")]
        value, other, ratio = (_number(row[name]) for name in ("value", "reference_value", "ratio"))
        page.append(
            f"<tr><td>{texts[0]}<td>{texts[1]}<td class='n'>{value}<td>{texts[2]}<td>{texts[3]}"
            f"<td class='n'>{other}<td class='n'>{ratio}</tr>"
        )
    save_page(path, "kvtier bench serve", head, panels, "\n".join([*page, "</table>"]))


def save_page(path: Path, title: str, head: str, panels: Sequence[Panel], table: str) -> None:
    """One page that loads nothing. `table` is HTML already, the other words are not."""
    page = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(head)}</p>",
        *(svg(panel) + _legend(panel) for panel in panels),
        f"<h2>All figures</h2>{table}</html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(page))


def _legend(panel: Panel) -> str:
    """Names of more lines than a panel has room for."""
    if len(panel.lines) <= LEGEND_LINES:
        return ""
    names = (
        f"<span style='color:{color}'>&#9679; {html.escape(name)}</span>" for name, color in zip(panel.lines, COLORS)
    )
    return f"<p>{' &nbsp; '.join(names)}</p>"


def save_png(path: Path, panels: Sequence[Panel]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False)
    for panel, place in zip(panels, axes.flat):
        for (name, values), color in zip(panel.lines.items(), COLORS):
            place.plot(panel.x[: len(values)], values, marker="o", markersize=4, label=name, color=color)
        place.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.is_log:
            place.set_yscale("log")
        else:
            place.set_ylim(bottom=0)
        place.legend()
        place.grid(axis="y", alpha=0.3)
    for place in list(axes.flat)[len(panels) :]:
        place.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def svg(panel: Panel) -> str:
    """One panel by itself."""
    ticks = _ticks([value for values in panel.lines.values() for value in values], panel.is_log)
    low, high = ticks[0], ticks[-1]

    def y_of(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if panel.is_log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def x_of(place: int) -> float:
        return LEFT + 20 + place * (WIDTH - LEFT - RIGHT - 40) / max(1, len(panel.x) - 1)

    parts = [
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}' role='img'>",
        f"<text x='{LEFT}' y='16' font-weight='bold'>{html.escape(panel.title)}</text>",
        f"<text x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 8}' text-anchor='middle'>{html.escape(panel.x_label)}</text>",
        f"<text transform='translate(12 {HEIGHT / 2}) rotate(-90)' text-anchor='middle'>"
        f"{html.escape(panel.y_label)}</text>",
    ]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:,g}</text>")
    for place, label in enumerate(panel.x):
        text = html.escape(label)
        parts.append(f"<text x='{x_of(place):.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{text}</text>")
    for number, ((name, values), color) in enumerate(zip(panel.lines.items(), COLORS)):
        points = [(x_of(place), y_of(value)) for place, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{color}'/>" for x, y in points]
        if len(panel.lines) <= LEGEND_LINES:
            parts.append(f"<text x='{LEFT + 150 * number}' y='30' fill='{color}'>{html.escape(name)}</text>")
    return "\n".join([*parts, "</svg>"])


def _ticks(values: Sequence[float], is_log: bool) -> list[float]:
    """Round numbers, the first and last of them around all values."""
    if is_log:
        positive = [value for value in values if value > 0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        return [10.0**power for power in range(low, max(high, low + 1) + 1)]
    top = max(values) or 1.0
    step = 10.0 ** math.floor(math.log10(top))
    step *= next(part for part in (0.2, 0.5, 1.0, 2.0) if top / (step * part) <= 6)
    return [step * number for number in range(math.ceil(top / step) + 1)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
