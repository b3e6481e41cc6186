from __future__ import annotations

import itertools
import json
import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvtier.pager.policies.lru import Lru
from kvtier.pager.policies.registry import Setting, make_policy
from kvtier.tools import cli
from kvtier.tools.replay import cells
from kvtier.tools.replay.cells import WITHOUT_WINDOW, capacities_of
from kvtier.tools.replay.model import Machine, changed, estimate, split_of
from kvtier.tools.replay.oracles import belady, next_uses, releases
from kvtier.tools.replay.simulate import simulate
from kvtier.tools.replay.trace import Recorded, Trace, trace_of


def of_chains(chains: list[list[int]], block_tokens: int = 1) -> Trace:
    lines = [Recorded(1e3 * i, tuple(c), len(c) * block_tokens, 1, False) for i, c in enumerate(chains)]
    return trace_of("t", lines, block_tokens)


def tree_chains(pick: random.Random, n: int, branch: int, depth: int) -> list[list[int]]:
    names: dict[tuple[int, ...], int] = {}
    chains = []
    for _ in range(n):
        path, chain = (), []
        for _ in range(pick.randint(1, depth)):
            path = (*path, pick.randrange(branch))
            chain.append(names.setdefault(path, len(names)))
        chains.append(chain)
    return chains


def best_of_all(trace: Trace, capacity: int) -> int:
    """Hits of the best choice of held blocks after every request, by trying all."""
    states = {frozenset[int](): 0}
    for chain in (c.tolist() for c in trace.chains):
        after: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            k = next((i for i, b in enumerate(chain) if b not in held), len(chain))
            union = held | set(chain)
            for size in range(min(capacity, len(union)) + 1):
                for kept in map(frozenset, itertools.combinations(union, size)):
                    after[kept] = max(after.get(kept, -1), hits + k)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_of_all_choices(seed):
    pick = random.Random(seed)
    trace = of_chains(tree_chains(pick, 7, 2, 3))
    for capacity in (1, 2, 4):
        assert int(belady(trace, capacity).sum()) == best_of_all(trace, capacity)


@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_no_policy_beats_belady_and_with_room_for_all_none_is_worse(name):
    for seed in range(6):
        pick = random.Random(seed)
        trace = of_chains(tree_chains(pick, 80, 3, 5))
        for capacity in (5, 12, 30, trace.footprint):
            found = simulate(trace, make_policy(name, Setting(capacity, 1)), capacity).hit_blocks.sum()
            assert found <= belady(trace, capacity).sum()
        assert found == belady(trace, trace.footprint).sum()


def test_lru_agrees_with_a_list():
    pick = random.Random(5)
    trace = of_chains(tree_chains(pick, 300, 3, 5))
    held: list[int] = []
    expected = []
    for chain in (c.tolist() for c in trace.chains):
        expected.append(next((i for i, b in enumerate(chain) if b not in held), len(chain)))
        held = ([b for b in held if b not in chain] + chain[::-1])[-20:]
    assert simulate(trace, Lru(20), 20).hit_blocks.tolist() == expected


def test_hints_of_what_is_never_used_again_free_room():
    chains = [c for s in range(50) for c in ([[0, 10 * s + 1, 10 * s + 2]] * 2)]
    trace = of_chains(chains)
    uses = next_uses(trace)
    freed = releases(trace, uses)
    assert freed[0].tolist() == [] and freed[1].tolist() == trace.chains[1][1:].tolist()
    for name in ("lru", "auto", "arc"):
        hinted = simulate(trace, make_policy(name, Setting(3, 1)), 3, releases=freed)
        assert hinted.hit_blocks.sum() == belady(trace, 3, uses).sum()


def test_a_capacity_is_a_share_of_the_distinct_blocks_or_a_number_of_blocks():
    trace = of_chains([list(range(30)), list(range(25)), [100]])
    assert [(c.text, c.blocks) for c in capacities_of("10%, 50%,7,1%", trace)] == [
        ("10%", 3),
        ("50%", 15),
        ("7", 7),
        ("1%", 1),
    ]


def test_tiers_share_the_hits_and_the_largest_decides():
    trace = of_chains([[1, 2, 3, 4]] * 2 + [[5, 6]] + [[1, 2, 3, 4]], block_tokens=10)
    outcomes = {name: simulate(trace, Lru(n), n) for name, n in (("device", 3), ("host", 4), ("nvme", 8))}
    machine = Machine(bytes_per_token=2, prefill_tokens_per_s=5.0, host_bytes_per_s=10.0, nvme_bytes_per_s=4.0)
    cost = estimate(trace, outcomes, machine)
    assert cost.hit_tokens == {"device": 40, "host": 20, "nvme": 20}
    assert cost.ttft_s.tolist() == pytest.approx([8.0, 10 * 2 / 10, 4.0, 10 * 2 / 10 + 20 * 2 / 4])
    assert cost.loaded_bytes == 40 * 2


def test_what_if_changes_shares():
    shares = split_of("device=10%,host=0.3")
    assert shares == {"device": 0.1, "host": 0.3, "nvme": 1.0}
    assert changed(shares, "host=2x,nvme=0") == {"device": 0.1, "host": 0.6, "nvme": 0}


@pytest.fixture
def trace_file(tmp_path):
    pick, lines, block = random.Random(1), [], 1
    for session in range(60):
        ids = [0]
        for turn in range(4):
            ids = [*ids, *range(block, block + 3)]
            block += 3
            at_ms = 1e4 * session + 9e3 * turn * pick.random()
            lines.append({"timestamp": at_ms, "input_length": 512 * len(ids), "output_length": 9, "hash_ids": ids})
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_prints_rows_and_draws_them(trace_file, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    argv = ["replay", str(trace_file), "--policy", "all", "--capacity", "5%,50%", "--json", "--html", str(page)]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["footprint_blocks"] == 721 and told["block_tokens"] == 512 and told["requests"] == 240
    rows = told["rows"]
    assert {(r["policy"], r["capacity"]) for r in rows} == {
        (name, c) for name in (*WITHOUT_WINDOW, "belady") for c in ("5%", "50%")
    }
    for row in rows:
        assert 0 <= row["token_hit_rate"] <= row["belady_token_hit_rate"] <= 1
        assert row["capacity_blocks"] == {"5%": 36, "50%": 360}[row["capacity"]]
    assert {r["token_hit_rate"] for r in rows if r["policy"] == "belady"} != {0.0}
    text = page.read_text()
    assert "wtinylfu" in text and text.count("<svg") == 2
    assert not any(word in text for word in ("http", "<script", "<link", "@import", "url("))
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


def test_what_if_gives_both_cases_and_a_table_names_them(trace_file, capsys):
    argv = ["replay", str(trace_file), "--policy", "lru", "--capacity", "20%", "--what-if", "host=2x,nvme=0"]
    assert cli.main([*argv, "--json"]) == 0
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["policy"] == "lru"]
    assert [r["case"] for r in rows] == ["as is", "host=2x,nvme=0"]
    assert "nvme_token_hit_rate" in rows[0] and "nvme_token_hit_rate" not in rows[1]
    tiers = sum(
        v for k, v in rows[0].items() if k.endswith("_token_hit_rate") and k.split("_")[0] in ("device", "host", "nvme")
    )
    assert tiers == pytest.approx(rows[0]["token_hit_rate"])
    assert cli.main(argv) == 0
    assert "host=2x,nvme=0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "mru"], "policy='mru' is unknown"),
        (["--policy", ""], "--policy ''"),
        (["--policy", "sliding_window"], "window=None"),
        (["--capacity", "lots"], "--capacity 'lots'"),
        (["--capacity", "0%"], "--capacity '0%'"),
        (["--capacity", ""], "--capacity ''"),
        (["--tiers", "ram=1"], "--tiers ram=1"),
        (["--what-if", "host=2"], "--what-if host=2"),
        (["--what-if", "device=0,host=0,nvme=0"], "no tier is left"),
        (["--what-if", "device=0", "--prefetch"], "--prefetch plays copies into the device tier"),
        (["--block-size", "0"], "--block-size 0"),
        (["--prefill-tokens-per-s", "0"], "--prefill-tokens-per-s 0"),
    ],
)
def test_bad_input_is_one_clear_line(trace_file, more, message, capsys):
    assert cli.main(["replay", str(trace_file), *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kvtier: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("missing", "sizes"), [("nvme", (3, 12, 12)), ("host", (3, 3, 30)), ("host=0,nvme", (3, 3, 3)), ("", (3, 12, 30))]
)
def test_a_tier_that_is_not_there_holds_what_the_one_above_it_holds(monkeypatch, missing, sizes):
    """So without nvme blocks still wait for the host tier's link."""
    trace, told, timed = of_chains([[10 * n + i for i in range(5)] for n in range(6)] * 2), [], cells.TimedReplay
    monkeypatch.setattr(cells, "TimedReplay", lambda *given: told.append(given[2]) or timed(*given))
    shares = changed(split_of("device=10%,host=40%"), f"{missing}=0") if missing else split_of("device=10%,host=40%")
    plan = cells.Plan(["lru"], [cells.Capacity("30", 30)], shares, Machine(), has_bound=False, has_prefetch=True)
    (row,) = cells.run(trace, plan, lambda done, total: None)
    assert told == [dict(zip(("device", "host", "nvme"), sizes, strict=True))] * 2
    assert (row["modelled_demand_wait_mean_s"] > 0) == (row["token_hit_rate"] > 0)


def test_an_empty_trace_is_refused(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert cli.main(["replay", str(tmp_path / "empty.jsonl")]) == 2
    assert "holds no request" in capsys.readouterr().err


def test_releases_in_the_trace_are_heeded(tmp_path, capsys):
    lines = [{"hash_ids": [1, 2]}, {"hash_ids": [3, 4], "release": True}, {"hash_ids": [5]}, {"hash_ids": [1, 2]}]
    for marked, hits in ((True, 2), (False, 1)):
        text = "".join(json.dumps({k: v for k, v in one.items() if marked or k != "release"}) + "\n" for one in lines)
        (tmp_path / "t.jsonl").write_text(text)
        assert cli.main(["replay", str(tmp_path / "t.jsonl"), "--policy", "lru", "--capacity", "4", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)["rows"][0]
        assert row["token_hit_rate"] == pytest.approx(hits / 7)
        assert np.isfinite(row["modelled_ttft_mean_s"])


def test_the_prefix_rule_knows_what_loading_costs_where_a_tier_is_below(monkeypatch):
    machine = Machine(bytes_per_token=1000, prefill_tokens_per_s=100.0, host_bytes_per_s=1e6, nvme_bytes_per_s=5e4)
    assert machine.load_cost(["host", "nvme"]) == pytest.approx(0.1)
    assert machine.load_cost(["nvme"]) == pytest.approx(2.0)
    assert machine.load_cost([]) == float("inf")
    told = []
    monkeypatch.setattr(cells, "make_policy", lambda name, setting: told.append(setting) or make_policy(name, setting))
    trace = trace_of("one", [Recorded(0.0, (1, 2), 32, 1, False)] * 2, 16)
    shares = {"device": 0.5, "host": 0.0, "nvme": 1.0}
    plan = cells.Plan(["prefix"], [cells.Capacity("2", 2)], shares, machine, has_bound=False)
    list(cells.run(trace, plan, lambda done, total: None))
    assert [setting.load_cost() for setting in told] == [pytest.approx(2.0), float("inf")]
