"""`export --html`: everything that the inspector knows on one page that needs nothing else, charts drawn by its own script.

The page holds the answers as JSON and a short script that makes tables and SVG charts of them; it loads nothing. Without
scripts it still shows the status as text.
"""

from __future__ import annotations

import html
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pager.inspection.asking import RefusedError, Target, UnreachableError
from . import screens
from .advising import advised
from .text import Style

if TYPE_CHECKING:
    from .verbs import Context

ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("doctor", {}),
    ("sessions", {"limit": 200}),
    ("thrash", {}),
    ("advise", {}),
    ("why", {"slowest": 20}),
    ("trace", {"limit": 200}),
    ("check", {}),
)


def export(context: Context) -> int:
    """Returns the exit code."""
    page = page_of(context.target())
    if context.arguments.html == "-":
        sys.stdout.write(page)
        return 0
    try:
        with open(context.arguments.html, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        raise RefusedError(f"--html {context.arguments.html}: {error.strerror}") from error
    print(f"wrote {context.arguments.html} ({len(page):,} characters)", file=sys.stderr)
    return 0


def page_of(target: Target) -> str:
    """The page of one pager or store. What a store at rest cannot answer is left out."""
    told: dict[str, Any] = {"status": target.ask("status")}
    for verb, arguments in ASKED:
        try:
            told[verb] = advised(target) if verb == "advise" else target.ask(verb, **arguments)
        except RefusedError:
            continue
    try:
        told["history"] = target.history(time.time() - 86400)
    except UnreachableError:
        told["history"] = []
    text = "\n".join(screens.status(told["status"], Style()))
    data = json.dumps(told).replace("<", "\\u003c")  # nothing in it can end the script
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return page.replace("@WHEN@", when).replace("@TEXT@", html.escape(text)).replace("@DATA@", data)
