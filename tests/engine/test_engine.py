"""What the engine promises beyond tokens: one sequence per session, honest usage, an untouched model."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from kvtier import Engine, PagerConfig, SamplingParams
from kvtier.engine import request
from kvtier.engine.attention import NAME
from kvtier.engine.hf import discover
from kvtier.tiers.errors import ConfigError, TierUnavailableError

from .test_families import prompts, small_config, stock, tiny


def open_engine(model, blocks=30, **settings) -> Engine:
    return Engine.from_model(model, small_config(model, blocks, **settings), block_size=16, max_batch_tokens=48)


def test_a_session_id_names_one_sequence():
    with open_engine(tiny("llama")) as engine:
        session = engine.session("a")
        assert engine.session("a") is session
        session.send([1, 2, 3], SamplingParams(max_tokens=2))
        session.park()
        assert engine.session("a") is session and not session.is_parked
        assert [child.id for child in session.fork(2)] == ["a/1", "a/2"]
        assert session.fork()[0].id == "a/3"
        session.close()
        with pytest.raises(ConfigError, match="was closed"):
            session.send([1])
        again = engine.session("a")
        assert again is not session
        session.close()  # a second time: the id is somebody else's now
        assert engine.session("a") is again
        with pytest.raises(ConfigError, match="namespace"):
            engine.session("a/1", namespace="other")


def test_a_turn_that_fails_leaves_the_session_as_it_was():
    model, prompt = tiny("llama"), prompts()[1]
    wanted = stock(model, [*prompt, *stock(model, prompt, 4), 9], 4)

    def fail(token: int) -> None:
        raise ValueError(token)

    with open_engine(model) as engine:
        session = engine.session("a")
        session.send(prompt, SamplingParams(max_tokens=4))
        before = session.token_ids
        for speculation in (None, "ngram"):
            with pytest.raises(ValueError):
                session.send([9], SamplingParams(max_tokens=4, speculation=speculation), on_token=fail)
            assert session.token_ids == before
        assert session.send([9], SamplingParams(max_tokens=4)).token_ids == wanted
        engine.pager.check_integrity()


@pytest.mark.parametrize("refused", [dict(attention="select:8"), dict(speculation="model")])
def test_a_message_that_is_refused_was_never_said(refused):
    model, prompt = tiny("llama"), prompts()[1]
    wanted = stock(model, [*prompt, *stock(model, prompt, 4), 9], 4)
    with open_engine(model) as engine:
        session = engine.session("a")
        for message in ([9] * 10, [8] * 20):  # to an empty session, too
            with pytest.raises(ConfigError):
                session.send(message, SamplingParams(max_tokens=4, **refused))
            assert session.token_ids == []
        session.send(prompt, SamplingParams(max_tokens=4))
        before, counted = session.token_ids, engine.pager.counters.get("miss_tokens")
        for _ in range(3):
            with pytest.raises(ConfigError):
                session.send([9] * 10, SamplingParams(max_tokens=4, **refused))
            assert session.token_ids == before
        assert engine.pager.counters.get("miss_tokens") == counted
        assert session.send([9], SamplingParams(max_tokens=4)).token_ids == wanted
        engine.pager.check_integrity()


def test_a_message_whose_request_cannot_be_made_is_taken_back(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    with open_engine(tiny("llama")) as engine:
        session = engine.session("a")
        session.send(prompts()[1], SamplingParams(max_tokens=4))
        before = session.token_ids
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="a bug"):
            patched.setattr(engine, "continue_request", broken)
            session.send([9], SamplingParams(max_tokens=4))
        assert session.token_ids == before
        engine.pager.check_integrity()


def test_n_outputs_compute_their_prompt_once():
    model, prompt = tiny("llama"), prompts()[2]
    with open_engine(model) as engine:
        outputs = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0.9, seed=1, n=3))
        assert engine.pager.counters.get("computed_tokens") == len(prompt) + 3 * 4
        assert len({tuple(out.token_ids) for out in outputs}) == 3
        assert not engine.pager._core.sequences
        solo = engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0.9, seed=1))[0]
        assert solo.token_ids == outputs[0].token_ids


def test_an_output_that_stopped_stays_as_it_is_while_the_others_go_on():
    params = dict(max_tokens=12, temperature=0.9, seed=1, n=3)
    with open_engine(tiny("llama")) as engine:
        whole = [out.token_ids for out in engine.generate(prompts()[1:2], SamplingParams(**params))]
        stop = next(t for t in whole[1] if t not in whole[0])
        outputs = engine.generate(prompts()[1:2], SamplingParams(**params, stop_token_ids=(stop,)))
        assert outputs[0].token_ids == whole[0]
        assert outputs[1].token_ids == whole[1][: whole[1].index(stop) + 1] and outputs[1].finish_reason == "stop"
        assert not engine.pager._core.sequences


def test_usage_says_where_a_sessions_tokens_were():
    model = tiny("llama")
    with open_engine(model, 6) as engine:
        session = engine.session("a")
        session.send(prompts()[3], SamplingParams(max_tokens=1))
        usage = session.send([5], SamplingParams(max_tokens=1)).usage
        assert usage.cached_tokens == usage.device_tokens + usage.host_tokens + usage.disk_tokens == 161
        assert usage.host_tokens > 0 and usage.recomputed_tokens == 0


def test_every_request_of_a_shared_step_has_its_own_full_ledger(monkeypatch):
    """In seconds of this thread: what a busy machine takes away between two lines is no gap."""
    monkeypatch.setattr(request, "time", SimpleNamespace(perf_counter=time.thread_time))
    least = [1.0] * len(prompts())
    with open_engine(tiny("llama")) as engine:
        for number in range(5):
            outputs = engine.generate(prompts(), SamplingParams(max_tokens=3), namespace=str(number))
            for i, out in enumerate(outputs):
                lines = dict(out.ledger)
                total = lines.pop("ttft_s")
                assert total == out.usage.ttft_s == pytest.approx(sum(lines.values())) and lines["prefill"] > 0
                least[i] = min(least[i], lines["unexplained"] / total)
        assert max(least) < 0.2


def test_namespaces_share_nothing():
    prompt = prompts()[2]
    with open_engine(tiny("llama")) as engine:
        engine.generate([prompt], SamplingParams(max_tokens=1), namespace="one")
        assert engine.generate([prompt], SamplingParams(max_tokens=1), namespace="two")[0].usage.cached_tokens == 0
        assert engine.generate([prompt], SamplingParams(max_tokens=1), namespace="one")[0].usage.cached_tokens == 80


def test_the_model_gets_its_attention_back_when_its_last_engine_ends():
    model = tiny("llama")
    before = model.config._attn_implementation
    with open_engine(model):
        with open_engine(model):
            assert model.config._attn_implementation == NAME
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == before


def test_a_store_decides_the_block_size_of_who_opens_it_again(tmp_path):
    model = tiny("llama")
    small = small_config(model, 40, nvme_path=tmp_path / "s", nvme_bytes="16MiB")
    large = PagerConfig("64MiB", "64MiB", nvme_path=tmp_path / "s", nvme_bytes="64MiB", backend="cpu")
    with Engine.from_model(model, small, block_size=32) as engine:
        session = engine.session("a")
        session.send(prompts()[1], SamplingParams(max_tokens=1))
        session.park()
    with Engine.from_model(model, large) as engine:
        assert engine.pager.block_size == 32 and engine.session("a").num_computed == 33


def test_a_corrupted_block_is_computed_again_and_booked(tmp_path):
    model, prompt = tiny("llama"), prompts()[3]
    wanted = stock(model, [*prompt, *stock(model, prompt, 4), 9], 6)
    config = dict(nvme_path=tmp_path / "s", nvme_bytes="16MiB")
    with open_engine(model, 30, **config) as engine:
        session = engine.session("a")
        session.send(prompt, SamplingParams(max_tokens=4))
        session.park()
    flip_a_byte_of_block(tmp_path / "s", 3, discover(model).layouts(16)[0])
    with open_engine(model, 30, **config) as engine:
        out = engine.session("a").send([9], SamplingParams(max_tokens=6))
        assert out.token_ids == wanted
        assert out.usage.recomputed_tokens == 16 + 4  # the lost block and the sealed tail; the rest is found again
        assert engine.pager.counters.get("computed_tokens") == 16 + 4 + 2 + 5


def test_sampled_turns_go_on_with_their_random_numbers_across_a_restart(tmp_path):
    model, config = tiny("llama"), dict(nvme_path=tmp_path / "s", nvme_bytes="64MiB")
    first = SamplingParams(max_tokens=6, temperature=1.0, seed=5)
    later = SamplingParams(max_tokens=6, temperature=1.0)
    with open_engine(model) as engine:
        session = engine.session("a")
        wanted = [session.send([1, 2, 3], first).token_ids, session.send([4], later).token_ids]
        wanted.append(session.send([5], later).token_ids)
    with open_engine(model, **config) as engine:
        session = engine.session("a")
        said = [session.send([1, 2, 3], first).token_ids, session.send([4], later).token_ids]
        session.park()
    with open_engine(model, **config) as engine:
        said.append(engine.session("a").send([5], later).token_ids)
    assert said == wanted


def test_a_store_says_what_its_model_is(tmp_path):
    import zarr

    model = tiny("llama")
    with open_engine(model, nvme_path=tmp_path / "s", nvme_bytes="16MiB") as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    said = zarr.open_group(str(tmp_path / "s" / "blocks.zarr"), mode="r").attrs["kvtier"]
    assert said["about"]["model_type"] == "llama" and said["about"]["rope_parameters"]["rope_theta"] == 10000.0
    assert said["format"] == 4 and said["version"] and said["layouts"][0]["num_layers"] == 4
    array = zarr.open_group(str(tmp_path / "s" / "blocks.zarr"), mode="r")["g0"]
    assert array.attrs["kvtier"]["codec"] == "none" and array.attrs["kvtier"]["dtype"] == "float32"


def flip_a_byte_of_block(store, slot: int, layout) -> None:
    from kvtier.tiers.nvme.identity import segment_path, stored_geometries
    from kvtier.tiers.nvme.maintenance import stored_identity

    segment, offset = stored_geometries(store, stored_identity(store))[0].place(slot)
    with open(segment_path(store, layout, 0, segment), "r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)[0]
        file.seek(offset + 100)
        file.write(bytes([byte ^ 1]))


def test_a_disk_that_loses_everything_ends_in_an_error_not_in_a_loop(tmp_path, monkeypatch):
    from kvtier.tiers.nvme import store

    model = tiny("llama")
    config = PagerConfig(
        device_bytes=7 * sum(g.block_bytes for g in discover(model).layouts(16)),
        host_bytes="64KiB",
        nvme_path=tmp_path / "s",
        nvme_bytes="16MiB",
        backend="cpu",
    )
    monkeypatch.setattr(store.Geometry, "read_tail", lambda self, tail: None)
    engine = Engine.from_model(model, config, block_size=16, max_batch_tokens=32)
    with engine, pytest.raises(TierUnavailableError, match="keeps losing"):
        engine.generate([prompts()[3]], SamplingParams(max_tokens=4))


@torch.inference_mode()
def test_a_model_that_looks_ahead_is_refused():
    from kvtier.tiers.errors import UnsupportedModelError

    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        discover(model)
