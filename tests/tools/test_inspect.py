"""The inspector against a real pager in another process, and against the store that it left: grammar, screens, answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from kvtier.tools.inspect import screens
from kvtier.tools.inspect.text import Style, size

from .inspecting import BLOCK, BLOCK_BYTES, PROGRAM, asked, inspect, running

EVERY_VERB = [
    "status",
    "sessions",
    "session alice",
    "blocks",
    "prefix 1,2,3",
    "why",
    "explain alice",
    "trace",
    "thrash",
    "doctor",
    "check",
    "advise",
    "history",
    "top --once",
    "stat 0.05 1",
    "record --seconds 0.1",
]


@pytest.fixture(scope="module")
def pager(tmp_path_factory):
    with running(tmp_path_factory.mktemp("p")) as one:
        one.do("pager.park('alice', compute(list(range(100))))")
        one.do("open_seq = compute(list(range(500, 900)))")
        one.do("[pager.finish(compute([7] * 400)) for _ in range(3)]")
        one.do("[pager.finish(compute([n] * 400)) for n in range(10, 20)]")
        one.do("assert pager.drain()")
        yield one


# ---------------------------------------------------------------------- grammar
def test_no_verb_means_status_and_flags_may_stand_on_either_side(pager):
    assert inspect("-s", pager.where).stdout.startswith("pager pid")
    assert json.loads(inspect("--json", "-s", pager.where, "sessions").stdout)["verb"] == "sessions"
    assert json.loads(inspect("sessions", "-s", pager.where, "-j").stdout)["verb"] == "sessions"
    assert json.loads(inspect("status", pager.where, "--json").stdout)["source"] == "pager"


def test_exit_codes_say_who_should_act(pager, tmp_path):
    cases = {
        (): 0,
        ("sessions", "--sort", "colour"): 2,
        ("explain", "zzz"): 2,
        ("session", "nobody"): 2,
        ("blocks", "--limit", "5000"): 2,
        ("record", "--seconds", "0.1", "--out", tmp_path / "none" / "x"): 2,
        ("frobnicate",): 2,
    }
    for words, code in cases.items():
        done = inspect("-s", pager.where, *words)
        assert done.returncode == code, (words, done)
        assert (code == 0) == (done.stderr == "")
    done = inspect("-s", tmp_path / "nothing", "sessions")
    assert done.returncode == 3 and "no such socket or store" in done.stderr and "running?" in done.stderr


def test_a_directory_of_stores_names_them(tmp_path):
    for name in ("model-a", "domain/model-b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "store.json").write_text("{}")
    done = inspect("-s", tmp_path, "sessions")
    assert done.returncode == 3 and str(tmp_path / "model-a") in done.stderr
    assert str(tmp_path / "domain" / "model-b") in done.stderr


def test_a_mistyped_verb_is_told_what_was_meant():
    done = inspect("sesions")
    assert done.returncode == 2 and "did you mean 'sessions'?" in done.stderr


def test_the_socket_is_found_by_environment(pager):
    assert inspect("sessions", env={"KVTIER_SOCKET": str(pager.where / "status.sock")}).returncode == 0
    done = inspect("sessions", env={"RUNTIME_DIRECTORY": "/nonexistent"})
    assert done.returncode == 3 and "/nonexistent/pagerd.sock" in done.stderr


def test_an_unknown_question_is_a_clear_error_and_the_pager_goes_on(pager):
    from kvtier.pager.inspection.asking import RefusedError, Target
    from kvtier.tiers.errors import ProtocolError

    target = Target.find(str(pager.where), timeout_s=60.0)
    for verb, arguments, says in (
        ("evict", {}, "verb 'evict' is unknown; choose status"),
        ("sessions", {"colour": "red"}, "'colour' is unknown; it takes sort"),
        ("sessions", {"limit": "many"}, "limit='many' is not of type int"),
        ("sessions", {"limit": True}, "limit=True is not of type int"),
        ("session", {}, "session is missing"),
        ("prefix", {"tokens": b"abc"}, "3 bytes are no whole number"),
    ):
        with pytest.raises(RefusedError, match=re.escape(says)):
            target.ask(verb, **arguments)
    with pytest.raises(ProtocolError, match="limit is"):
        target.ask("prefix", tokens=bytes(2 << 20))
    assert target.ask("sessions")["total"] >= 1


def test_a_closed_pipe_is_quiet(pager):
    command = f"{' '.join(PROGRAM)} -s {pager.where} blocks --limit 1000 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd="/")
    assert done.stderr == "" and "BLOCK" in done.stdout


def test_colour_is_for_terminals_and_no_color_turns_it_off(pager):
    def on_terminal(**env):
        command = [
            "script",
            "-qec",
            f"{' '.join(PROGRAM)} -s {pager.where} session alice",
            "/dev/null",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin:/bin", "TERM": "xterm"} | env
        )

    if subprocess.run(["which", "script"], capture_output=True).returncode:
        pytest.skip("no script(1) to make a terminal with")
    pager.do("pager.prefetch(open_seq); assert pager.drain()")
    assert "\x1b[" not in on_terminal(NO_COLOR="1").stdout
    assert "\x1b[" not in on_terminal(TERM="dumb").stdout
    shown = inspect("-s", pager.where, "session", "seq:2", "--no-color")
    assert shown.returncode in (0, 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_verb_and_choice(shell):
    from kvtier.tools.inspect.verbs import VERBS

    text = inspect("completion", shell).stdout
    for verb in VERBS:
        assert verb.name in text
    assert "unreferenced" in text and ("--slowest" in text or "-l slowest" in text)
    if subprocess.run(["which", shell], capture_output=True).returncode == 0:
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_completion_of_bash_completes():
    text = inspect("completion", "bash").stdout
    ask = 'COMP_WORDS=(pager-inspect blocks --tier n); COMP_CWORD=3; _pager_inspect; echo "${COMPREPLY[@]}"'
    assert subprocess.run(["bash", "-c", text + ask], capture_output=True, text=True).stdout.split() == ["nvme"]
    ask = 'COMP_WORDS=(pager-inspect se); COMP_CWORD=1; _pager_inspect; echo "${COMPREPLY[@]}"'
    assert subprocess.run(["bash", "-c", text + ask], capture_output=True, text=True).stdout.split() == [
        "sessions",
        "session",
    ]


def test_starting_loads_neither_numpy_nor_rich_nor_the_pager():
    code = (
        "import sys, kvtier.tools.inspect.cli as c; c.parser(); print(sorted({'numpy', 'rich', 'torch', 'zarr', 'asyncio', "
        "'kvtier.pager.core'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert out.strip() == "[]"


# ---------------------------------------------------------------------- what is there
def test_sessions_show_bytes_by_tier_and_pages_are_bounded(pager):
    told = asked(pager, "sessions", "--limit", 1, "--sort", "name")
    assert told["total"] == 2 and len(told["sessions"]) == 1
    (row,) = told["sessions"]
    assert row["name"] == "alice" and row["state"] == "durable" and row["nvme_bytes"] == 7 * BLOCK_BYTES
    rest = asked(pager, "sessions", "--limit", 1, "--sort", "name", "--offset", 1)
    assert rest["sessions"][0]["name"].startswith("seq:")


def test_a_session_is_drawn_block_by_block(pager):
    told = asked(pager, "session", "alice")
    assert told["groups"][0]["map"] == "nnnnnnn" and told["groups"][0]["blocks"] == 7
    shown = inspect("-s", pager.where, "session", "alice").stdout
    assert "nnnnnnn" in shown and "H device" in shown
    name = next(row["name"] for row in asked(pager, "sessions")["sessions"] if row["name"].startswith("seq:"))
    place = asked(pager, "session", name)["groups"][0]["map"]
    assert len(place) == 25 and set(place) <= set("HDhn")


def test_blocks_filter_sort_and_limit(pager):
    by_tier = asked(pager, "blocks", "--limit", 1)["by_tier"]
    for tier, number in by_tier.items():
        told = asked(pager, "blocks", "--tier", tier, "--limit", 1000)
        assert told["total"] == number and {row["tier"] for row in told["blocks"]} <= {tier}
    idle = [row["idle_s"] for row in asked(pager, "blocks", "--limit", 20)["blocks"]]
    assert idle == sorted(idle, reverse=True)
    key = asked(pager, "blocks", "--tier", "nvme", "--limit", 1)["blocks"][0]["key"]
    assert [row["key"] for row in asked(pager, "blocks", "--key", key)["blocks"]] == [key]
    refs = [row["refs"] for row in asked(pager, "blocks", "--sort", "refs", "--limit", 5)["blocks"]]
    assert refs == sorted(refs, reverse=True) and refs[0] > 0


def test_prefix_says_how_far_it_hits_and_why_it_breaks(pager, tmp_path):
    ids = list(range(100))
    told = asked(pager, "prefix", ",".join(map(str, ids)))
    assert (
        told["hit_tokens"] == 96
        and told["break"]["why"] == "tail"
        and told["runs"] == [{"tier": "nvme", "first": 0, "blocks": 6}]
    )
    changed = tmp_path / "ids.json"
    changed.write_text(json.dumps([*ids[:40], 9, *ids[41:]]))
    told = asked(pager, "prefix", changed)
    assert told["hit_tokens"] == 32 and told["break"]["why"] == "never held" and told["break"]["token"] == 32
    assert asked(pager, "prefix", ",".join(map(str, ids)), "--namespace", "other")["hit_tokens"] == 0
    done = inspect("-s", pager.where, "prefix", "-", stdin=" ".join(map(str, ids)))
    assert "96 of 100 tokens would hit (96.0%)" in done.stdout
    for text, says in (("[1, 2.5]", "no token id"), ("[1, -2]", "-2 is outside")):
        changed.write_text(text)
        done = inspect("-s", pager.where, "prefix", changed)
        assert done.returncode == 2 and says in done.stderr


def test_prefix_names_the_eviction_behind_a_break(tmp_path):
    with running(tmp_path, store=False, host_bytes="32KiB") as pager:
        pager.do("pager.finish(compute([1] * 64))")
        pager.do("[pager.finish(compute([n] * 640)) for n in range(2, 8)]")
        told = asked(pager, "prefix", ",".join(["1"] * 64))
        assert told["break"]["why"] == "evicted" and told["break"]["tier"] in ("host", "device")
        key = told["break"]["key"]
        explained = asked(pager, "explain", key)
        assert explained["now"] == [] and explained["ghost"]["tier"] == told["break"]["tier"]
        assert [row["what"] for row in explained["events"]][-1] == "dropped"
        assert "its last copy left" in inspect("-s", pager.where, "explain", key).stdout


# ---------------------------------------------------------------------- decisions
def test_explain_tells_the_way_of_a_session_down(pager):
    told = asked(pager, "explain", "alice")
    ways = [(row["what"], row["tier"]) for row in told["events"]]
    assert ("demoted", "host") in ways and ("written", "nvme") in ways and ("evicted", "device") in ways
    assert {row["reason"] for row in told["events"] if row["what"] == "evicted"} & {"park", "pressure"}
    assert all(row["policy"] for row in told["events"] if row["what"] == "evicted")


def test_pins_are_explained(pager):
    pager.do("pinned = compute(list(range(2000, 2032))); pager.pin(pinned, 60.0)")
    key = asked(pager, "blocks", "--state", "pinned", "--limit", 1)["blocks"][0]["key"]
    assert "pinned" in [row["what"] for row in asked(pager, "explain", key)["events"]]
    pager.do("pager.finish(pinned)")


def test_trace_follows_what_happens(pager):
    from kvtier.pager.inspection.asking import Target

    command = [*PROGRAM, "-s", str(pager.where), "trace", "-f", "--json", "--interval", "0.05"]
    before = Target.find(str(pager.where), timeout_s=60.0).ask("trace")["next"]
    with subprocess.Popen([*command, "--types", "written"], stdout=subprocess.PIPE, text=True, cwd="/") as follower:
        assert follower.stdout is not None
        try:
            pager.do("pager.park('bob', compute([42] * 200)); pager.forget('bob')")
            row = {"serial": -1}
            while row["serial"] < before or row["reason"] != "park":
                row = json.loads(follower.stdout.readline())
                assert row["what"] == "written"
        finally:
            follower.terminate()


def test_thrash_names_tier_and_session(tmp_path):
    with running(tmp_path, store=False, host_bytes="32KiB") as pager:
        for _ in range(3):
            pager.do("[pager.finish(compute([n] * 640)) for n in range(6)]")
        told = asked(pager, "thrash")
        assert told["ghost_tokens"] >= 640 and told["ghost_tokens"] <= told["missed_tokens"]
        assert sum(row["tokens"] for row in told["by_tier"]) == told["ghost_tokens"]
        assert sum(row["host_tokens"] + row["device_tokens"] for row in told["by_session"]) <= told["ghost_tokens"]
        assert {row["namespace"] for row in told["by_session"]} == {"default"}
        assert asked(pager, "thrash", "--since", "0s")["ghost_tokens"] == 0


# ---------------------------------------------------------------------- a pager that hangs, a store at rest
def test_a_stopped_pager_times_out_with_its_own_code_and_offline_still_shows_it(pager):
    asked(pager, "top", "--once")
    with pager.stopped():
        done = inspect("-s", pager.where, "--timeout", "0.3", "sessions")
        assert done.returncode == 4 and "--offline" in done.stderr
        done = inspect("-s", pager.where, "status", "--offline")
        assert done.returncode == 0 and "as published" in done.stdout and "CAPACITY" in done.stdout
        done = inspect("-s", pager.where, "top", "--once", "--offline")
        assert done.returncode == 0 and "SESSION" in done.stdout
    assert asked(pager, "sessions")["total"] >= 2


def test_a_store_at_rest_answers_what_it_knows(tmp_path):
    with running(tmp_path) as pager:
        pager.do("pager.park('alice', compute(list(range(100))))")
        where = pager.where
        live = asked(where, "prefix", ",".join(map(str, range(100))))
    assert not (where / "status.sock").exists() and not (where / "status.sock.page").exists()
    assert asked(where, "status")["source"] == "store"
    assert asked(where, "sessions")["sessions"][0] | {"idle_s": None} == {
        "name": "alice",
        "namespace": "default",
        "state": "durable",
        "tokens": 100,
        "computed_tokens": 100,
        "device_bytes": 0,
        "host_bytes": 0,
        "nvme_bytes": 7 * BLOCK_BYTES,
        "idle_s": None,
    }
    assert asked(where, "session", "alice")["groups"][0]["map"] == "n" * 7
    assert asked(where, "blocks")["total"] == 7
    rest = asked(where, "prefix", ",".join(map(str, range(100))))
    assert {k: rest[k] for k in ("hit_tokens", "break")} == {k: live[k] for k in ("hit_tokens", "break")}
    assert asked(where, "check")["findings"] == 0
    key = asked(where, "blocks", "--limit", 1)["blocks"][0]["key"]
    assert [place["tier"] for place in asked(where, "explain", key)["now"]] == ["nvme"]
    assert "why it is there went with the pager" in inspect("-s", where, "explain", key).stdout
    done = inspect("-s", where, "thrash")
    assert done.returncode == 2 and "needs a running pager" in done.stderr


def test_a_socket_that_a_dead_pager_left_is_no_obstacle(tmp_path):
    with running(tmp_path) as pager:
        pager.do("pager.park('alice', compute(list(range(100))))")
        pager.process.kill()
        pager.process.wait()
        assert (pager.where / "status.sock").exists()
        assert asked(pager.where, "sessions")["sessions"][0]["name"] == "alice"
        assert BLOCK == 16


def test_no_token_of_a_prompt_is_in_any_answer(tmp_path, capsys):
    """A token id that appears nowhere by chance: 3123456789 as a number, or its bytes in hexadecimal."""
    from kvtier.tools.inspect import main

    secret = 3123456789
    with running(tmp_path) as pager:
        pager.do(f"pager.park('alice', compute([{secret}] * 100))")
        for words in (*EVERY_VERB, "export --html -"):
            asks = words.replace("1,2,3", ",".join([str(secret)] * 50)).split()
            assert main(["-s", str(pager.where), "--timeout", "60", "--json", *asks]) in (0, 1), words
            text = capsys.readouterr().out
            assert str(secret) not in text and secret.to_bytes(4, "little").hex() not in text, words


def test_what_a_codec_saves_is_said_beside_sizes_that_count_whole_blocks(pager):
    told = asked(pager, "status")
    stored = told["tiers"]["nvme"]["stored_bytes"]
    assert stored > 0
    told["tiers"]["nvme"]["used_bytes"] = 2 * stored
    screen = "\n".join(screens.tiers(told, Style()))
    assert f"nvme: blocks take {size(stored)} as stored" in screen
    told["tiers"]["nvme"]["used_bytes"] = stored
    assert "as stored" not in "\n".join(screens.tiers(told, Style()))
