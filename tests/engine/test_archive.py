"""A session in a file: it goes on elsewhere as if it had never left."""

from __future__ import annotations

import pytest
import zarr

from kvtier import SamplingParams
from kvtier.engine.session import Session
from kvtier.tiers.errors import ConfigError, StoreMismatchError

from .test_conversations import Served
from .test_families import stock, tiny
from .test_scheduler import check_end, config_of, open_engine, prompt_of

GREEDY = SamplingParams(max_tokens=6)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_it_goes_on_in_another_engine_without_computing_anything_again(tmp_path, family):
    from kvtier import Engine

    model, prompt = tiny(family), prompt_of(75, 1)
    first = stock(model, prompt, 6)
    wanted = stock(model, [*prompt, *first, 9], 6)
    with open_engine(model, 30) as engine:
        session = engine.session("a")
        assert session.send(prompt, GREEDY).token_ids == first
        session.export(tmp_path / "a.kvsession")
        with pytest.raises(ConfigError, match="exists already"):
            session.export(tmp_path / "a.kvsession")
    with Engine.from_model(model, config_of(model, 40), block_size=32) as engine:  # another block size
        session = Session.load(engine, tmp_path / "a.kvsession", "b", "elsewhere")
        assert session.send([9], GREEDY).token_ids == wanted
        assert engine.pager.counters.get("computed_tokens") == 1 + 1 + 5
        with pytest.raises(ConfigError, match="exists already"):
            Session.load(engine, tmp_path / "a.kvsession", "b", "elsewhere")
        session.close()
        check_end(engine)
    assert zarr.open_group(zarr.storage.ZipStore(tmp_path / "a.kvsession", mode="r"), mode="r")["token_ids"].shape == (
        81,
    )


def test_a_windowed_model_computes_its_session_again(tmp_path):
    model, prompt = tiny("gemma3"), prompt_of(60, 1)
    first = stock(model, prompt, 6)
    wanted = stock(model, [*prompt, *first, 9], 6)
    with open_engine(model, 30) as engine:
        session = engine.session("a")
        session.send(prompt, GREEDY)
        session.export(tmp_path / "a")
    with open_engine(model, 30) as engine:
        session = Session.load(engine, tmp_path / "a", "a", "default")
        assert session.num_computed == 0
        assert session.send([9], GREEDY).token_ids == wanted
        session.close()
        check_end(engine)


def test_sampling_goes_on_with_its_random_numbers(tmp_path):
    model = tiny("llama")
    seeded, later = SamplingParams(max_tokens=6, temperature=1.0, seed=4), SamplingParams(max_tokens=6, temperature=1.0)
    with open_engine(model, 30) as engine:
        session = engine.session("a")
        session.send(prompt_of(20, 1), seeded)
        session.export(tmp_path / "a")
        wanted = session.send([1], later).token_ids
    with open_engine(model, 30) as engine:
        session = Session.load(engine, tmp_path / "a", "a", "default")
        assert session.send([1], later).token_ids == wanted


def test_archives_that_are_not_ours_or_not_whole_are_refused_and_leave_nothing(tmp_path):
    model, path = tiny("llama"), tmp_path / "a"
    with open_engine(model, 30) as engine:
        session = engine.session("a")
        session.send(prompt_of(50, 1), GREEDY)
        session.export(path)
    raw = bytearray(path.read_bytes())
    (tmp_path / "cut").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "text").write_text("no archive")
    raw[raw.index(b"g0_k/c/") + 5000] ^= 1
    (tmp_path / "flipped").write_bytes(raw)
    with open_engine(model, 30) as engine:
        for name in ("cut", "text", "flipped", "nowhere"):
            with pytest.raises(ConfigError, match="is not a whole session archive"):
                Session.load(engine, tmp_path / name, "a", "default")
        check_end(engine)
    with open_engine(tiny("qwen3"), 30) as engine:
        with pytest.raises(StoreMismatchError, match="another model"):
            Session.load(engine, path, "a", "default")
        check_end(engine)


def test_conversations_export_and_import(tmp_path):
    model = tiny("llama")
    served = Served(model, tmp_path / "s")
    served.chats.create("a")
    served.say("a", prompt_of(40, 1))
    served.chats.park("a")
    served.chats.export_session("a", tmp_path / "file")
    wanted = served.say("a", [3])
    found = served.chats.import_session("b", tmp_path / "file")
    assert found.is_durable and found.tokens == 45
    assert served.say("b", [3]) == wanted
    served.close()
