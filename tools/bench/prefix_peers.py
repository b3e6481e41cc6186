"""vLLM's KVCacheManager and SGLang's radix trees beside the pager's prefix look-up, in rounds of `bench metadata`.

Each runs in an interpreter of its own (vllm_peer.py, sglang_peer.py) and times itself, so that asking is not counted; all
look for the same prompt, which they hold. A peer that nobody named is a row that says how to have it. What they do is not
the same: our keys and vLLM's name content to other processes and tiers, a tree compares tokens within its own process.

`first` is a cached prompt that the pager has not hashed before; `new` is one that it has, for it cached it. vLLM hashes each
request, a tree never hashes, so to them both are one. `turn` is a known prompt and as much behind it as a new turn has. All
get a list of token ids, SGLang the array that its scheduler gets; so do we in `array`. `known`: the keys are there, and
tokens no longer looked at. `missing`: the first block already is not held; vLLM hashes the others all the same.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from .harness import Row
from .peer_process import PeerProcess

CASES = {
    "first": "look-up from tokens, never hashed here",
    "new": "look-up from tokens",
    "array": "look-up from tokens in an array",
    "turn": "look-up from tokens, and a new turn",
    "known": "look-up again",
    "missing": "look-up, nothing cached",
}
TURN_TOKENS = 1024
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
NOT_INSTALLED = "{} is not installed: pass --{} PYTHON; how to install: docs/peers.md"
WARMUP = 2
_Seconds = defaultdict[tuple[str, str], list[float]]


class PrefixPeer(PeerProcess):
    """One of them, with every setting that it offers."""

    def __init__(self, kind: str, python: str, folder: Path, tokens: int, block_size: int) -> None:
        script = Path(__file__).with_name(f"{kind}_peer.py")
        super().__init__(f"--{kind}", python, script, folder / kind, tokens=tokens, block_size=block_size)
        self.settings: list[str] = self.greeting["settings"]
        self._note: str = self.greeting["note"]
        self._name = f"{NAMES[kind]} {self.greeting['version']}"

    def seconds(self, case: str, setting: str) -> float:
        return float(self.ask(case=case, setting=setting)["seconds"])

    def said(self, setting: str) -> str:
        return f"{self._name}, {setting}{self._note}"


def run(
    pythons: Mapping[str, str | None],
    ours: Mapping[str, Callable[[], object]],
    tokens: int,
    block_size: int,
    rounds: int,
) -> list[Row]:
    """Rows of every case of `ours`, named as in CASES. Raises: ConfigError for an interpreter that has not the peer."""
    with TemporaryDirectory(prefix="kvtier-peers-") as folder, ExitStack() as stack:
        peers = [
            stack.enter_context(PrefixPeer(kind, python, Path(folder), tokens, block_size))
            for kind, python in pythons.items()
            if python
        ]
        seconds = _measure(ours, peers, rounds)
    case, scale = f"{tokens} tokens, block {block_size}", 1e9 * block_size / tokens
    found = []
    for name, metric in CASES.items():
        middle = {who: median(spent) for (which, who), spent in seconds.items() if which == name}
        mine = middle.pop("")
        for said, theirs in middle.items():
            found.append(Row.of_times(case, metric, "ns/block", mine, said, theirs, scale, rounds))
        for kind, python in pythons.items():
            if not python:
                said = NOT_INSTALLED.format(NAMES[kind], kind)
                found.append(Row(case, metric, mine * scale, "ns/block", said, rounds=rounds))
    return found


def _measure(ours: Mapping[str, Callable[[], object]], peers: list[PrefixPeer], rounds: int) -> _Seconds:
    """Seconds by case and who; ours is "". All take turns within a round."""
    seconds: _Seconds = defaultdict(list)
    for number in range(WARMUP + rounds):
        for name in CASES:
            took = {"": _timed(ours[name])}
            for peer in peers:
                took |= {peer.said(setting): peer.seconds(name, setting) for setting in peer.settings}
            for who, spent_s in took.items() if number >= WARMUP else ():
                seconds[name, who].append(spent_s)
    return seconds


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
