"""A history that was rendered again: where it parts from what it was, and why."""

from __future__ import annotations

import pytest

from kvtier.engine.reuse import explain_break


class Letters:
    """Token ids of letters and of pairs of them, so that one text has many tokenizations."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(t) if t < 1000 else chr(t // 1000) + chr(t % 1000) for t in token_ids)


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


def paired(text: str) -> list[int]:
    return [ord(a) * 1000 + ord(b) for a, b in zip(text[::2], text[1::2], strict=True)]


def test_a_history_that_goes_on_is_no_break():
    assert explain_break(ids("abc"), ids("abcdef"), Letters()) is None
    assert explain_break([], ids("abc"), Letters()) is None
    assert explain_break(ids("abc"), ids("abc")) is None


@pytest.mark.parametrize(
    ("before", "now", "at", "reason"),
    [
        (ids("Hello, ") + paired("how are you today "), ids("Hello, how are you today "), 7, "retokenized"),
        (ids("system. first turn. second turn."), ids("system. second turn."), 8, "history_shortened"),
        (ids("a long history"), ids("a long"), 6, "history_shortened"),
        (ids("It is Monday. Hello there, friend."), ids("It is Sunday. Hello there, friend."), 6, "history_changed"),
    ],
)  # fmt: skip
def test_the_first_token_that_differs_and_the_reason(before, now, at, reason):
    found = explain_break(before, now, Letters())
    assert (found.at, found.reason) == (at, reason) and found.explanation
