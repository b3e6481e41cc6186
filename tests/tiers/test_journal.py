"""The journal when the disk refuses: what was acknowledged is there after a power loss, and nothing is written in vain."""

from __future__ import annotations

import errno

import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tiers.nvme.journal import framed
from kvtier.tiers.nvme.manifest import STAMP, Manifest, replay


class Refusing(SystemCalls):
    """Refuses calls by name, once each. `on_medium` is what a power loss would leave."""

    def __init__(self, path) -> None:
        self.path, self.refuses, self.on_medium = path, [], b""

    def _ask(self, name: str) -> None:
        if name in self.refuses:
            self.refuses.remove(name)
            raise OSError(errno.EIO, f"injected into {name}")

    def open(self, path, flags):
        self._ask("open")
        return super().open(path, flags)

    def append(self, fd, frame):
        if "append" in self.refuses:
            super().append(fd, frame[: len(frame) // 2])
        self._ask("append")
        return super().append(fd, frame)

    def set_size(self, fd, size):
        self._ask("set_size")
        super().set_size(fd, size)

    def fdatasync(self, fd):
        self._ask("fdatasync")
        super().fdatasync(fd)


def sessions(path) -> set[str]:
    return set(replay(path).listing.sessions)


@pytest.fixture
def journal(tmp_path):
    calls = Refusing(tmp_path / "manifest.log")
    journal = Manifest.open(calls.path, calls)
    journal.put_session("a", {"n": 1})
    journal.sync()
    yield journal, calls
    journal.close()


def test_after_a_refused_sync_it_is_written_anew(journal):
    """Linux takes pages whose write failed for clean: a later sync of the same file says nothing about them."""
    journal, calls = journal
    before = calls.path.stat().st_ino
    journal.put_session("b", {"n": 2})
    calls.refuses = ["fdatasync"]
    with pytest.raises(OSError, match="injected"):
        journal.sync()
    journal.sync()
    assert calls.path.stat().st_ino != before and sessions(calls.path) == {"a", "b"}
    journal.put_session("c", {"n": 3})
    journal.sync()
    assert sessions(calls.path) == {"a", "b", "c"}


def test_nothing_is_appended_behind_half_aframed(journal):
    journal, calls = journal
    calls.refuses = ["append", "set_size"]
    with pytest.raises(OSError, match="injected"):
        journal.put_session("b", {"n": 2})
    assert "b" not in journal.listing.sessions
    calls.refuses = ["set_size"]
    with pytest.raises(OSError, match="set_size"):
        journal.put_session("c", {"n": 3})
    journal.put_session("d", {"n": 4})
    journal.sync()
    assert sessions(calls.path) == {"a", "d"} == set(journal.listing.sessions)


def test_a_rewrite_that_fails_leaves_the_journal_in_use(journal):
    journal, calls = journal
    calls.refuses = ["open"]
    with pytest.raises(OSError, match="injected"):
        journal.shrink(always=True)
    journal.put_session("b", {"n": 2})
    journal.sync()
    assert sessions(calls.path) == {"a", "b"}


@pytest.mark.parametrize(
    "record",
    [
        {"op": "put", "group": 1 << 40, "slots": b"\0" * 8, "stamps": b"\0" * STAMP.itemsize},
        {"op": "put", "group": 0, "slots": b"\xff" * 8, "stamps": b"\0" * STAMP.itemsize},
        {"op": "put", "group": 0, "slots": b"\0" * 8, "stamps": b""},
        {"op": "move", "group": 0, "slots": b"\0" * 8},
        {"op": "session", "id": "a", "record": None},
        {},
    ],
)
def test_a_whole_record_that_is_none_of_ours_is_said_so_and_lists_nothing(tmp_path, record):
    path = tmp_path / "manifest.log"
    path.write_bytes(framed({"op": "session", "id": "a", "record": {}}) + framed(record))
    with pytest.raises(ConfigError, match=r"record at byte \d+ is whole and none that this version writes"):
        Manifest.open(path)
