"""What a store has under an id is not rolled back by copying an older one into it, unless that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span
from kvtier.tiers.nvme import maintenance
from kvtier.tools import cli

LAYOUT = KVLayout(1, 1, 8, 4, "float32")
SECRET = "ab" * 32


def settings(path: Path, codec: str) -> PagerConfig:
    secrets = {"default": SECRET} if codec == "aes" else {}
    return PagerConfig(
        "64KiB", "64KiB", nvme_path=path, nvme_bytes="1MiB", nvme_codec=codec, backend="cpu", namespace_secrets=secrets
    )


def say(path: Path, codec: str, **sessions: list[int]) -> None:
    """Store these sessions, from where they are stored on."""
    with Pager.open(LAYOUT, settings(path, codec)) as pager:
        for name, tokens in sessions.items():
            known = name in pager.sessions()
            seq = pager.resume(name)[0] if known else pager.begin("default")
            pager.append(seq, tokens)
            with pager.lease([Span(seq, pager.num_computed(seq), len(pager.token_ids(seq)))]) as lease:
                lease.commit()
            pager.park(name, seq)


def stored(path: Path, codec: str) -> dict[str, tuple[list[int], int]]:
    """Tokens of each session, and how many of them are computed."""
    found = {}
    with Pager.open(LAYOUT, settings(path, codec)) as pager:
        for name in sorted(pager.sessions()):
            seq, parked = pager.resume(name)
            found[name] = parked.token_ids, pager.num_computed(seq)
            pager.finish(seq)
    return found


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert cli.main(["store", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == "", err
    return out


@pytest.mark.parametrize("codec", ["none", "aes"])
@pytest.mark.parametrize("verb", ["import", "export"])
def test_sessions_that_are_there_stay_and_are_named_unless_replaced(tmp_path, capsys, monkeypatch, codec, verb):
    if codec == "aes":
        pytest.importorskip("cryptography")
    options = ["--json"]
    if codec == "aes":
        (tmp_path / "engine.toml").write_text(f'[namespace_secrets]\ndefault = "{SECRET}"\n')
        options += ["--config", tmp_path / "engine.toml"]
    live, old = tmp_path / "live", tmp_path / "old"
    say(live, codec, a=[1, 2, 3, 4, 5], b=[9] * 6)
    command(capsys, "export", live, old, *options)
    say(live, codec, a=[6, 7], c=[7] * 5)  # since
    say(old, codec, d=[8] * 5)
    stores = [live, old] if verb == "import" else [old, live]
    report = json.loads(command(capsys, verb, *stores, *options))
    whole = {"a": ([1, 2, 3, 4, 5, 6, 7], 7), "b": ([9] * 6, 6), "c": ([7] * 5, 5), "d": ([8] * 5, 5)}
    assert stored(live, codec) == whole
    assert report["kept_sessions"] == ["a", "b"] and report["sessions"] == 1 and report["copied_blocks"] == 2
    report = json.loads(command(capsys, verb, *stores, *options, "--replace"))
    assert report["kept_sessions"] == [] and report["sessions"] == 3
    assert stored(live, codec) == whole | {"a": ([1, 2, 3, 4, 5], 5)}


def test_people_are_told_which(tmp_path, capsys):
    names = {f"s{i:02}": [i] * 5 for i in range(23)} | {"\x1b[2J": [1, 2, 3]}
    say(tmp_path / "live", "none", **names)
    command(capsys, "export", tmp_path / "live", tmp_path / "old")
    out = command(capsys, "import", tmp_path / "live", tmp_path / "old")
    assert "24 kept sessions ('s00', 's01'," in out and "'s19' and 4 more)" in out and "\x1b" not in out
    out = command(capsys, "import", tmp_path / "live", tmp_path / "old", "--replace")
    assert "24 sessions" in out and "kept" not in out


def test_a_copy_into_a_new_store_keeps_nothing(tmp_path):
    say(tmp_path / "live", "none", a=[1, 2, 3, 4, 5])
    report = maintenance.copy(tmp_path / "live", tmp_path / "new", lambda done, total: None)
    assert report.sessions == 1 and report.kept_sessions == []
