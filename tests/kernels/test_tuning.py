"""Which row cuts the kernels: by device, by what was measured here, and never by a file that says nonsense."""

from __future__ import annotations

import json

import pytest

from kvtier.kernels import tuning
from kvtier.kernels.tuning import TABLE, Device, Tuning, current, tune


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path / "cache"))
    tuning._looked_up.cache_clear()
    yield
    tuning._looked_up.cache_clear()


def test_each_device_has_its_row():
    assert Device("cpu", 2).row is TABLE["CPU"]
    assert Device("sm_80", 108, 1.6e12).row is TABLE["A100"]
    assert Device("sm_90", 132, 3.35e12).row is TABLE["H100"]
    assert Device("sm_90", 132, 4.8e12).row is TABLE["H200"]
    assert Device("sm_120", 170, 1.8e12).row is TABLE["other GPU"]
    assert current("cpu") is TABLE["CPU"]


def test_what_was_measured_is_kept_and_used():
    seconds = {row.block: 1.0 for row in tuning.candidates(TABLE["CPU"], "cpu")} | {256: 0.9, 128: 0.5}
    tried = []

    def measure(row: Tuning) -> float:
        tried.append(row.block)
        assert current("cpu") is row, "kernels are cut by what is being tried"
        return seconds[row.block]

    best = tune("cpu", measure)
    assert sorted(tried) == [64, 128, 256, 512]
    assert best.block == 128 and best.is_measured and current("cpu") == best
    tuning._looked_up.cache_clear()  # another process
    assert current("cpu") == best


def test_a_little_faster_is_not_worth_another_block_size():
    assert tune("cpu", lambda row: 1.0 if row is TABLE["CPU"] else 0.97).block == TABLE["CPU"].block


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 0, "devices": {}}',
        json.dumps({"format": 1, "devices": {"KEY": {"name": "CPU"}}}),
        json.dumps({"format": 1, "devices": {"KEY": {**tuning.asdict(TABLE["CPU"]), "block": -16}}}),
        json.dumps({"format": 1, "devices": {"KEY": {**tuning.asdict(TABLE["CPU"]), "tile": "all"}}}),
        json.dumps({"format": 1, "devices": {"another|device": tuning.asdict(TABLE["CPU"])}}),
    ],
)
def test_a_file_that_means_nothing_here_counts_as_absent(text):
    path = tuning.cache_path()
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("KEY", tuning.this_device("cpu").key))
    assert current("cpu") is TABLE["CPU"]
    assert tune("cpu", lambda row: float(row.block)).block == 64, "and is written anew"
    assert json.loads(path.read_text())["format"] == 1


def test_gpu_candidates_are_cuts_that_kernels_take():
    rows = tuning.candidates(TABLE["H200"], "cuda")
    assert len(rows) == len(set(rows)) == 3 * 2 * 3 * 3 - 1
    assert all(tuning._tuning(tuning.asdict(row)) == row for row in rows)


def test_a_cut_that_the_device_cannot_run_is_left_out(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors", reason="triton is not installed")
    monkeypatch.setattr(tuning, "this_device", lambda kind: Device("sm_90", 132, 4.8e12))

    def measure(row: Tuning) -> float:
        if row.tile == 128:
            raise errors.OutOfResources(300_000, 232_448, "shared memory")
        return 0.5 if row.stages == 2 and row.tile == 32 else 1.0

    best = tune("cuda", measure)
    assert (best.tile, best.stages, best.is_measured) == (32, 2, True)


def test_wide_heads_do_not_follow_a_tile_that_was_measured_for_narrow_ones():
    decode = pytest.importorskip("kvtier.kernels.triton_decode", reason="triton is not installed")
    import torch

    measured = tuning.replace(TABLE["H200"], tile=128)
    assert decode.decode_shape(4, 128, 128, 128, torch.bfloat16, measured)["TILE"] == 128
    for key_dim, value_dim, dtype in (
        (576, 512, torch.bfloat16),
        (256, 256, torch.bfloat16),
        (128, 128, torch.float32),
    ):
        assert decode.decode_shape(4, 128, key_dim, value_dim, dtype, measured)["TILE"] == 32
