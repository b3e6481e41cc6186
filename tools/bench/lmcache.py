"""LMCache beside the store in `bench nvme`: another interpreter runs lmcache_peer.py and is asked for one case at a time.

It has an interpreter of its own because its dependencies differ from ours. Its settings are all tried in every round and
the best of each case counts. Without one, the rows say that it is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...tiers.errors import ConfigError
from .harness import Row

NOT_INSTALLED = "LMCache is not installed: pass --lmcache PYTHON; how to install: README, Compared with LMCache"
CASES = ("write", "committed", "read")
TIMEOUT_S = 300.0
_SCRIPT = Path(__file__).with_name("lmcache_peer.py")
_SERVER_SCRIPT = Path(__file__).with_name("lmcache_server_peer.py")


class PeerProcess:
    """Another interpreter that runs one of our peer programs. Raises ConfigError when it cannot run LMCache, or fails."""

    def __init__(self, python: str, script: Path, folder: Path, **sizes: int) -> None:
        interpreter = shutil.which(python)
        if interpreter is None:
            raise ConfigError(f"--lmcache {python!r} is not a program: name the Python that has lmcache installed")
        folder.mkdir()
        self._python, self._log = python, (folder / "log").open("w+")
        self._process = subprocess.Popen(
            [interpreter, "-I", str(script), str(folder), *(f"--{name}={size}" for name, size in sizes.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ},  # memory in huge pages, as ours is
        )
        try:
            self.greeting = self._read()
        except ConfigError:
            self.close()
            raise
        self.version: str = self.greeting["lmcache"]
        self.block_bytes: int = self.greeting["block_bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()  # it ends when nobody asks any more
            self._process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, **request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it ended: the answer says why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, self._process.kill)
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            self._log.seek(0)
            answer = {"error": (self._log.read().strip().splitlines() or ["it ended without a word"])[-1]}
        if "error" in answer:
            raise ConfigError(f"--lmcache {self._python!r}: {answer['error']}; how to install: README")
        return answer


class LmcachePeer(PeerProcess):
    """Its local disk."""

    def __init__(self, python: str, folder: Path, blocks: int) -> None:
        super().__init__(python, _SCRIPT, folder, blocks=blocks)
        self.settings: list[str] = self.greeting["settings"]

    def gb_s(self, case: str, setting: str) -> float:
        return float(self._ask(case=case, setting=setting)["gb_s"])

    def damage(self) -> list[dict[str, Any]]:
        """What LMCache returned for files that were spoiled, one object per get."""
        found: list[dict[str, Any]] = self._ask(case="damage")["damage"]
        return found


class LmcacheServerPeer(PeerProcess):
    """Its own server with its own client."""

    def __init__(self, python: str, folder: Path, blocks: int, keys: int) -> None:
        super().__init__(python, _SERVER_SCRIPT, folder, blocks=blocks, keys=keys)
        self.name = f"LMCache {self.version} server"

    def seconds(self, case: str) -> float:
        """Of put, get or lookup, as LMCache's interpreter sees it: what it takes to ask is not counted."""
        return float(self._ask(case=case)["seconds"])


def value_name(case: str, setting: str) -> str:
    """Under what `bench nvme` keeps a figure of LMCache."""
    return f"lmcache {case} {setting}"


def rows(values: Mapping[str, Sequence[float]], peer: LmcachePeer | None, case: str, rounds: int) -> list[Row]:
    """LMCache's own figures, then ours (checksummed) against its best. Without a peer, ours and that it is not there."""
    middle = {name: statistics.median(found) for name, found in values.items()}
    if peer is None:
        pairs = (("write", "write_vs_lmcache"), ("read", "read_vs_lmcache"))
        return [
            Row(case, metric, middle[f"{name}_checksummed"], "GB/s", NOT_INSTALLED, rounds=rounds)
            for name, metric in pairs
        ]

    def best(name: str, kind: str = "") -> str:
        settings = (setting for setting in peer.settings if setting.startswith(kind))
        return max(settings, key=lambda setting: middle[value_name(name, setting)])

    where = {"write": "", "committed": ", each file synced by us", "read": ", cold"}
    found = []
    for name in CASES:
        metric = "lmcache_read_cold" if name == "read" else f"lmcache_{name}"
        for kind in ("buffered", "O_DIRECT"):
            setting = best(name, kind)
            note = ", ends in the page cache" if (name, kind) == ("write", "buffered") else where[name]
            said = f"LMCache {peer.version}, {setting}{note}"
            found.append(Row(case, metric, middle[value_name(name, setting)], "GB/s", said, rounds=rounds))
    compared = {
        "write_vs_lmcache": ("write", best("write", "O_DIRECT"), ""),
        "write_vs_lmcache_page_cache": ("write", best("write", "buffered"), ", ends in the page cache"),
        "committed_vs_lmcache": ("committed", best("committed"), where["committed"]),
        "read_vs_lmcache": ("read", best("read"), ", cold"),
    }
    for metric, (name, setting, note) in compared.items():
        ours, theirs = values[f"{name}_checksummed"], values[value_name(name, setting)]
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))  # of one round each
        said = f"LMCache {peer.version} LocalDiskBackend, {setting}{note}; no checksum"
        found.append(
            Row(
                case,
                metric,
                statistics.median(ours),
                "GB/s",
                said,
                statistics.median(theirs),
                ratio,
                rounds,
            )
        )
    return found


def damage_rows(version: str, seen: Sequence[Mapping[str, Any]], ours: Mapping[str, int]) -> list[Row]:
    """Spoiled blocks that were served as if they were right: ours, and LMCache's as observed."""
    found = []
    for kind, served in ours.items():
        tries = [one for one in seen if one["damage"] == kind]
        wrong = sum(one["outcome"] == "hit" and one["wrong_bytes"] > 0 for one in tries)
        said = "; ".join(dict.fromkeys(map(_observed, tries)))
        reference = f"LMCache {version}, {len(tries)} gets: {said}"
        found.append(Row(f"1 block, {kind}", "damaged_served", float(served), "hits", reference, float(wrong)))
    return found


def _observed(one: Mapping[str, Any]) -> str:
    if one["outcome"] != "hit":
        return str(one["outcome"])
    tails = {"old": ", the tail is what the buffer held before", "zeros": ", the tail is zeros", "other": ""}
    return f"{one['setting'].split(',')[0]}: hit, wrong bytes: {one['wrong_bytes']:,}{tails.get(one['tail'], '')}"
