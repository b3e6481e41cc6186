"""Text that comes token by token is the text that comes at once: whole characters, cut before the first stop text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from kvtier.engine.sampling import TokenLogprob
from kvtier.engine.server.text import Detokenizer, StopFinder, TextStream
from kvtier.engine.server.token_bytes import TokenBytes

from ..tools.test_chat import make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = st.text(st.sampled_from("ab the fox 0é€𝄞\n"), max_size=40)


class Sentencepiece:
    """Pieces with a mark for spaces and byte tokens, as Llama-2's tokenizer has them."""

    def __init__(self) -> None:
        words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "▁fox", "o", "▁"]
        raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
        strip = decoders.Strip(" ", 1, 0)
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
        self._raw, self.size = raw, len(words)

    def decode(self, ids, **_) -> str:
        return self._raw.decode(ids)


@given(TEXTS, st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_pieces_add_up_to_the_text_of_all_tokens(text, noise):
    for ids in (TOKENIZER(text)["input_ids"], noise):
        stream = Detokenizer(TOKENIZER)
        joined = "".join(stream.push(token) for token in ids)
        whole = TOKENIZER.decode(ids, skip_special_tokens=True)
        assert joined.rstrip("\ufffd") == whole.rstrip("\ufffd") and whole.startswith(joined)


@given(TEXTS)
def test_no_piece_holds_a_broken_character(text):
    stream = Detokenizer(TOKENIZER)
    assert "\ufffd" not in "".join(stream.push(token) for token in TOKENIZER(text)["input_ids"])


def test_spaces_and_byte_tokens_of_other_tokenizers_come_out_right():
    pieces = Sentencepiece()
    euro = [1 + byte for byte in "€".encode()]
    ids = [257, 258, *euro, 258, 259, *euro] * 9
    stream = Detokenizer(pieces)
    shown = [stream.push(token) for token in ids]
    assert "".join(shown) == pieces.decode(ids) and not any("\ufffd" in one for one in shown)
    go_on = Detokenizer(pieces, [257])
    assert go_on.push(258) == " fox"  # the first word of a continuation keeps its space


def _cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: what stands before the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_however_text_is_cut_it_ends_before_the_first_stop_text(text, stops, sizes):
    finder, shown, at = StopFinder(stops), "", 0
    wanted, is_found = _cut(text, stops)
    for size in sizes:
        shown += finder.push(text[at : at + size])
        at += size
        assert wanted.startswith(shown)  # nothing of a stop text was shown, ever
    assert finder.is_found == is_found
    assert shown + finder.rest() == wanted


def test_log_probabilities_keep_step_with_the_text():
    ids = TOKENIZER("the fox jumps")["input_ids"]
    stream = TextStream(TOKENIZER, ["jum"])
    logged, text = [], ""
    for token in ids:
        piece = stream.push(token, TokenLogprob(token, -1.0, ()))
        text, logged = text + piece.text, [*logged, *piece.logged]
        if stream.is_stopped:
            break
    text += stream.finish().text
    assert text == "the fox "
    shown = TOKENIZER.decode([one.entry.token for one in logged])
    assert "jum" not in shown and text.startswith(shown.rstrip())
    assert [one.start for one in logged] == sorted(one.start for one in logged)


@pytest.mark.parametrize("text", ["the", "é", "€"])
def test_tokens_are_named_by_their_bytes(text):
    tokens = TokenBytes(TOKENIZER)
    found = [tokens.of(token) for token in TOKENIZER(text)["input_ids"]]
    assert bytes(byte for _, raw in found for byte in raw) == text.encode()
