"""Every benchmark runs, says what it compares with, and prints one object of one shape. No figure is asserted."""

from __future__ import annotations

import json

import pytest

from kvtier.tools import cli
from kvtier.tools.bench import harness
from kvtier.tools.bench.harness import Row, interleave

SMALL = {
    "decode": ["--contexts", "64,100", "--rounds", "2"],
    "host": ["--blocks", "4", "--rounds", "2"],
    "nvme": ["--blocks", "16", "--rounds", "1"],
    "prefix": ["--tokens", "64", "--documents", "1", "--rounds", "1"],
    "metadata": ["--context", "512", "--rounds", "2"],
}
FIELDS = {"case", "metric", "value", "unit", "reference", "reference_value", "ratio", "rounds"}


def test_every_benchmark_is_tried_here():
    assert set(SMALL) == set(cli.BENCHES)


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_prints_one_object_and_keeps_it(name, capsys, tmp_path):
    kept = tmp_path / "results" / "r.json"
    assert cli.main(["bench", name, *SMALL[name], "--json", "--out", str(kept)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(kept.read_text()) == result
    assert set(result) == {"bench", "command", "date", "versions", "machine", "rows"} and result["bench"] == name
    for row in result["rows"]:
        assert set(row) == FIELDS and row["value"] > 0 and row["reference"]
        assert row["ratio"] is None or row["ratio"] > 0
    harness.show(result)
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--contexts", "many"], "--contexts 'many'"),
        (["decode", "--contexts", "0"], "--contexts '0'"),
        (["metadata", "--context", "3"], "--context 3"),
        (["metadata", "--block-size", "24"], "block_size=24"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvtier: error: ") and err.count("\n") == 1 and message in err


def test_cases_take_turns():
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]


def test_a_ratio_is_higher_when_kvtier_is_faster():
    assert Row.of_times("c", "m", "ms", 1.0, "peer", 2.0, 1e3, 5).ratio == 2.0
