"""`export --html`: a page that loads nothing, opened in a real headless Chromium where there is one, over a pager that worked.

Without a browser the page's script still runs, in Node over a stand-in document; without either that part is skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from shutil import which

import pytest

from .inspecting import inspect, running

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
SECTIONS = {"Findings", "Tiers", "Used bytes", "Bytes per second between tiers", "Sessions", "Checks"}
HISTORY = """
import time
from kvtier.pager.inspection.history import row_of
from kvtier.pager.inspection.service import Snapshots
for n in range(6):
    pager.finish(compute([n % 3] * 400))
    pager._status_server._publisher._history.write(row_of(Snapshots().take(core)["status"], time.time() - 600 + 10 * n))
"""
REQUEST = """
s = compute([9] * 64)
pager.note_request(s, name="req-a", age_s=0.5, outcome="stop", lines_s={"ttft_s": 0.4, "queued": 0.1, "prefill": 0.3},
                   usage={"prompt_tokens": 64, "cached_tokens": 16})
pager.finish(s)
"""
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [Math.round(r.width), Math.round(r.height)]; };
document.body.dataset.seen = JSON.stringify({
  heads: [...document.querySelectorAll("h2")].map(h => h.textContent), charts: [...document.querySelectorAll("svg")].map(box),
  lines: [...document.querySelectorAll("path.series")].map(p => p.getTotalLength()),
  rows: document.querySelectorAll("tr").length,
  loaded: performance.getEntriesByType("resource").length,
  tooWide: document.documentElement.scrollWidth > document.documentElement.clientWidth});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page about a pager with a history, sessions, an answered request and things evicted."""
    folder = tmp_path_factory.mktemp("p")
    with running(folder) as pager:
        pager.do("pager.park('<b>alice</b>', compute(list(range(100))))")
        pager.do(HISTORY)
        pager.do(REQUEST)
        done = inspect("-s", pager.where, "export", "--html", folder / "report.html")
        assert done.returncode == 0, done.stderr
    return folder / "report.html"


class Balanced(HTMLParser):
    """Every tag that is opened is closed, and none names anything outside the page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert not any(name in ("src", "href", "srcset", "action") for name, _ in attrs), f"<{tag}> loads something"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_names_nothing_outside_it(page):
    text, parser = page.read_text(), Balanced()
    parser.feed(text)
    parser.close()
    assert not parser.open and "pager pid" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "") and "@import" not in text and "url(" not in text
    assert "<b>alice" not in text  # what users name is text, never markup
    json.loads(re.search(r'id="told">(.*?)</script>', text, re.S)[1])


@pytest.mark.parametrize("size", ["1280,900", "400,800"])
def test_a_headless_browser_draws_it_without_a_word_of_complaint(page, tmp_path, size):
    browser = next(filter(None, map(which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints and 'data-drawn="yes"' in done.stdout, (complaints, done.stderr[-500:])
    seen = json.loads(_attribute(done.stdout, "data-seen"))
    assert set(seen["heads"]) >= SECTIONS and seen["loaded"] == 0 and not seen["tooWide"]
    assert len(seen["charts"]) >= 3 and all(width > 200 and height > 50 for width, height in seen["charts"])
    assert len(seen["lines"]) >= 8 and all(length > 100 for length in seen["lines"])
    assert seen["rows"] >= 8


def _attribute(dom: str, name: str) -> str:
    """As the browser has it, entities resolved."""
    found: list[str] = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.extend(value for key, value in attrs if key == name)

    Finder().feed(dom)
    return found[0]


def test_its_script_runs_in_node_too(page):
    """Over a stand-in document that only collects what is appended."""
    node = which("node")
    if node is None:
        pytest.skip("no node here")
    text = page.read_text()
    stub = """
    const made = []; const element = name => ({name, children: [], dataset: {}, attributes: {}, textContent: "",
      setAttribute(k, v) { if (String(v).includes("NaN")) throw Error(name + " " + k + "=" + v); this.attributes[k] = v; },
      appendChild(c) { this.children.push(c); made.push(c); return c; }});
    const known = {told: {textContent: TOLD}, charts: element("main")};
    const document = {body: element("body"), getElementById: id => known[id],
      createElement: element, createElementNS: (_, n) => element(n)};
    """
    told = re.search(r'id="told">(.*?)</script>', text, re.S)[1]
    script = re.search(r"<script>\n(.*?)</script>", text, re.S)[1].replace('"use strict";', "")
    heads = 'made.filter(m => m.name === "h2").map(m => m.textContent)'
    end = f"console.log(JSON.stringify({{drawn: document.body.dataset.drawn, heads: {heads}}}));"
    code = stub.replace("TOLD", json.dumps(told)) + script + end
    done = subprocess.run([node, "-"], input=code, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["drawn"] == "yes" and set(said["heads"]) >= SECTIONS
