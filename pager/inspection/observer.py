"""Observer: what is remembered of traffic for those who look later. Look-ups, ghosts that were asked for, requests.

Fed by one call where a prompt is matched, one where a sequence ends and one where a request is answered, under the
pager's lock. Everything is bounded. Holds tags of keys and counts; no token id stays here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...tiers.owners import owner_tag
from .events import EventRing, tags_of
from .recorder import Recorder
from .reuse import ReuseSampler

if TYPE_CHECKING:
    from ..accounting import Ghosts
    from ..page_table import Sequence
    from ..prefix import Match
    from .requests import Copy

Owns = Callable[[npt.NDArray[Any]], npt.NDArray[np.bool_]]  # which of these tags are the asker's namespaces
OnAnswered = Callable[["RequestRecord", "list[Copy]", float], None]  # its copies; when it ended, of the pager's clock
MAX_LOOKUPS, MAX_REQUESTS, MAX_GHOST_HITS, MAX_TURNED_AWAY = 4096, 1024, 8192, 256
HEAD_BLOCKS = 16  # of each look-up, to notice that prompts begin differently than they did


@dataclass(frozen=True, slots=True)
class Lookup:
    """A prompt that was matched: sizes in tokens, the tags of its first blocks."""

    time_s: float
    namespace: str
    session_id: str | None
    seq: int
    tokens: int
    hit_tokens: int
    ghost_tokens: int
    head: npt.NDArray[np.uint32]
    is_turn: bool = False  # of a conversation that goes on


@dataclass(frozen=True, slots=True)
class GhostHit:
    """Tokens that were asked for and had been evicted, by who asked, the tier that they left last, and why."""

    time_s: float
    namespace: str
    session_id: str | None
    seq: int
    tier: str
    reason: str
    tokens: int
    age_s: float  # since the eviction, of the youngest


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """An answered request: where its time to first token went, in seconds by phase, and what the cache gave."""

    number: int
    name: str  # as its client knows it; may be empty
    namespace: str
    session_id: str | None
    started_s: float  # of the pager's clock
    outcome: str
    lines_s: dict[str, float]
    usage: dict[str, float]
    copies_s: dict[str, float] = field(default_factory=dict)  # of its blocks until its first token, by direction
    copied_bytes: dict[str, int] = field(default_factory=dict)


class Observer:
    """Of one pager."""

    def __init__(self, block_size: int, ghosts: Ghosts, clock: Callable[[], float]) -> None:
        self.clock, self.block_size, self._ghosts = clock, block_size, ghosts
        self.started_s = clock()
        self.events = EventRing(clock)
        self.lookups: deque[Lookup] = deque(maxlen=MAX_LOOKUPS)
        self.ghost_hits: deque[GhostHit] = deque(maxlen=MAX_GHOST_HITS)
        self.requests: deque[RequestRecord] = deque(maxlen=MAX_REQUESTS)
        self.turned_away: deque[tuple[float, int]] = deque(
            maxlen=MAX_TURNED_AWAY
        )  # clients' asking for room: when, group
        self.num_lookups = self.num_requests = 0
        self.on_answered: OnAnswered | None = None
        self.reuse = ReuseSampler()
        self.recorder = Recorder(clock)

    def asked(self, seq: Sequence, num_tokens: int, match: Match, *, is_turn: bool = False) -> None:
        """A prompt of so many tokens was matched; `seq.keys` holds the keys of its whole blocks."""
        now_s = self.clock()
        keys = seq.keys[: num_tokens // self.block_size]
        tags = tags_of(keys)
        lookup = Lookup(
            now_s,
            seq.namespace,
            seq.session_id,
            seq.id,
            num_tokens,
            match.tokens,
            match.ghost_tokens,
            tags[:HEAD_BLOCKS].copy(),
            is_turn,
        )
        self.lookups.append(lookup)
        self.num_lookups += 1
        self.reuse.used(tags, now_s)
        if match.ghost_tokens:
            self._count_ghosts(lookup, keys[match.tokens // self.block_size :])
        self.recorder.asked(seq.id, len(seq.token_ids), keys)

    def looked_up(
        self,
        namespace: str,
        owns: Owns,
        keys: list[bytes],
        missed: list[bytes],
        num_tokens: int,
        hit_tokens: int,
        *,
        is_turn: bool = False,
    ) -> int:
        """A request of so many tokens, of which the keys of whole blocks are known here; returns tokens of ghosts.

        What others have had must not show, not even in time: keys are sampled under the asker's name, and a ghost of
        somebody else's block counts as no ghost.
        """
        now_s, tags = self.clock(), tags_of(keys)
        self.reuse.used(tags ^ np.uint32(owner_tag(namespace)), now_s)
        owners = self._ghosts.owners(missed)
        is_ghost = (owners >= 0) & owns(owners)  # behind gaps too: not every block of a chain reaches a daemon
        ghosts = int(is_ghost.sum()) * self.block_size
        head = tags[:HEAD_BLOCKS].copy()
        self.lookups.append(Lookup(now_s, namespace, None, 0, num_tokens, hit_tokens, ghosts, head, is_turn))
        self.num_lookups += 1
        if ghosts:
            self._count_ghosts(self.lookups[-1], [missed[i] for i in np.flatnonzero(is_ghost).tolist()])
        return ghosts

    def ended(self, seq: Sequence) -> None:
        """The sequence is going: whatever it has beyond its prompt was its output."""
        self.recorder.ended(seq.id, len(seq.token_ids))

    def answered(self, **fields: Any) -> RequestRecord:
        """A request has ended."""
        self.num_requests += 1
        record = RequestRecord(self.num_requests, **fields)
        self.requests.append(record)
        return record

    def _count_ghosts(self, lookup: Lookup, keys: list[bytes]) -> None:
        found: dict[tuple[str, str], tuple[int, float]] = {}
        for key in keys[: lookup.ghost_tokens // self.block_size]:  # only what missed after an eviction
            ghost = self._ghosts.get(key)
            if ghost is not None:
                count, latest_s = found.get((ghost.tier, ghost.reason), (0, 0.0))
                found[ghost.tier, ghost.reason] = count + 1, max(latest_s, ghost.evicted_s)
        who = (lookup.time_s, lookup.namespace, lookup.session_id, lookup.seq)
        for (tier, reason), (count, latest_s) in found.items():
            hit = GhostHit(*who, tier, reason, count * self.block_size, lookup.time_s - latest_s)
            self.ghost_hits.append(hit)
