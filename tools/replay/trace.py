"""Request traces: reading them, whatever their block size and gaps, and turning ids into blocks of a directory.

The format is Mooncake's, one JSON object per line, plain or gzip: `timestamp` (ms), `input_length` and `output_length`
(tokens), `hash_ids` (one per block of the prompt; equal ids mean that the prompts are equal up to the end of this block).
Only `hash_ids` must be there. `release` (ours, optional): true when the chain will not be used again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...pager.directory import Directory
from ...pager.keys import KEY_BYTES
from ...pager.policies.base import IntArray, Request
from ...pager.states import HostSlots, Pages
from ...tiers.errors import ConfigError

_USUAL_SIZES = tuple(1 << power for power in range(15))
_GAP_S = 1.0  # between requests of a trace that has no times
_MOST = 1e15  # of a time or a length, either way: far above any, and sums of it fit 64 bits
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a trace."""

    at_ms: float
    hash_ids: tuple[Any, ...]
    input_tokens: int
    output_tokens: int
    is_released: bool


@dataclass(slots=True)
class Trace:
    """Requests in order of time; `chains` hold block ids of `directory`, root first."""

    name: str
    block_tokens: int
    chains: list[IntArray]
    requests: list[Request]
    released: list[bool]
    directory: Directory
    num_blocks: int
    total_tokens: int = field(init=False)
    num_references: int = field(init=False)
    footprint: int = field(init=False)  # distinct blocks of these chains: what "%" of a capacity means

    def __post_init__(self) -> None:
        self.total_tokens = sum(one.input_tokens for one in self.requests)
        self.num_references = sum(map(len, self.chains))
        seen = np.zeros(self.num_blocks, bool)
        for chain in self.chains:
            seen[chain] = True
        self.footprint = int(seen.sum())


def read(path: Path, block_tokens: int | None = None, limit: int | None = None) -> Trace:
    """Raises: ConfigError naming the line that cannot be used."""
    lines = list(_lines(path))[:limit]
    lines.sort(key=lambda one: one.at_ms)
    return trace_of(path.name, lines, block_tokens)


def trace_of(name: str, lines: list[Recorded], block_tokens: int | None = None) -> Trace:
    """Ids become blocks of a directory, each named once."""
    size = block_tokens or _block_tokens(lines)
    directory = Directory(Pages(0), HostSlots(0))
    first_seen: dict[Any, int] = {}
    depth: list[int] = []
    for one in lines:
        for place, hash_id in enumerate(one.hash_ids):
            if hash_id not in first_seen:
                first_seen[hash_id] = len(depth)
                depth.append(place)
    blocks = directory.create(np.array(depth, np.int64), 0)
    keys = [key_of_id(hash_id) for hash_id in first_seen]
    directory.bind_many(blocks, keys, np.full(len(keys), size, np.int64))
    chains, requests = [], []
    key_of = dict(zip(first_seen, keys, strict=True))
    for one in lines:
        chain = directory.find([key_of[hash_id] for hash_id in dict.fromkeys(one.hash_ids)])
        tokens = one.input_tokens if one.input_tokens >= 0 else len(one.hash_ids) * size
        has_tail = len(one.hash_ids) * size > tokens
        chains.append(chain)
        requests.append(Request(one.at_ms / 1e3, tokens, max(0, one.output_tokens), has_tail))
    return Trace(name, size, chains, requests, [one.is_released for one in lines], directory, len(depth))


def key_of_id(hash_id: Any) -> bytes:
    """A key as the directory has them, for an id that only the trace knows."""
    return hashlib.blake2b(repr(hash_id).encode(), digest_size=KEY_BYTES).digest()


def part(trace: Trace, start: int, stop: int) -> Trace:
    """Requests start..stop-1 as a trace of its own."""
    return _with(trace, list(range(start, stop)), None)


def shuffled_starts(trace: Trace, seed: int) -> Trace:
    """Sessions begin at other times within the trace; times within each session stay as they are.

    A session is what shares a chain's second block, or its first where the first is not shared by all.
    """
    pick = random.Random(seed)
    sessions = sessions_of(trace)
    ends = max((one.now_s for one in trace.requests), default=0.0)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for session, one in zip(sessions, trace.requests, strict=True):
        first.setdefault(session, one.now_s)
        last[session] = one.now_s
    shift = {s: pick.uniform(0, max(0.0, ends - (last[s] - first[s]))) - first[s] for s in first}
    times = [one.now_s + shift[session] for session, one in zip(sessions, trace.requests, strict=True)]
    return _with(trace, sorted(range(len(times)), key=lambda i: (times[i], i)), times)


def sessions_of(trace: Trace) -> list[int]:
    """Per request the block that names its session: the first block of its chain that not most requests have."""
    users = np.zeros(trace.num_blocks, np.int64)
    for chain in trace.chains:
        users[chain] += 1
    common = users > max(2, len(trace.chains) // 10)
    found = []
    for number, chain in enumerate(trace.chains):
        own = np.flatnonzero(~common[chain[:64]])
        found.append(int(chain[own[0]]) if len(own) else -1 - number)
    return found


def _with(trace: Trace, order: list[int], times: list[float] | None) -> Trace:
    requests = [trace.requests[i] if times is None else replace(trace.requests[i], now_s=times[i]) for i in order]
    chains = [trace.chains[i] for i in order]
    released = [trace.released[i] for i in order]
    return Trace(trace.name, trace.block_tokens, chains, requests, released, trace.directory, trace.num_blocks)


def _lines(path: Path) -> Iterator[Recorded]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except FileNotFoundError as error:
        raise ConfigError(f"trace {str(path)!r} is not there; give a JSON-lines file, plain or gzip") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"trace {str(path)!r} cannot be read: {error}; give JSON lines, plain or gzip") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _recorded(line, number, path)


def _recorded(line: str, number: int, path: Path) -> Recorded:
    where = f"trace {str(path)!r} line {number}"
    try:
        one = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    ids = one.get("hash_ids") if isinstance(one, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, int | str) for i in ids):
        raise ConfigError(
            f"{where}: hash_ids={ids!r:.60} must be a list of numbers or strings; kvtier replay --convert makes them of tokens"
        )
    at_ms = number_of(one, "timestamp", (number - 1) * _GAP_S * 1e3, where)
    tokens, output = number_of(one, "input_length", -1, where), number_of(one, "output_length", 0, where)
    return Recorded(at_ms, tuple(ids), int(tokens), int(output), one.get("release") is True)


def number_of(one: dict[str, Any], name: str, default: float, where: str) -> float:
    """Raises: ConfigError naming the line."""
    value = one.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST <= value <= _MOST:
        raise ConfigError(f"{where}: {name}={value!r:.60} must be a finite number, at most {_MOST:g}")
    return value


def _block_tokens(lines: list[Recorded]) -> int:
    """The usual block size that fits most chains: tokens are within one block of blocks x size."""
    whole = [one for one in lines if one.input_tokens > 0 and one.hash_ids]
    longest = sorted(whole, key=lambda one: len(one.hash_ids))[-256:]
    if not longest:
        return 512

    def fits(size: int) -> int:
        return sum(abs(one.input_tokens - len(one.hash_ids) * size) < size for one in longest)

    return max(_USUAL_SIZES, key=fits)
