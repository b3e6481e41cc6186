from __future__ import annotations

import gzip
import json

import pytest

from kvtier.tiers.errors import ConfigError
from kvtier.tools.replay.convert import convert
from kvtier.tools.replay.trace import key_of_id, part, read, sessions_of, shuffled_starts


def written(path, lines):
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def one(at_ms, tokens, ids, **more):
    return {"timestamp": at_ms, "input_length": tokens, "output_length": 7, "hash_ids": ids, **more}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json.gz"])
def test_plain_and_gzip_traces_read_alike_and_in_order_of_time(tmp_path, name):
    big = 2**200 + 1
    trace = read(written(tmp_path / name, [one(2000, 1500, [1, big, "x"]), one(1000, 1024, [1, big])]))
    assert [r.now_s for r in trace.requests] == [1.0, 2.0]
    assert (trace.footprint, trace.block_tokens, trace.total_tokens) == (3, 512, 2524)
    assert trace.chains[1][:2].tolist() == trace.chains[0].tolist()
    assert [r.has_partial_tail for r in trace.requests] == [False, True]
    assert trace.directory.find([key_of_id(1)])[0] == trace.chains[0][0]


@pytest.mark.parametrize("size", [16, 64, 512])
@pytest.mark.parametrize("is_partial_listed", [True, False])
def test_the_block_size_is_worked_out(tmp_path, size, is_partial_listed):
    lines = []
    for n in range(3, 40):
        tokens = n * size + size // 3
        lines.append(one(n, tokens, list(range(100 * n, 100 * n + n + is_partial_listed))))
    assert read(written(tmp_path / "t.jsonl", lines)).block_tokens == size
    assert read(written(tmp_path / "t.jsonl", lines), block_tokens=48).block_tokens == 48


def test_fields_may_be_missing(tmp_path):
    trace = read(
        written(tmp_path / "t.jsonl", [{"hash_ids": [5, 6]}, {"hash_ids": [5], "timestamp": None}, {"hash_ids": []}])
    )
    assert [r.now_s for r in trace.requests] == [0.0, 1.0, 2.0]
    assert [r.input_tokens for r in trace.requests] == [1024, 512, 0]


def test_an_id_that_a_chain_has_twice_counts_once(tmp_path):
    trace = read(written(tmp_path / "t.jsonl", [one(0, 2048, [1, 2, 1, 3])]))
    assert len(trace.chains[0]) == 3 and trace.num_references == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"hash_ids": [1]', "line 2 is no JSON"),
        ("[1, 2]", "line 2: hash_ids=None must be a list"),
        ('{"tokens": [1]}', "kvtier replay --convert"),
        ('{"hash_ids": [1.5]}', "line 2: hash_ids"),
        ('{"hash_ids": [1], "timestamp": "noon"}', "line 2: timestamp='noon' must be a finite number"),
        ('{"hash_ids": [1], "input_length": NaN}', "line 2: input_length=nan"),
        ('{"hash_ids": [1], "input_length": 1e30}', "line 2: input_length=1e.30 must be"),
        (f'{{"hash_ids": [1], "timestamp": {"9" * 400}}}', "line 2: timestamp=9+ must be"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text(f'{{"hash_ids": [1]}}\n{line}\n')
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        read(tmp_path / "t.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"hash_ids": [1]}\n' * 100)[:-9])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    body = bytearray(gzip.compress(b'{"hash_ids": [1]}\n' * 100))
    body[12:20] = b"\xff" * 8
    (tmp_path / "bad.gz").write_bytes(body)
    assert "is not there" in refused(tmp_path / "none")
    for name in ("cut.gz", "bad.gz", "binary"):
        assert "cannot be read" in refused(tmp_path / name)


def refused(path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("end", ["\u2028", "\u0085"])
def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path, end):
    line = {"hash_ids": [f"a{end}b"], "prompt": f"some{end}text"}
    (tmp_path / "t.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\r\n\n")
    assert len(read(tmp_path / "t.jsonl").chains) == 1
    assert convert(tmp_path / "t.jsonl", tmp_path / "out.jsonl", 4) == 1


@pytest.mark.parametrize(
    "more", [{"timestamp": "x"}, {"output_length": "x"}, {"timestamp": True}, {"output_length": []}]
)
def test_what_a_replay_would_refuse_is_not_converted(tmp_path, more):
    source = written(tmp_path / "in.jsonl", [{"tokens": [1, 2, 3], "timestamp": None, "output_length": None}])
    assert (
        convert(source, tmp_path / "out.jsonl", 2) == 1 and read(tmp_path / "out.jsonl").requests[0].output_tokens == 0
    )
    written(source, [{"tokens": [1, 2, 3]}, {"tokens": [1, 2]} | more])
    with pytest.raises(ConfigError, match=f"line 2: {next(iter(more))}="):
        convert(source, tmp_path / "out.jsonl", 2)


def test_parts_and_shuffled_starts_keep_the_requests(tmp_path):
    lines = []
    for session in range(20):
        for turn in range(3):
            ids = [0, *range(10 * session + 1, 10 * session + 3 + turn)]
            lines.append(one(1e4 * session + 1e3 * turn, 512 * len(ids), ids))
    trace = read(written(tmp_path / "t.jsonl", lines))
    assert len(set(sessions_of(trace))) == 20
    half = part(trace, 30, 60)
    assert len(half.chains) == 30 and half.footprint == 1 + 4 * 10
    other = shuffled_starts(trace, seed=7)
    assert sorted(c.tolist() for c in other.chains) == sorted(c.tolist() for c in trace.chains)
    times = [r.now_s for r in other.requests]
    assert times == sorted(times) and times != [r.now_s for r in trace.requests]
    at = {tuple(c.tolist()): r.now_s for c, r in zip(other.chains, other.requests)}
    chains = [tuple(c.tolist()) for c in trace.chains[:3]]
    assert [round(at[c] - at[chains[0]], 6) for c in chains] == [0, 1, 2]


def test_tokens_and_texts_are_converted_to_chains_that_share_what_the_prompts_share(tmp_path):
    lines = [
        {"tokens": [1, 2, 3, 4, 5], "timestamp": 5, "output_length": 3},
        {"tokens": [1, 2, 3, 4, 6, 7]},
        {"tokens": [1, 2, 3, 4, 5], "namespace": "other"},
        {"prompt": "abcdef"},
    ]
    target = tmp_path / "out.jsonl.gz"
    assert convert(written(tmp_path / "in.jsonl", lines), target, 2) == 4
    made = [json.loads(line) for line in gzip.decompress(target.read_bytes()).splitlines()]
    ids = [line["hash_ids"] for line in made]
    assert ids[0][:2] == ids[1][:2] and ids[0][2] != ids[1][2] and not set(ids[0]) & set(ids[2])
    assert [len(i) for i in ids] == [3, 3, 3, 3] and made[0]["timestamp"] == 5 and made[0]["output_length"] == 3
    assert read(target).total_tokens == 22
    with pytest.raises(ConfigError, match="line 1: give tokens"):
        convert(written(tmp_path / "bad.jsonl", [{"tokens": "x"}]), target, 2)
