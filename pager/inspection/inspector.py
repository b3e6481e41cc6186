"""Inspector: answers an inspector's questions about one Core. The table of verbs; every reply is bounded, nothing changes.

Used behind a socket (`answer` takes what came over it) and within a process. A question that makes no sense gets an error
that says which questions there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...tiers.errors import ConfigError
from ..status import pager_status
from . import advice, checks, decisions, doctor, requests, views

if TYPE_CHECKING:
    from ..core import Core

SCHEMA = 1  # fields are added and never change their meaning
MAX_TRACE_ROWS = 500
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "bytes": (bytes,),
}


def status(core: Core) -> dict[str, Any]:
    """The pager's status with a verdict, and what a restart now would cost."""
    with core.locked():
        told = pager_status(core)
        dirty = told["tiers"]["device"]["dirty_bytes"] + told["tiers"]["host"]["dirty_bytes"]
        rate = _rate(core, "host_to_nvme") or _rate(core, "device_to_host")
        told["uptime_s"] = core.clock() - core.observer.started_s
    found = doctor.findings(core, quick=True)
    worst = next((f.severity for f in found if f.severity != "info"), "ok")
    told["verdict"] = worst
    told["findings"] = [{"severity": f.severity, "name": f.name, "what": f.what, "see": f.see} for f in found]
    told["restart"] = {"dirty_bytes": dirty, "drain_s": dirty / rate if rate else None}
    return told


def _rate(core: Core, direction: str) -> float:
    seconds = core.counters.get("move_seconds", direction=direction)
    return core.counters.get("moved_bytes", direction=direction) / seconds if seconds else 0.0


def record(core: Core, *, limit: int = MAX_TRACE_ROWS, is_last: bool = False) -> dict[str, Any]:
    """Requests since the last call in the replay format; recording goes on while somebody asks."""
    if not 1 <= limit <= MAX_TRACE_ROWS:
        raise ConfigError(f"limit={limit}: need 1 to {MAX_TRACE_ROWS}")
    with core.lock:
        recorder = core.observer.recorder
        rows = recorder.take(limit, is_last=is_last)
        return {"rows": rows, "lost": recorder.num_lost, "block_size": core.block_size}


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "status": status,
    "sessions": views.sessions,
    "session": views.session,
    "blocks": views.blocks,
    "prefix": views.prefix,
    "explain": decisions.explain,
    "trace": decisions.trace,
    "thrash": decisions.thrash,
    "why": requests.why,
    "doctor": doctor.doctor,
    "check": checks.check,
    "advise": advice.advise,
    "record": record,
}


class Inspector:
    """Of one Core."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def answer(self, body: Any) -> dict[str, Any]:
        """The reply to {"verb": ..., argument: value}. Raises: ConfigError for what is not a question."""
        if not isinstance(body, Mapping):
            raise ConfigError("inspect: the request is not a table of verb and arguments")
        verb = body.get("verb")
        view = VERBS.get(verb) if isinstance(verb, str) else None
        if view is None:
            raise ConfigError(f"inspect: verb {str(verb)[:40]!r} is unknown; choose {', '.join(VERBS)}")
        arguments = {name: value for name, value in body.items() if name != "verb"}
        _check_arguments(str(verb), view, arguments)
        return {"schema": SCHEMA, "verb": verb} | view(self._core, **arguments)


def _check_arguments(verb: str, view: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """By the view's own signature. Raises ConfigError naming the argument."""
    known = {name: p for name, p in inspect.signature(view).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, value in arguments.items():
        if name not in known:
            raise ConfigError(f"{verb}: {str(name)[:40]!r} is unknown; it takes {', '.join(known) or 'no argument'}")
        wanted = _TYPES[known[name].annotation]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise ConfigError(f"{verb}: {name}={value!r} is not of type {known[name].annotation}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ConfigError(f"{verb}: {name} is missing")
