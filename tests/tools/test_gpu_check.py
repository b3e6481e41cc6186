from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier.tiers.backends import cuda_missing
from kvtier.tools import gpu_check


@pytest.mark.skipif(cuda_missing() is None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_why_and_nothing_is_written(capsys, tmp_path):
    assert gpu_check.main(["--out", str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no usable GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_outcomes_are_counted_from_a_real_report(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_never(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), f"--junitxml={report}"]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    counts = gpu_check.count_outcomes(report)
    assert counts == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1, "failures": ["test_three::test_bad"]}
