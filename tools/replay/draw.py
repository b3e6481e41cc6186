"""A replay's rows for people: a table on a terminal, and charts as PNG or as one HTML page that loads nothing."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.serving.chart import Panel, save_page, save_png

_COLUMNS = (
    ("case", "case"),
    ("policy", "policy"),
    ("capacity", "capacity"),
    ("token_hit_rate", "hit rate"),
    ("to_belady", "to Belady"),
    ("device_token_hit_rate", "device"),
    ("host_token_hit_rate", "host"),
    ("nvme_token_hit_rate", "nvme"),
    ("modelled_ttft_mean_s", "TTFT (modelled)"),
    ("modelled_loaded_bytes", "GB loaded (modelled)"),
    ("modelled_demand_wait_mean_s", "wait by demand (modelled)"),
    ("modelled_wait_mean_s", "with prefetch"),
    ("prefetch_wasted_share", "wasted"),
)


def show(head: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(title for _, title in _columns(rows)), title=head)
    for row in rows:
        table.add_row(*(_text(row, name) for name, _ in _columns(rows)))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def save_charts(rows: Sequence[dict[str, Any]], head: str, page: Path | None, png: Path | None) -> None:
    panels = _panels(rows)
    if page is not None:
        titles = "".join(f"<th>{html.escape(title)}" for _, title in _columns(rows))
        cells = ("".join(f"<td>{html.escape(_text(row, name))}" for name, _ in _columns(rows)) for row in rows)
        table = f"<table><tr>{titles}</tr>{''.join(f'<tr>{cell}</tr>' for cell in cells)}</table>"
        save_page(page, "kvtier replay", head, panels, table)
    if png is not None:
        save_png(png, panels)


def _panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Hit rate and time to first token over capacity, a line per policy and case."""
    panels = []
    for name, title in (("token_hit_rate", "Token hit rate"), ("modelled_ttft_mean_s", "Mean TTFT, modelled (s)")):
        cases = list(dict.fromkeys(row["case"] for row in rows))
        lines: dict[str, list[float]] = {}
        for row in rows:
            if name in row:
                label = row["policy"] if len(cases) == 1 else f"{row['policy']}, {row['case']}"
                lines.setdefault(label, []).append(row[name])
        capacities = list(dict.fromkeys(row["capacity"] for row in rows))
        panels.append(Panel(title, "capacity of all tiers", title, capacities, lines))
    return panels


def _columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, title) for name, title in _COLUMNS if any(name in row for row in rows)]


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "modelled_loaded_bytes":
        return f"{value / 1e9:,.0f}"
    return f"{value:.3f}" if name == "modelled_ttft_mean_s" else f"{value:.4f}"
