"""How log lines leave the daemon: events with fields, one per line, as key=value text or as JSON.

What is logged is `event=NAME key=value ...`, written where it happens. Guards: a line is a line, whatever a client sent:
control characters are escaped, so nobody can write an entry of his own making.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import IO, Literal

Format = Literal["text", "json"]
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")
_SYSLOG = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


def set_up_logs(form: str, level: str, *, to: IO[str] | None = None, under_systemd: bool = False) -> None:
    """All logs of this process go to stderr in this form. May be called again with another level."""
    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines(with_priority=under_systemd))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class TextLines(logging.Formatter):
    """2026-01-31T12:00:00.123Z info kvtier.pagerd event=ready ...; for the journal <6> and neither time nor level."""

    def __init__(self, *, with_priority: bool = False) -> None:
        super().__init__()
        self._with_priority = with_priority

    def format(self, record: logging.LogRecord) -> str:
        text = _one_line(record, self)
        if self._with_priority:
            return f"<{_SYSLOG.get(record.levelname, 6)}>{record.name} {text}"
        return f"{_stamp(record)} {record.levelname.lower()} {record.name} {text}"


class JsonLines(logging.Formatter):
    """One object per line: time, level, logger, the event's fields, and `message` with what is no field."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        fields: dict[str, object] = {"time": _stamp(record), "level": record.levelname.lower(), "logger": record.name}
        matches = list(_FIELD.finditer(text)) if text.startswith("event=") else []
        for position, match in enumerate(matches):
            is_last = position == len(matches) - 1
            value = text[match.start(2) :] if is_last else text[match.start(2) : matches[position + 1].start()]
            fields.setdefault(
                match[1], _plain(value.strip())
            )  # a value may hold blanks: it ends where the next field begins
        if not matches:
            fields["message"] = text
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _one_line(record: logging.LogRecord, formatter: logging.Formatter) -> str:
    text = record.getMessage()
    if record.exc_info:
        text += " error=" + json.dumps(formatter.formatException(record.exc_info), ensure_ascii=False)
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _plain(value: str) -> object:
    if value.isdecimal() and len(value) < 16:
        return int(value)
    return value


def _stamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
