"""One table of metric names: exporters say it, the documentation is it, dashboard and alerts ask for nothing else."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvtier.pager.metric_names import METRICS, markdown

from ..daemon.service_process import Pagerd
from .running import WORDS

ROOT = Path(__file__).resolve().parent.parent.parent
SUFFIXES = ("_bucket", "_sum", "_count")
NAME = re.compile(r"\bkvtier_[a-z_]+\b")
SELECTOR = re.compile(r"\b(kvtier_[a-z_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def scraped(text: str) -> dict[str, set[str]]:
    """Families by their name in METRICS, with the labels that were seen."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        name = family.name if family.name in METRICS else family.name + suffix
        if name.endswith("_created"):  # the library's own, of histograms
            continue
        labels = found.setdefault(name, set())
        for sample in family.samples:
            labels |= set(sample.labels) - {"le"}
        assert name in METRICS, f"{name} is exported and not in the table"
        assert METRICS[name].what == family.documentation
        assert METRICS[name].kind in (family.type, "info")
    return found


def check(found: dict[str, set[str]], source: str) -> None:
    wanted = {name for name, metric in METRICS.items() if metric.source == "pager" or source in metric.source}
    assert set(found) == wanted
    for name, labels in found.items():
        assert labels <= set(METRICS[name].labels), name


def test_the_server_exports_what_the_table_says(server):
    server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": " ".join(WORDS)}], max_tokens=2
    )
    found = scraped(server.http.get("/metrics").text)
    check(found, "server")
    assert found["kvtier_tier_bytes"] == {"tier", "state"}  # where there are samples, they have all their labels


def test_the_daemon_exports_what_the_table_says(tmp_path):
    address = tmp_path / "m"
    with (
        Pagerd(tmp_path, 'host_bytes = "1MiB"\n', "--metrics", f"unix://{address}").ready(),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one,
    ):
        one.connect(str(address))
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        text = b"".join(iter(lambda: one.recv(1 << 16), b"")).decode().split("\r\n\r\n", 1)[1]
    found = scraped(text)
    assert {name for name, metric in METRICS.items() if "daemon" in metric.source} <= set(found)


def test_the_documentation_is_the_table():
    assert markdown() in (ROOT / "docs" / "metrics.md").read_text(), (
        "make the table anew: kvtier.pager.metric_names.markdown()"
    )


def queries() -> list[tuple[str, str]]:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "kvtier.json").read_text())
    asked = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", [])]
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    asked += [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    asked += [("docs", line) for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if "rate(" in line]
    return asked


@pytest.mark.parametrize(("title", "query"), queries())
def test_dashboard_and_alerts_ask_for_what_is_exported(title, query):
    names = {base_of(name) for name in NAME.findall(query)}
    assert names and names <= set(METRICS), names - set(METRICS)
    for name, selector in SELECTOR.findall(query):
        asked = {part.split("=")[0].rstrip("!~ ").strip() for part in selector.split(",")}
        assert asked <= set(METRICS[base_of(name)].labels), (name, asked)
    known = {label for name in names for label in METRICS[name].labels} | {"instance", "le"}
    for labels in GROUPED.findall(query):
        assert {label.strip() for label in labels.split(",")} <= known
    assert query.count("(") == query.count(")")
    for name in names:  # a counter is only read through its rate
        if METRICS[name].kind == "counter":
            assert re.search(rf"(rate|increase)\({name}", query)


def base_of(name: str) -> str:
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s) and name.removesuffix(s) in METRICS), name)


def test_every_alert_names_a_view_and_every_panel_has_a_place():
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert "pager-inspect" in rule["annotations"]["runbook"] and rule["labels"]["severity"] in (
            "critical",
            "warning",
            "info",
        )
    panels = json.loads((ROOT / "deploy" / "grafana" / "kvtier.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) and sum(panel["type"] == "row" for panel in panels) == 5
