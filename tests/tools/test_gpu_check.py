from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.tiers.backends import cuda_missing
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.errors import ConfigError
from kvtier.tools import gpu_bench, gpu_check, gpu_tests

EMPTY = {"machine": {"device": "NVIDIA H200 (PCIe)"}, "tests": {}, "rows": [], "sanitizer": {}}
without_gpu = pytest.mark.skipif(cuda_missing() is None, reason="there is a CUDA device here")


@without_gpu
@pytest.mark.parametrize("argv", [[], ["--only", "tests"], ["--only", "bench,sanitize"]])
def test_without_a_gpu_one_line_says_why_and_nothing_is_written(capsys, tmp_path, argv):
    assert gpu_check.main(["--out", str(tmp_path), *argv]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("gpu_check: no usable GPU: ") and str(cuda_missing()) in err
    assert list(tmp_path.iterdir()) == []


def write_tests(folder, **files):
    """Test files, by name and body."""
    for name, body in files.items():
        path = folder / "tests" / f"test_{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("import os, pytest\n" + body)
    return folder / "tests"


GPU = "pytestmark = pytest.mark.gpu\n"


def test_outcomes_are_counted_from_a_real_run_and_a_crash_costs_one_file(tmp_path):
    tests = write_tests(
        tmp_path,
        four=GPU + "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip\n"
        "def test_never(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n",
        crash=GPU + "def test_end(): os._exit(11)\n",
        other="raise ImportError('this machine has not everything that other tests need')\n",
    )
    found = gpu_tests.run_tests(tests)
    assert {k: found[k] for k in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert [name.split("::")[1].split(":")[0] for name in found["failures"]] == ["test_bad", "test_error"]
    assert "one is not two" in found["failures"][0]
    assert found["not_finished"] == ["tests/test_crash.py: pytest ended with code 11 and wrote no report"]
    assert gpu_tests.has_failed(found, {}) and not gpu_tests.has_failed({}, {})


def test_what_does_not_end_in_time_is_named(tmp_path):
    tests = write_tests(tmp_path, long=GPU + "def test_long(): import time; time.sleep(600)\n")
    found = gpu_tests.run_tests(tests, limit_s=0.0)
    assert found["not_finished"] == ["tests/test_long.py: out of time"] and found["passed"] == 0


def test_the_tests_find_this_package_installed_or_not(tmp_path):
    first = Path(gpu_tests._environment(tmp_path)["PYTHONPATH"].split(os.pathsep)[0])
    assert (first / "kvtier" / "tools" / "gpu_tests.py").samefile(gpu_tests.__file__)


def test_what_others_stand_on_runs_first():
    files = gpu_tests.gpu_files(Path(__file__).parents[1])
    assert list(dict.fromkeys(path.parent.name for path in files)) == ["tiers", "kernels", "pager", "daemon", "engine"]
    assert {path.name for path in files if path.parent.name == "kernels"} == {"test_gpu.py", "test_gpu_features.py"}


def test_a_clean_sanitizer_is_told_from_one_that_found_or_could_not():
    passed = {"passed": 3, "failed": 0, "skipped": 0, "failures": []}
    clean = gpu_tests._judge(0, "..\n========= ERROR SUMMARY: 0 errors\n", passed)
    assert clean == {"tool": "memcheck", "errors": 0, **passed}
    bad = gpu_tests._judge(1, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error\n", passed)
    assert bad["errors"] == 1 and "Invalid" in bad["told"][0] and gpu_tests.has_failed({}, bad)
    refused = gpu_tests._judge(
        4, "ERROR: Wrong expression\n========= ERROR SUMMARY: 0 errors\n", passed | {"passed": 0}
    )
    assert "errors" not in refused and "code 4" in refused["failures"][0] and gpu_tests.has_failed({}, refused)
    for code, told, counts in (
        (None, "", passed),
        (1, "Device not supported", passed),
        (0, "ERROR SUMMARY: 0 errors", passed | {"passed": 0}),
    ):
        unknown = gpu_tests._judge(code, told, counts)
        assert "errors" not in unknown and unknown["not_run"], "nothing is called clean that did not run"


def test_what_is_chosen_for_the_sanitizer_is_there():
    """Collected without a device: an expression that pytest refuses, or that fits nothing, would watch no kernel."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-k", gpu_tests.SHORT, "tests/kernels/test_gpu.py", "tests/kernels/test_gpu_features.py"],
        cwd=gpu_tests.ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in ("byte_equal", "streamed_blocks", "quantised_bytes", "pages_are_scored", "plain-int4", "plain-hack2"):
        assert name in ran.stdout
    for name in ("marked_as_on_the_cpu[int4", "in_any_order[int4"):
        assert name in ran.stdout
    assert "window-int4" not in ran.stdout


def test_a_part_that_is_unknown_is_named():
    with pytest.raises(ConfigError, match="--only 'bonch'"):
        gpu_check._parts("tests,bonch")
    assert gpu_check._parts(None) == ["tests", "bench", "sanitize"] and gpu_check._parts("bench,tests") == [
        "tests",
        "bench",
    ]


def test_a_part_that_has_no_time_left_is_named_and_what_ran_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_begun", lambda parts: EMPTY | {"not_run": []})
    result = gpu_check._check(["bench"], tmp_path, limit_s=0.0)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["not_run"] == result["not_run"] == ["bench"]
    assert path.name == "gpu-check-NVIDIA-H200-PCIe-bench.json"


def test_a_missing_tests_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no tests at"):
        gpu_tests.run_tests(tmp_path / "tests")


def test_the_result_is_one_whole_file_named_after_the_device(tmp_path):
    result = EMPTY
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
    monkeypatch.setattr(gpu_bench, "_attention", lambda: [])
    monkeypatch.setattr(gpu_bench, "_decode", lambda: [gpu_bench.Row("c", "m", 1.0, "ms", "r", 2.0, 2.0, 7)])
    rows = gpu_bench.run_gpu_benchmarks()
    assert [row["value"] for row in rows] == [None, 1.0] and "out of memory" in rows[0]["reference"]
    assert gpu_bench.has_failed(rows) and not gpu_bench.has_failed(rows[1:])


def test_importing_it_loads_neither_torch_nor_cupy():
    code = "import sys, kvtier.tools.gpu_check, kvtier.tools.gpu_bench; print({'torch', 'cupy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "set()"
