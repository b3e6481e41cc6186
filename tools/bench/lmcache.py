"""LMCache beside the store in `bench nvme`: another interpreter runs lmcache_peer.py and is asked for one case at a time.

Its settings are all tried in every round and the best of each case counts. Without it, the rows say that it is not
installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import Row
from .peer_process import PeerProcess

NOT_INSTALLED = "LMCache is not installed: pass --lmcache PYTHON; how to install: docs/peers.md"
CASES = ("write", "committed", "read")
_SCRIPT = Path(__file__).with_name("lmcache_peer.py")
_SERVER_SCRIPT = Path(__file__).with_name("lmcache_server_peer.py")


class LmcachePeer(PeerProcess):
    """Its local disk."""

    def __init__(self, python: str, folder: Path, blocks: int) -> None:
        super().__init__("--lmcache", python, _SCRIPT, folder, blocks=blocks)
        self.version: str = self.greeting["lmcache"]
        self.block_bytes: int = self.greeting["block_bytes"]
        self.settings: list[str] = self.greeting["settings"]

    def gb_s(self, case: str, setting: str) -> float:
        return float(self.ask(case=case, setting=setting)["gb_s"])

    def damage(self) -> list[dict[str, Any]]:
        """What LMCache returned for files that were spoiled, one object per get."""
        found: list[dict[str, Any]] = self.ask(case="damage")["damage"]
        return found


class LmcacheServerPeer(PeerProcess):
    """Its own server with its own client."""

    def __init__(self, python: str, folder: Path, blocks: int, keys: int) -> None:
        super().__init__("--lmcache", python, _SERVER_SCRIPT, folder, blocks=blocks, keys=keys)
        self.name = f"LMCache {self.greeting['lmcache']} server"

    def seconds(self, case: str) -> float:
        """Of put, get or lookup, as LMCache's interpreter sees it: what it takes to ask is not counted."""
        return float(self.ask(case=case)["seconds"])


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
