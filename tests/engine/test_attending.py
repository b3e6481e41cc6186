"""What a request may ask of its attention, and what is refused by name."""

from __future__ import annotations

import pytest

from kvtier import Engine, SamplingParams
from kvtier.engine.attending import Attention, SelectionReport
from kvtier.tiers.errors import ConfigError

from .test_families import small_config, tiny


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("full", Attention()),
        ("window:4096", Attention("window", window=4096)),
        ("window:64, sinks=0", Attention("window", window=64, sinks=0)),
        ("select", Attention("select")),
        ("select:8,recall=0.99", Attention("select", pages=8, recall=0.99)),
    ],
)
def test_text_says_how(text, wanted):
    assert Attention.parse(text) == wanted == Attention.parse(wanted)
    assert SamplingParams(attention=text).attention == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", "choose full"),
        ("full:3", "takes no numbers"),
        ("select:32,sinks=64", "take sinks out"),
        ("window:128,recall=0.9", "proves no recall"),
        ("window", "window >= 1"),
        ("window:0", "window >= 1"),
        ("window:9,sinks=-1", "sinks=-1"),
        ("select:2", "at least 3"),
        ("select:8,recall=1", "recall=1"),
        ("select:8,best", "'best' is not"),
        ("select:many", "'many' is not a number"),
        (7, "give text"),
    ],
)
def test_what_it_cannot_be_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        Attention.parse(text)


def test_drafts_and_beams_want_exact_attention():
    for other in (dict(speculation="ngram"), dict(num_beams=2)):
        with pytest.raises(ConfigError, match="use attention='full'"):
            SamplingParams(attention="select:8", **other)
        assert SamplingParams(attention="full", **other).attention == Attention()


def test_an_engine_without_the_memory_for_it_says_what_to_give():
    model = tiny("llama")
    with Engine.from_model(model, small_config(model, 30), block_size=16) as engine:
        with pytest.raises(ConfigError, match="selection_bytes"):
            engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, attention="select:8"))
        assert not engine.pager._core.sequences
    with pytest.raises(ConfigError, match=r"selection_bytes=1\.0 KiB holds fewer"):
        Engine.from_model(model, small_config(model, 30, selection_bytes=1024), block_size=16)
    with pytest.raises(ConfigError, match=r"device_bytes=\d+\.\d KiB holds 0 blocks"):
        config = small_config(model, 12)
        Engine.from_model(model, small_config(model, 12, selection_bytes=config.device_size), block_size=16)


def test_a_report_adds_up():
    report = SelectionReport(pages_read=2, pages_total=100)
    report.note_bound(0.5, 0.25)
    report.note_bound(0.1, 0.05)
    assert report.to_dict()["left_out_bound"] == 0.5 and report.left_out_mean == pytest.approx(0.15)
    report.note_bound(float("nan"), float("nan"))
    assert report.left_out_bound == 1.0, "a bound that is no number was told as nothing left out"
    assert report.share_read == 0.02 and SelectionReport().share_read == 1.0
