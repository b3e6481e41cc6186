"""`top` on a real terminal with keys, `stat`, `history` and `record` while a real pager works in another process."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ..daemon.running import wait_for
from .inspecting import PROGRAM, asked, inspect, running

TRAFFIC = "[pager.finish(compute([n] * 400)) for n in range(6)]"


@pytest.fixture(scope="module")
def pager(tmp_path_factory):
    with running(tmp_path_factory.mktemp("p")) as one:
        one.do("pager.park('alice', compute(list(range(100))))")
        one.do("kept = compute(list(range(500, 900)))")
        yield one


class Terminal:
    """A program on a terminal of 120 by 30; `until` reads on until a text is on the screen."""

    def __init__(self, *words: object) -> None:
        self.leader, follower = pty.openpty()
        command = [*PROGRAM, *map(str, words)]
        env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30", "LANG": "C.UTF-8"}
        import fcntl
        import struct
        import termios

        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
        self.process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, cwd="/", env=env)
        os.close(follower)
        self.seen = ""

    def until(self, pattern: str, timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline_s, f"{pattern!r} is not in {self.seen[-2000:]!r}"
            if select.select([self.leader], [], [], 0.2)[0]:
                self.seen += os.read(self.leader, 1 << 16).decode(errors="replace")

    def press(self, keys: str) -> None:
        self.seen = ""
        os.write(self.leader, keys.encode())

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self.leader)


def test_top_is_live_and_obeys_its_keys(pager):
    terminal = Terminal("-s", pager.where, "top", "--interval", "0.1")
    try:
        terminal.until("alice")
        terminal.until("sort device")
        pager.do(TRAFFIC)
        terminal.until(r"missed \d")
        terminal.press("s")
        terminal.until("sort host")
        terminal.press("/ali\r")
        terminal.until("filter ali ")
        assert "seq:" not in terminal.seen.split("filter ali ")[-1]
        terminal.press("p")
        terminal.until("PAUSED")
        terminal.press("q")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()


def test_top_once_is_a_capture_without_escapes(pager):
    pager.do(TRAFFIC)

    def shown() -> str:
        return inspect("-s", pager.where, "top", "--once", "--filter", "alice").stdout

    # a slow machine publishes when there is time, and rates need two snapshots that are not the same
    seen = wait_for(lambda: next((text for text in [shown()] if "alice" in text and "hit rate" in text), ""))
    assert "\x1b" not in seen and "seq:" not in seen
    told = json.loads(inspect("-s", pager.where, "top", "--json").stdout)
    assert told["status"]["tiers"]["nvme"]["blocks"] > 0 and told["snapshot_age_s"] < 60


def test_watching_makes_snapshots_fresh_and_costs_no_question(pager):
    from kvtier.pager.inspection.snapshot import page_path, read_snapshot

    page = page_path(pager.where / "status.sock")
    read_snapshot(page, watch=True)
    deadline_s = time.monotonic() + 60
    while (
        read_snapshot(page, watch=True)["snapshot_age_s"] >= 1.0
    ):  # published four times a second, or when there is time
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    with pager.stopped():
        before = read_snapshot(page)["snapshot_age_s"]
        time.sleep(0.3)
        assert read_snapshot(page)["snapshot_age_s"] > before


def test_top_says_when_nothing_is_published_any_more(pager):
    from kvtier.tools.inspect.text import Style
    from kvtier.tools.inspect.top import View

    told = json.loads(inspect("-s", pager.where, "top", "--json").stdout)
    for missed, hangs in ((1.9, False), (2.5, True)):  # publications; one that takes long comes seldom
        view = View()
        view.take(told | {"next_s": 40.0, "snapshot_age_s": missed * 40.0})
        assert ("the pager hangs or is stopped" in "\n".join(view.lines(Style(), 40))) == hangs
    assert told["next_s"] >= 5.0


def test_rates_are_between_two_snapshots_however_late_one_is_read(pager):
    from kvtier.tools.inspect.text import Style
    from kvtier.tools.inspect.top import View

    view, told = View(), json.loads(inspect("-s", pager.where, "top", "--json").stdout)
    for age_s in (0.0, 3.0):  # the same one, read by somebody who was held up in between
        view.take(told | {"snapshot_age_s": age_s})
    assert not view.before and "rates come with the next snapshot" in "\n".join(view.lines(Style(), 40))
    view.take(told | {"taken_s": told["taken_s"] + 2.0})
    assert "over 2.0 s" in "\n".join(view.lines(Style(), 40))


def test_stat_counts_what_happened_between_two_looks(pager):
    """What happens in one tick is the machine's; in some tick each of these does."""
    seen: dict[str, float] = {}
    moving = ("miss_tokens_per_s", "evicted_blocks_per_s", "down_bytes_per_s", "device_to_host_wait_s")
    command = [*PROGRAM, "-s", str(pager.where), "stat", "0.1", "--json", "-l", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as ticking:
        deadline_s, number = time.monotonic() + 60, 10_000
        while not all(seen.get(name, 0.0) > 0 for name in moving):
            assert time.monotonic() < deadline_s, seen
            pager.do(f"pager.finish(compute([{number}] * 400)); {TRAFFIC}")
            number += 1
            row = json.loads(ticking.stdout.readline())
            seen = {name: max(value or 0.0, seen.get(name, 0.0)) for name, value in row.items() if name != "time"}
            assert row["device_to_host_queued_blocks"] >= 0 and row["host_to_nvme_oldest_s"] >= 0
        ticking.terminate()


def stat(pager, *words: object) -> list[str]:
    """One tick."""
    return inspect("-s", pager.where, "stat", "0.1", "1", *words).stdout.splitlines()


def test_stat_shows_the_columns_that_were_asked_for(pager):
    head, line = stat(pager, "-f", "evict,d>h,wait.d>h")
    assert head.split() == ["TIME", "evict/s", "d>h", "B/s", "d>h", "wait"] and len(head) == len(line)
    (line,) = stat(pager, "-f", "miss", "-H")
    assert len(line.split()) == 2
    listed = inspect("stat", "--fields").stdout
    from kvtier.tools.inspect.stat import COLUMNS

    assert all(column.name in listed and column.what in listed for column in COLUMNS.values())
    assert len({column.name for column in COLUMNS.values()}) == len(COLUMNS)
    for words, says in (
        (("-f", "colour"), "-f 'colour' is unknown"),
        (("-f", ""), "-f '' is unknown"),
        (("0",), "INTERVAL 0"),
    ):
        done = inspect("-s", pager.where, "stat", *words)
        assert done.returncode == 2 and says in done.stderr, done


def test_a_recording_is_a_replay_trace(pager, tmp_path):
    file = tmp_path / "trace.jsonl"
    command = [*PROGRAM, "-s", str(pager.where), "record", "--out", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as recording:
        wait_for(lambda: pager.do("result = core.observer.recorder.is_on"))
        started_s = time.monotonic()
        pager.do("a = compute(list(range(3000, 3096))); pager.append(a, [1, 2, 3]); pager.finish(a)")
        pager.do("b = compute(list(range(3000, 3064)) + [9] * 32); pager.finish(b)")
        took_s = time.monotonic() - started_s
        recording.send_signal(signal.SIGINT)  # it goes on until it is interrupted
        said = recording.communicate(timeout=60)[1]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert (
        "2 requests" in said
        and [set(row) for row in rows] == [{"timestamp", "input_length", "output_length", "hash_ids"}] * 2
    )
    first, second = rows
    assert (
        first["input_length"] == 95 and first["output_length"] == 4
    )  # the last token of a prompt is computed, not looked up
    assert first["hash_ids"] == [0, 1, 2, 3, 4] and second["hash_ids"] == [0, 1, 2, 3, 5]
    assert 0 <= first["timestamp"] <= second["timestamp"] <= first["timestamp"] + took_s * 1e3 + 1


def test_history_draws_what_the_pager_wrote(pager, tmp_path):
    from kvtier.pager.inspection.history import HistoryFile

    rows = wait_for(lambda: asked(pager, "history")["rows"])  # the first comes with the first snapshot
    assert rows[0]["nvme_used_bytes"] >= 0
    socket = tmp_path / "s"
    (tmp_path / "s.history").touch()
    file = HistoryFile(tmp_path / "s.history")
    for n in range(60):
        file.write({"time_s": time.time() - 600 + 10 * n, "miss_tokens": 100.0 * n * n, "device_used_bytes": 1 << 20})
    file.close()
    from kvtier.tools.inspect.answers import history
    from kvtier.tools.inspect.text import Style

    from_file = asked_history(socket)
    shown = "\n".join(history(from_file, Style()))
    assert "60 rows over" in shown and "1.0M" in shown and "▁" in shown and "█" in shown
    assert "#" in "\n".join(history(from_file, Style(ascii=True)))


def asked_history(socket):
    from kvtier.pager.inspection.history import history_path, read_history

    return read_history(history_path(socket))


def test_advice_grows_with_memory_and_says_when_it_is_a_guess(pager):
    for _ in range(2):
        pager.do(TRAFFIC)
    told = asked(pager, "advise", "--factor", "8")
    rates = [row["hit_rate"] for row in told["rows"]]
    assert rates == sorted(rates) and {row["factor"] for row in told["rows"]} >= {0.5, 1.0, 8.0}
    assert rates[-1] <= told["ever_reused"] + 1e-9
    assert asked(pager, "advise", "--tier", "nvme")["tier"] == "nvme"
    assert inspect("-s", pager.where, "advise", "--factor", "0").returncode == 2


def test_the_captures_in_the_documentation_are_of_these_screens(pager):
    """Their heads are those that are drawn now, and what made them can still be asked."""
    from kvtier.tools.inspect.cli import parser
    from kvtier.tools.inspect.stat import COLUMNS

    captures = Path(__file__).resolve().parents[2] / "docs" / "captures"
    kept = {file.stem: file.read_text() for file in captures.glob("*.txt")}
    assert set(kept) == {"top", "status", "stat", "why", "session", "thrash", "advise", "doctor"}
    for text in kept.values():
        command = text.splitlines()[0].removeprefix("$ pager-inspect ")
        parser().parse_args(command.split())
    for verb, words in (("top", ["top", "--once"]), ("session", ["session", "alice"])):
        drawn = inspect("-s", pager.where, *words).stdout
        assert heads(kept[verb]) == heads(drawn) != []
    columns = kept["stat"].split("-f ")[1].split()[0].split(",")
    for column in columns:
        assert COLUMNS[column].head in kept["stat"]


def heads(text: str) -> list[list[str]]:
    """Words of the lines that are all capitals, but for units."""
    rows = [re.sub(r"\(tok\)|/s", "", line).split() for line in text.splitlines()]
    return [row for row in rows if len(row) > 2 and all(word.isupper() for word in row)]
