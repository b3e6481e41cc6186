"""Speculative decoding: a drafter proposes the next tokens, one forward proves them all, what is wrong is rolled back.

The target's own choice at every place decides: a draft token counts only when it is what the sampler chooses there, with
the same random numbers, so the output is the one without speculation, greedy or sampled.
Sources: prompt lookup decoding (Saxena, 2023); draft models (Leviathan et al., 2023), with sampling replaced by
comparing with the target's own draw.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from ..tiers.errors import ConfigError, KvTierError

if TYPE_CHECKING:
    from ..pager.pager import Pager
    from .engine import Engine
    from .sampling import SamplingParams

_LOG = logging.getLogger("kvtier.engine")


class Drafter(Protocol):
    """Proposes what may follow a sequence."""

    def propose(self, seq: int, limit: int) -> list[int]:
        """At most `limit` tokens, possibly none."""
        ...

    def close(self) -> None: ...


class NgramDrafter:
    """What followed the last n tokens when they came up before in the same sequence; of one request.

    Cost: one dictionary entry per token and n-gram length.
    """

    def __init__(self, pager: Pager, *, longest: int = 3, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError(f"n-gram drafter: longest={longest}, shortest={shortest}: need 1 <= shortest <= longest")
        self._pager, self._lengths = pager, range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it begins
        self._tokens: list[int] = []

    def propose(self, seq: int, limit: int) -> list[int]:
        self._learn(seq)
        for n in self._lengths:
            start = self._after.get(tuple(self._tokens[-n:]))
            if start is not None and len(self._tokens) >= n:
                return self._tokens[start : start + limit]
        return []

    def _learn(self, seq: int) -> None:
        """Every n-gram but the last one, which nothing has followed yet."""
        known = len(self._tokens)
        self._tokens += self._pager.token_ids(seq, known)
        for end in range(max(1, known), len(self._tokens)):
            for n in self._lengths:
                if end >= n:
                    self._after[tuple(self._tokens[end - n : end])] = end

    def close(self) -> None:
        pass


class ModelDrafter:
    """A smaller model with the same vocabulary, over an engine of its own; of one request.

    Where that engine has no room for the context, or fails, it proposes nothing any more: the request goes on without drafts.
    """

    def __init__(self, target: Pager, engine: Engine, namespace: str = "default") -> None:
        self._target, self._engine = target, engine
        self._seq = engine.pager.begin(namespace)
        self._has_failed = False

    def propose(self, seq: int, limit: int) -> list[int]:
        if self._has_failed:
            return []
        pager = self._engine.pager
        wanted, known = self._target.token_ids(seq), pager.token_ids(self._seq)
        same = next(
            (i for i, (a, b) in enumerate(zip(wanted, known, strict=False)) if a != b), min(len(wanted), len(known))
        )
        same = min(same, len(wanted) - 1)
        pager.truncate(self._seq, same)
        pager.append(self._seq, wanted[same:])
        try:
            return self._engine.extend(self._seq, limit)
        except KvTierError as error:
            self._has_failed = True
            _LOG.warning("event=drafter_failed tokens=%d reason=%r", len(wanted), str(error))
            pager.truncate(self._seq, 0)  # its blocks are room for the drafts of others
            return []

    def close(self) -> None:
        self._engine.pager.finish(self._seq)


class Drafters:
    """Makes the drafter that a request asks for; of one engine. `draft` is the engine of the smaller model, if any."""

    def __init__(self, pager: Pager, draft: Engine | None) -> None:
        self._pager, self._draft = pager, draft

    def check(self, params: SamplingParams) -> None:
        """Raises ConfigError where a draft model is asked for and there is none."""
        if params.speculation == "model" and self._draft is None:
            raise ConfigError("speculation='model' needs an engine with a draft model; open it with draft=...")

    def make(self, params: SamplingParams, namespace: str) -> Drafter | None:
        """None without speculation. Raises as check does."""
        self.check(params)
        if params.speculation == "ngram":
            return NgramDrafter(self._pager)
        if params.speculation == "model":
            assert self._draft is not None
            return ModelDrafter(self._pager, self._draft, namespace)
        return None
