"""Every benchmark runs, says what it compares with, and prints one object of one shape. No figure is asserted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tools import cli
from kvtier.tools.bench import demo, harness, lmcache, prefix_peers
from kvtier.tools.bench.harness import Row, interleave
from kvtier.tools.bench.peer_process import PeerProcess

SMALL = {
    "attention": [
        *("--contexts", "512", "--prefill-contexts", "256", "--rows", "8", "--rounds", "1"),
        *("--shapes", "GQA4", "--formats", "int8,hack8", "--device", "cpu", "--far-contexts", "512"),
    ],
    "accuracy": ["--contexts", "512", "--formats", "int8,int2", "--picks", "4", "--device", "int4; heads 0: bf16"],
    "select": ["--context", "2048", "--picks", "4", "--full-needles", "1"],
    "stream": ["--context", "2048", "--block-size", "64", "--resident", "30", "--rounds", "1"],
    "kernels": ["--aot", "--archs", "90", "--only", "^(merge_states|score_blocks)$"],
    "decode": ["--contexts", "64", "--rounds", "1", "--resume", "300", "--formats", "int8"],
    "host": ["--blocks", "4", "--rounds", "2"],
    "nvme": ["--blocks", "16", "--rounds", "1"],
    "prefix": ["--tokens", "64", "--documents", "1", "--rounds", "1"],
    "daemon": ["--keys", "64", "--seconds", "0.2", "--blocks", "4", "--batch", "2", "--rounds", "1", "--listed", "500"],
    "tenants": ["--blocks", "2", "--rounds", "1", "--lookups", "40"],
    "inspect": ["--blocks", "2000", "--rounds", "1"],
    "metadata": ["--context", "512", "--rounds", "2"],
    "policy": ["--requests", "300", "--capacity", "5%,50%", "--parts", "whole,shuffled"],
    "capacity": ["--budget", "8MiB", "--formats", "int2/128", "--device-budget", "8MiB"],
    "prefetch": ["--requests", "60"],
    "codecs": ["--blocks", "1", "--rounds", "1"],
    "demo": ["--context", "2048", "--rounds", "1"],
    "recovery": ["--blocks", "3000", "--rounds", "1"],
    "ring": ["--blocks", "128", "--passes", "1"],
    "endless": ["--tokens", "20000", "--window", "512"],
    "sessions": ["--sessions", "3", "--context", "512", "--resident", "2", "--turns", "2"],
    "serve": [
        *("--contexts", "64", "--concurrency", "2", "--sessions", "2", "--turns", "2", "--answer", "4"),
        *("--requests", "6", "--scale", "64", "--speed", "1000"),
        *("--device-bytes", "8MiB", "--host-bytes", "16MiB", "--nvme-bytes", "64MiB"),
    ],
}
MAY_BE_NONE = {
    *("share computed again", "refused with 429", "failed", "spills", "needles found", "bytes read", "way_to_belady"),
    *("wasted_share", "prefetched_share", "modelled_wait_mean"),
    *("slices kept from earlier steps", "slices that came early by a guess", "guesses that were picked"),
    *("bytes promoted per token", "attention weight left out, bound", "largest difference of a log probability"),
    *("difference of medians", "clean segments"),
}


def without(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed here")


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
        assert set(row) == FIELDS and row["reference"]
        assert row["value"] > 0 or row["metric"] in MAY_BE_NONE
        assert row["ratio"] is None or row["ratio"] > 0
    if name == "nvme":
        assert {row["metric"] for row in result["rows"] if "not installed: pass --lmcache" in row["reference"]} == {
            "write_vs_lmcache",
            "read_vs_lmcache",
        }
    harness.show(result)
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--before", "/no/such"], "--before '/no/such' is no checkout"),
        (["demo", "--context", "2048", "--rounds", "0"], "--rounds 0"),
        (["decode", "--contexts", "many"], "--contexts 'many'"),
        (["decode", "--contexts", "0"], "--contexts '0'"),
        (["decode", "--resume", "-1"], "--resume -1"),
        (["metadata", "--context", "3"], "--context 3"),
        (["metadata", "--block-size", "24"], "block_size=24"),
        (["nvme", "--blocks", "1", "--lmcache", "/no/such/python"], "'/no/such/python' is not a program"),
        (["nvme", "--blocks", "1", "--lmcache", "true"], "it ended without a word"),
        pytest.param(["nvme", "--blocks", "1", "--lmcache", sys.executable], "'lmcache'", marks=without("lmcache")),
        (["metadata", "--context", "64", "--rounds", "1", "--vllm", "true"], "--vllm 'true': it ended without a word"),
        (["metadata", "--context", "64", "--sglang", "/no/such/python"], "--sglang '/no/such/python' is not a program"),
        (["metadata", "--scale", "--vllm", "python3"], "--vllm 'python3' has no part in --scale"),
        pytest.param(
            ["metadata", "--context", "64", "--vllm", sys.executable],
            "was found for vllm; how to",
            marks=without("vllm"),
        ),
        pytest.param(
            ["metadata", "--context", "64", "--sglang", sys.executable],
            "was found for sglang; how to",
            marks=without("sglang"),
        ),
        (["codecs", "--blocks", "0"], "--blocks 0"),
        (["serve", "--concurrency", "1,x"], "--concurrency '1,x'"),
        (["serve", "--scale", "3"], "--scale 3"),
        (["serve", "--speed", "0"], "--speed 0"),
        (["serve", "--trace", "/nowhere"], "--trace '/nowhere' is not there"),
        (["serve", "--contexts", "16"], "--contexts 16, --turns 4, --answer 16"),
        (["metadata", "--scale", "5,x"], "--scale '5,x'"),
        (["metadata", "--scale", "5"], "--scale '5'"),
        (["policy", "--parts", "third"], "--parts 'third'"),
        (["policy", "--trace", "/nowhere"], "'/nowhere' is not there"),
        (["codecs", "--path", "/nowhere"], "--path '/nowhere'"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvtier: error: ") and err.count("\n") == 1 and message in err


def test_costs_at_scale_stand_beside_those_of_the_smallest(capsys):
    assert cli.main(["bench", "metadata", "--scale", "1024,4096", "--rounds", "1", "--json"]) == 0
    *rows, memory = json.loads(capsys.readouterr().out)["rows"]
    assert (memory["case"], memory["metric"]) == ("5120 blocks in all", "resident memory") and memory["value"] > 0
    assert {row["case"] for row in rows} == {"1024 blocks", "4096 blocks"}
    assert {row["metric"] for row in rows} >= {"lookup", "lru use", "auto evict"}
    assert all(row["value"] > 0 for row in rows)
    flat = [row for row in rows if "dict.get" not in row["reference"]]
    assert len(rows) == len(flat) + 2 and {row["ratio"] for row in flat if row["case"] == "1024 blocks"} == {1.0}


def test_without_lmcache_its_rows_say_so_and_hold_no_ratio():
    values = {"write_checksummed": [1.0, 3.0, 2.0], "read_checksummed": [4.0, 5.0, 6.0]}
    found = lmcache.rows(values, None, "c", 3)
    assert [(row.metric, row.value) for row in found] == [("write_vs_lmcache", 2.0), ("read_vs_lmcache", 5.0)]
    for row in found:
        assert (row.reference_value, row.ratio) == (None, None)
        assert "not installed: pass --lmcache PYTHON" in row.reference


@pytest.mark.parametrize("program", ["lmcache", "sglang", "vllm"])
def test_a_peer_is_a_program_of_its_own(program):
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'kvtier', 'numpy', 'torch'} & set(sys.modules))"
    run = [sys.executable, "-I", "-c", code, lmcache._SCRIPT.with_name(f"{program}_peer.py")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_without_peers_the_look_ups_say_so_and_hold_no_ratio():
    found = prefix_peers.run({"vllm": None, "sglang": None}, dict.fromkeys(prefix_peers.CASES, list), 64, 16, 1)
    assert len(found) == 2 * len(prefix_peers.CASES) and all(
        (row.reference_value, row.ratio) == (None, None) for row in found
    )
    assert [
        f"not installed: pass --{kind} PYTHON" in row.reference for row in found for kind in ("vllm", "sglang")
    ] == [True, False, False, True] * len(prefix_peers.CASES)


def test_a_peers_seconds_are_its_own_and_its_failure_names_the_option(tmp_path):
    program = tmp_path / "p.py"
    program.write_text(
        "import json, sys\n"
        "print(json.dumps({'version': '9', 'size': sys.argv[2]}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    case = json.loads(line)['case']\n"
        "    print(json.dumps({'error': 'no such case'} if case == 'bad' else {'seconds': 0.25}), flush=True)\n"
    )
    with PeerProcess("--peer", sys.executable, program, tmp_path / "peer", block_size=16) as peer:
        assert peer.greeting == {"version": "9", "size": "--block-size=16"}
        assert peer.ask(case="new") == {"seconds": 0.25}
        with pytest.raises(ConfigError, match=r"^--peer .*: no such case; how to install: README$"):
            peer.ask(case="bad")


def test_cases_take_turns():
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4 and [len(values) for values in seconds.values()] == [3, 3]


def test_cases_can_take_turns_in_another_order_each_round_after_what_is_not_timed():
    seen: list[str] = []
    cases = {name: partial(seen.append, name) for name in "abcd"}
    interleave(cases, 5, before={"a": partial(seen.append, "-")}, order=random.Random(0))
    rounds = ["".join(seen[i : i + 5]) for i in range(0, len(seen), 5)]
    assert all("-a" in one and sorted(one) == sorted("-abcd") for one in rounds) and len(set(rounds)) > 1


def test_a_ratio_is_higher_when_kvtier_is_faster():
    assert Row.of_times("c", "m", "ms", 1.0, "peer", 2.0, 1e3, 5).ratio == 2.0


def test_a_demo_beside_another_checkout_runs_that_checkout_wherever_it_is_started(tmp_path, monkeypatch):
    """Not the kvtier of the directory that we are in, and not an installed one in the place of a checkout that is none."""
    (other := tmp_path / "other").mkdir()
    (other / "kvtier").symlink_to(Path(__file__).parents[2] / "kvtier")
    monkeypatch.chdir(Path(__file__).parents[2])
    demo._check_is_imported(other)
    (tmp_path / "kvtier").mkdir()
    with pytest.raises(ConfigError, match=r"imports .* in its place"):
        demo._check_is_imported(tmp_path)
