"""Look-ups on the books: what a request found when it came, once per request. Hits by the tier that held them, misses, ghosts.

A request is a prompt that is matched, or a further turn of a sequence that is open or was resumed. What turns up later
(somebody else computed it meanwhile, or a lost block is found again) is no look-up and counts nowhere, so hits and misses
add up to the tokens that were asked for. A request is also one use, as policies count. Changes no table; whoever matches
calls `count_lookup` afterwards.
"""

from __future__ import annotations

import numpy as np

from .core import Core
from .page_table import Sequence
from .prefix import Match, adopt, residency

TIERS = ("device", "host", "nvme")


def count_lookup(core: Core, seq: Sequence, num_tokens: int, match: Match, *, is_turn: bool = False) -> None:
    """`num_tokens` of the sequence were asked for, `match` of them found. The lock is held; `seq.keys` names their blocks."""
    if num_tokens <= 0:
        return
    note_found(core, match, num_tokens)
    core.observer.asked(seq, num_tokens, match, is_turn=is_turn)


def note_found(core: Core, match: Match, num_tokens: int) -> None:
    """The counters alone, for whoever looks up by keys."""
    for tier in TIERS:
        core.counters.add("hit_tokens", getattr(match, f"{tier}_tokens"), tier=tier)
    core.counters.add("miss_tokens", max(0, num_tokens - match.tokens))
    core.counters.add("ghost_tokens", match.ghost_tokens)


def begin_turn(core: Core, seq: Sequence) -> Match:
    """The sequence has new tokens behind what it has computed: match and count what the cache has of all but the last.

    After a resume, what is reused counts for the tier where the resume found it: its blocks are on their way up since.
    """
    size, asked = core.block_size, max(0, len(seq.token_ids) - 1)
    if seq.resumed is None:
        _begin_request(core, seq)
    found = seq.resumed if seq.resumed is not None else residency(core, seq)
    seq.resumed = None
    seq.chain.extend(seq.keys, seq.token_ids[: asked // size * size])
    found += adopt(core, seq, asked)
    count_lookup(core, seq, asked, found, is_turn=True)
    return found


def _begin_request(core: Core, seq: Sequence) -> None:
    """Policies count a use per request: here, of what an open sequence has, as `adopt` and a resume do of what they find."""
    for group, table in zip(core.groups, seq.tables, strict=True):
        held = np.flatnonzero(table.ids >= 0)
        if len(held):
            group.touch_chain(table.ids[held], held)
