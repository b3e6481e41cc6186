"""Text out of tokens, as they come: whole characters only, never a part of a stop text, log probabilities in step.

One TextStream per output; the engine's thread feeds it. Joined, the pieces are what decoding all tokens at once gives,
cut before the stop text that is complete first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..sampling import TokenLogprob

_BROKEN = "\ufffd"  # what a decoder says for bytes that are no character, or not yet one
_MAX_BYTES_WAITING = 3  # of a character of four
_WINDOW_TOKENS, _CONTEXT_TOKENS = 16, 4


class Detokenizer:
    """Text of tokens that come one by one. The end of a character that is not complete is held back.

    A token's text depends on its neighbours (spaces, characters of several tokens), so a window of the last ones is
    decoded each time; `context` is what stands before the first one.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._done = self._decode(self._window)
        if self._done.endswith(_BROKEN):
            self._window, self._done = [], ""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = min(len(text) - len(text.rstrip(_BROKEN)), _MAX_BYTES_WAITING)
        sure = text[: len(text) - waiting]
        new, self._done = sure[len(self._done) :], max(self._done, sure, key=len)
        if not waiting and len(self._window) >= _WINDOW_TOKENS:
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._done = self._decode(self._window)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopFinder:
    """Lets text through up to the stop text that is complete first; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """What may be shown now."""
        if self.is_found or not self._stops:
            return "" if self.is_found else text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and became nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop text, the whole one left out."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token's log probabilities, with where its text starts in the output (characters)."""

    entry: TokenLogprob
    start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and the tokens that it consists of when log probabilities were asked for."""

    text: str = ""
    logged: tuple[LoggedToken, ...] = ()


class TextStream:
    """Tokens of one output in, pieces out."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[str], hidden: frozenset[int] = frozenset(), context: Sequence[int] = ()
    ) -> None:
        """`hidden`: tokens that end an answer and are not part of its text."""
        self._detokenizer, self._stops = Detokenizer(tokenizer, context), StopFinder(stops)
        self._hidden = hidden
        self._waiting: deque[tuple[LoggedToken, int]] = deque()  # with where each one's text ends
        self._num_decoded = self._num_shown = 0

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_found

    def push(self, token: int, logprob: TokenLogprob | None) -> Piece:
        start = self._num_decoded
        text = "" if token in self._hidden else self._detokenizer.push(token)
        self._num_decoded += len(text)
        if logprob is not None:
            self._waiting.append((LoggedToken(logprob, start), self._num_decoded))
        return self._show(self._stops.push(text))

    def finish(self) -> Piece:
        """The output is complete: what was held back for a stop text is let go. An unfinished character is not."""
        rest = self._show(self._stops.rest())
        if self.is_stopped:
            return rest
        logged = tuple(one for one, _ in self._waiting)
        self._waiting.clear()
        return Piece(rest.text, rest.logged + logged)

    def _show(self, text: str) -> Piece:
        self._num_shown += len(text)
        logged = []
        while self._waiting and self._waiting[0][1] <= self._num_shown:
            one, _ = self._waiting[0]
            if self.is_stopped and one.start >= self._num_shown:
                break  # a token without text behind the end
            logged.append(one)
            self._waiting.popleft()
        return Piece(text, tuple(logged))
