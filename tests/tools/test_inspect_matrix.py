"""Every verb against every source (a pager's socket, pagerd, a store at rest), as a screen and as JSON: exit codes, what is
on which stream, no escapes, no long key. What a store at rest cannot know is refused with a reason, not made up.
"""

from __future__ import annotations

import json
import re

import pytest

from kvtier.pager.inspection.asking import AT_REST, Target, UnreachableError
from kvtier.tiers.cpu import CpuBackend
from kvtier.tools import inspect
from kvtier.tools.inspect.verbs import VERBS

from ..daemon.running import Pagerd, wait_for
from ..pager.harness import LAYOUT, Rig
from .inspecting import running

FINE, FINDINGS, USAGE, UNREACHABLE = 0, 1, 2, 3
VIEWS = {  # verb -> words after it
    "status": (),
    "stat": ("0.05", "1"),
    "top": ("--once",),
    "sessions": (),
    "session": ("alice",),
    "blocks": (),
    "prefix": ("1,2,3",),
    "why": (),
    "explain": ("alice",),
    "trace": (),
    "thrash": (),
    "doctor": (),
    "check": (),
    "advise": (),
    "history": (),
    "record": ("--seconds", "0.05"),
    "export": ("--html", "-"),
}
OFFLINE_TOO = {"export"}  # of what a store at rest answers in parts
BOOT = re.compile(r'"boot": "[0-9a-f]{32}"')  # which run of a daemon this is; no key
KEY = re.compile(r"(?<![.\w-])(?=\d*[a-f])[0-9a-f]{9,}\b")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Paths of the three, all with a session `alice`."""
    embedded, rest, shared = (tmp_path_factory.mktemp(name) for name in ("embedded", "rest", "shared"))
    with running(rest) as before:
        before.do("pager.park('alice', compute(list(range(100))))")
        at_rest = before.where
    with (
        running(embedded) as pager,
        Pagerd(shared, host_bytes=64 * LAYOUT.block_bytes, nvme_bytes=2000 * LAYOUT.block_bytes) as daemon,
    ):
        pager.do("pager.park('alice', compute(list(range(100)))); kept = compute(list(range(500, 900)))")
        pager.do("[pager.finish(compute([n] * 400)) for n in range(10)]")
        rig = Rig(daemon=daemon.address, backend=CpuBackend(), pages=32)
        seq = rig.start(list(range(100, 180)))
        rig.prefill(seq)
        rig.pager.park("alice", seq)
        wait_for(lambda: has_history(daemon))
        yield {"pager": pager.where, "pagerd": daemon.socket, "store": at_rest}
        rig.close()


def has_history(daemon: Pagerd) -> bool:
    """Whoever watches hurries the first row."""
    target = Target.find(str(daemon.socket), timeout_s=60.0)
    try:
        target.snapshot(watch=True)
    except UnreachableError:
        return False
    return bool(target.history(0.0))


def test_every_verb_is_in_the_matrix():
    assert {verb.name for verb in VERBS} == {*VIEWS, "completion"}


@pytest.mark.parametrize("verb", VIEWS)
@pytest.mark.parametrize("source", ["pager", "pagerd", "store"])
def test_every_view_of_every_source(sources, source, verb, capsys):
    codes = {as_json: check_view(sources[source], source, verb, capsys, as_json) for as_json in (False, True)}
    # stores of other tests come and go, and a busy machine may keep a check waiting
    assert len(set(codes.values())) == 1 or verb in ("doctor", "check")
    can_answer = source != "store" or verb in AT_REST or verb in OFFLINE_TOO
    if verb == "history" and source == "store":
        assert codes[True] == FINE  # its pager left it there
    elif not can_answer:
        assert codes[True] == USAGE
    else:
        assert codes[True] in ((FINE, FINDINGS) if verb in ("doctor", "check") else (FINE,))


def check_view(where, source: str, verb: str, capsys, as_json: bool) -> int:
    code = inspect.main(["-s", str(where), "--timeout", "60", verb, *VIEWS[verb], *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert "\x1b" not in out and not KEY.search(BOOT.sub("", out)), KEY.search(BOOT.sub("", out))
    if code in (USAGE, UNREACHABLE):
        assert out == "" and err.startswith("pager-inspect: error: ") and err.count("\n") == 1, err
        assert "needs a running pager" in err and source == "store"
        return code
    assert out or verb in ("record", "trace")
    assert err == "" or verb == "record"
    if as_json and verb != "export":
        told = [json.loads(line) for line in out.splitlines()]
        if verb in {verb.name for verb in VERBS} - {"stat", "top", "trace", "history", "record"}:
            (answer,) = told
            assert answer["schema"] == 1 and answer["verb"] == verb
    return code


@pytest.mark.parametrize("verb", VIEWS)
def test_where_nothing_is_every_view_says_so_and_ends_with_3(tmp_path, verb, capsys):
    code = inspect.main(["-s", str(tmp_path / "nothing"), verb, *VIEWS[verb]])
    out, err = capsys.readouterr()
    assert code == UNREACHABLE and out == "" and "no such socket or store" in err
