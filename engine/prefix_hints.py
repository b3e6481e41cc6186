"""Hints to a prefix cache: what somebody knows of a prompt's future. They move blocks or let them leave, and change no result.

`pin` is not here: it holds, so it is a promise and no hint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from .prefix_ids import TokenIds, ids_of

if TYPE_CHECKING:
    from ..pager.pager import Pager


class PrefixHints:
    """Of a PrefixCache."""

    _pager: Pager
    _namespace: str

    def _call(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def release(self, token_ids: TokenIds) -> int:
        """This prompt is not asked for again: what only it uses is the first to leave every tier. Returns its stored tokens.

        What other stored prompts begin with too (a system prompt, a document) stays.
        """
        with self._call():
            seq, tokens = self._find(token_ids)
            self._pager.release(seq)
        return tokens

    def prefetch(self, token_ids: TokenIds) -> int:
        """Start to bring a prompt's stored blocks up, into room that nobody uses. Returns how many copies were started."""
        with self._call():
            seq, _ = self._find(token_ids)
            try:
                return self._pager.prefetch(seq, for_anybody=True)
            finally:
                self._pager.finish(seq)

    def _find(self, token_ids: TokenIds) -> tuple[int, int]:
        """A sequence over what is stored of a prompt, and its tokens."""
        seq = self._pager.begin(self._namespace)
        try:
            return seq, self._pager.attach(seq, ids_of(token_ids), with_tail=True, count=False).tokens
        except BaseException:
            self._pager.finish(seq)
            raise
