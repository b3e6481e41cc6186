from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from kvtier.tiers.backends import cuda_missing
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError
from kvtier.tools import gpu_bench, gpu_check

without_gpu = pytest.mark.skipif(cuda_missing() is None, reason="there is a CUDA device here")


@without_gpu
@pytest.mark.parametrize("argv", [[], ["--only", "tests"], ["--only", "bench"]])
def test_without_a_gpu_one_line_says_why_and_nothing_is_written(capsys, tmp_path, argv):
    assert gpu_check.main(["--out", str(tmp_path), *argv]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("gpu_check: no usable GPU: ") and str(cuda_missing()) in err
    assert list(tmp_path.iterdir()) == []


def test_outcomes_are_counted_from_a_real_run(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_never(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n"
    )
    found = gpu_check.run_tests(tests, "-p", "no:cacheprovider")
    assert {k: found[k] for k in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert [name.split("::")[1] for name in found["failures"]] == ["test_bad", "test_error"]


def test_a_missing_tests_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tests at"):
        gpu_check.run_tests(tmp_path / "tests")


def test_the_result_is_one_whole_file_named_after_the_device(tmp_path):
    result = {"machine": {"device": "NVIDIA H200 (PCIe)"}, "rows": []}
    path = gpu_check.write_result(result, tmp_path / "new")
    assert path == tmp_path / "new" / "gpu-check-NVIDIA-H200-PCIe.json"
    assert gpu_check.write_result(result | {"rows": [1]}, tmp_path / "new") == path
    assert json.loads(path.read_text())["rows"] == [1]
    assert os.listdir(tmp_path / "new") == [path.name]


def test_medians_are_taken_in_turns_after_a_round_to_warm_up():
    order, values = [], iter([1000.0, *range(gpu_bench.ROUNDS)])

    def first() -> float:
        order.append("first")
        return float(next(values))

    def second() -> float:
        order.append("second")
        return 2.0

    medians = gpu_bench._medians({"first": first, "second": second})
    assert order == ["first", "second"] * (gpu_bench.ROUNDS + 1)
    assert medians == {"first": (gpu_bench.ROUNDS - 1) / 2, "second": 2.0}


def test_decode_is_compared_with_attention_over_the_same_keys():
    decode = gpu_bench._Decode("cpu", 3, 256)
    decode.check()
    decode.dense[1][0, 0] += 1.0
    with pytest.raises(RuntimeError, match="differs"):
        decode.check()


def test_transfers_move_every_block_each_way_and_a_step_runs_beside_them(monkeypatch):
    for name, value in {"NUM_BLOCKS": 64, "BLOCK_BYTES": 4096, "STEP_LAYERS": 1, "HIDDEN": 64, "ROUNDS": 2}.items():
        monkeypatch.setattr(gpu_bench, name, value)
    backend = CpuBackend()
    transfers = gpu_bench._Transfers(backend)
    (device, host), (host_back, device_source) = transfers.up, transfers.down
    host[:], device_source[:] = np.arange(64)[:, None], np.arange(64)[:, None] + 64
    assert transfers.rate(backend, ("host_to_device", "device_to_host"), transfers.scattered) > 0
    t, s = transfers.scattered
    assert np.array_equal(device[t], host[s]) and np.array_equal(host_back[t], device_source[s])
    attend = gpu_bench._Decode("cpu", 1, 64).paged
    timed, slowed = gpu_bench._beside_copies(CpuBackend(delay_s=0.05), "runs", attend)
    assert timed.value > 0 and timed.ratio == pytest.approx(timed.reference_value / timed.value)
    assert slowed.ratio == timed.ratio
    backend.close(5)


def test_a_benchmark_that_fails_leaves_a_row_and_the_others_run(monkeypatch):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_bench, "_copies", broken)
    monkeypatch.setattr(gpu_bench, "_decode", lambda: [gpu_bench.Row("c", "m", 1.0, "ms", "r", 2.0, 2.0, 7)])
    rows = gpu_bench.run_gpu_benchmarks()
    assert [row["value"] for row in rows] == [None, 1.0] and "out of memory" in rows[0]["reference"]
    assert gpu_bench.has_failed(rows) and not gpu_bench.has_failed(rows[1:])


def test_importing_it_loads_neither_torch_nor_cupy():
    code = "import sys, kvtier.tools.gpu_check, kvtier.tools.gpu_bench; print({'torch', 'cupy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "set()"
