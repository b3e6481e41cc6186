"""Documents of a prefix cache in any order, each from what it was when it stood alone: the public side of `chunks.py`.

Approximate, and said so; `load` and `store` never see what is put together here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tiers.errors import ConfigError
from .prefix_ids import TokenIds, ids_of

if TYPE_CHECKING:
    from .chunks import ChunkError, KeyTurner

LOAD_TIMEOUT_S = 60.0


class PrefixChunks:
    """Of a PrefixCache."""

    _model: Any
    _spec: Any
    _turner: KeyTurner | None = None  # made when chunks are first asked for

    def load(
        self, token_ids: TokenIds, *, leave_last: bool = True, timeout_s: float = LOAD_TIMEOUT_S
    ) -> tuple[int, Any]:
        raise NotImplementedError

    def store(self, token_ids: TokenIds, past: Any) -> int:
        raise NotImplementedError

    def load_chunks(
        self, chunks: Sequence[TokenIds], *, recompute_first: int = 0, timeout_s: float = LOAD_TIMEOUT_S
    ) -> tuple[int, Any]:
        """A past of these documents, one behind the other in this order, from what each was when it stood alone.

        Approximate: a document's tokens saw nothing of those before it (the first document is exact). `recompute_first`
        tokens of every later one are computed again, with all before them in sight. A document that is not stored is
        computed and stored. Returns the number of tokens and the past; `chunk_error` says what it is worth.
        Raises: UnsupportedModelError for a model whose keys cannot be moved; ConfigError for a cache opened by layout.
        """
        ids = [ids_of(chunk) for chunk in chunks]
        _, past = self._join(ids, recompute_first, timeout_s)
        return sum(map(len, ids)), past

    def chunk_error(
        self,
        chunks: Sequence[TokenIds],
        question: TokenIds,
        *,
        recompute_first: int = 0,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> ChunkError:
        """What load_chunks changes in the answers to this question, against computing the whole prompt. Computes it."""
        from .chunks import measure

        ids = [ids_of(chunk) for chunk in chunks]
        computed, past = self._join(ids, recompute_first, timeout_s)
        return measure(self._model, past, computed, [t for chunk in ids for t in chunk], ids_of(question))

    def _join(self, chunks: list[list[int]], recompute_first: int, timeout_s: float) -> tuple[int, Any]:
        from .chunks import KeyTurner, check_chunks, join_chunks

        check_chunks(chunks, recompute_first)
        if self._model is None:
            raise ConfigError("load_chunks: this cache was opened by layout; moving keys needs a model")
        if self._turner is None:
            self._turner = KeyTurner(self._model, self._spec)
        computed, past = join_chunks(
            self._model, self._turner, chunks, lambda ids: self._chunk(ids, timeout_s), recompute_first
        )
        past.kvtier_chunks = len(chunks)  # type: ignore[attr-defined]  # store refuses it
        return computed, past

    def _chunk(self, ids: list[int], timeout_s: float) -> Any:
        """A past of exactly these tokens, computed and stored as far as it is not there."""
        from .chunks import run

        loaded, past = self.load(ids, leave_last=False, timeout_s=timeout_s)
        if loaded < len(ids):
            run(self._model, past, ids[loaded:])
            self.store(ids, past)
        return past
