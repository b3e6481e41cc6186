"""The script opens a store with a parked session in a process that cannot import kvtier, and says what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.nvme.identity import SESSIONS_DIR
from kvtier.tiers.nvme.store import NvmeTier, StoreIdentity

SCRIPT = Path(__file__).resolve().parents[2] / "cookbook" / "open_a_store.py"
LAYOUT = KVLayout(2, 1, 16, 16, "bfloat16")
_BLOCKED = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # importing it fails from now on
sys.argv[0] = "open_a_store.py"
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run_script(*argv, blocked: str = "kvtier") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BLOCKED, blocked, str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ, check=False)


def parked(path: Path, names: list[str], tokens: int = 40) -> None:
    """A store with sessions of that many tokens, all different."""
    config = PagerConfig("256KiB", "256KiB", nvme_path=path, nvme_bytes="16MiB", backend="cpu")
    with Pager.open(LAYOUT, config, model_fingerprint="fingerprint-of-a-model") as pager:
        for number, name in enumerate(names):
            seq = pager.begin()
            pager.append(seq, [1000 * number + i for i in range(tokens)])
            with pager.lease([Span(seq, 0, tokens)]) as lease:
                pager.device_rows(0)[lease.tables[0][0]] = 63  # bf16 0x3f3f: 0.746
                lease.commit()
            pager.park(name, seq, {"secret": "kept out"})


def test_sessions_and_blocks_are_listed_without_kvtier(tmp_path):
    parked(tmp_path / "s", ["alice", "../../etc/ümlaut"])
    result = run_script(tmp_path / "s")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "model fingerprint-of-a, store format " in out and "2 parked sessions" in out
    assert "'alice': 40 tokens, blocks 3 in g0, parked at 20" in out and "'../../etc/ümlaut'" in out
    assert "g0: 6 blocks of 2 layers, 16 tokens per block, bfloat16; slots " in out
    assert "shape (2, 2, 1, 16, 16), |K, V| up to 0.746" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]  # an id is never a path


def test_a_picture_is_made_or_its_lack_is_said(tmp_path):
    parked(tmp_path / "s", ["a"])
    result = run_script(tmp_path / "s", tmp_path / "p.png", blocked="kvtier,matplotlib")
    assert result.returncode == 1 and "'a': 40 tokens" in result.stdout
    assert (
        result.stderr
        == f"no picture: {tmp_path / 'p.png'} needs matplotlib (pip install matplotlib); the listing above does not\n"
    )


def test_a_picture_is_made_where_there_is_matplotlib(tmp_path):
    pytest.importorskip("matplotlib")
    parked(tmp_path / "s", ["a"])
    assert run_script(tmp_path / "s", tmp_path / "p.png").returncode == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_not_there_is_said(tmp_path):
    parked(tmp_path / "s", [])
    result = run_script(tmp_path / "s")
    assert result.returncode == 0 and "0 parked sessions" in result.stdout and "g0 holds no block yet" in result.stdout
    assert run_script(tmp_path).stderr == f"{tmp_path} holds no blocks.zarr: not a kvtier store\n"
    assert (
        run_script(tmp_path / "s", "--slot", 3).returncode
        == run_script(tmp_path / "s", "--array", "g9").returncode
        == 2
    )


# ---------------------------------------------------------------------- the table itself
@pytest.fixture
def backend():
    backend = CpuBackend()
    yield backend
    backend.close(5)


def open_tier(path, backend, durability="batch") -> NvmeTier:
    return NvmeTier.open(path, StoreIdentity("m", (LAYOUT,)), num_slots=[8], backend=backend, durability=durability)


def listed(path) -> list[str]:
    return [
        session["id"] for session in zarr.open_group(str(path / SESSIONS_DIR), mode="r").attrs["kvtier"]["sessions"]
    ]


def test_the_table_follows_what_is_durable_and_nothing_else(tmp_path, backend):
    path = tmp_path / "s"
    tier = open_tier(path, backend, "always")
    assert not (path / SESSIONS_DIR).exists()
    tier.put_session("a", {"summary": {"tokens": 3}, "token_ids": b"never shown"})
    tier.put_session("b", {"n": 1})  # as older versions wrote them
    assert not (path / SESSIONS_DIR).exists()
    tier.flush()
    assert listed(path) == ["a", "b"] and b"never" not in (path / SESSIONS_DIR / "zarr.json").read_bytes()
    assert (path / SESSIONS_DIR / "zarr.json").stat().st_mode & 0o777 == 0o600
    before = (path / SESSIONS_DIR / "zarr.json").stat().st_ino
    tier.flush()
    assert (path / SESSIONS_DIR / "zarr.json").stat().st_ino == before  # nothing changed, nothing written
    tier.drop_session("a")
    tier.close()
    assert listed(path) == ["b"]


def test_the_table_is_made_anew_at_open(tmp_path, backend):
    path = tmp_path / "s"
    tier = open_tier(path, backend)
    tier.put_session("a", {})
    tier.close()
    for damage in (b"", b"{", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'):
        (path / SESSIONS_DIR / "zarr.json").write_bytes(damage)
        again = open_tier(path, backend)
        assert listed(path) == ["a"] and list(again.sessions()) == ["a"]
        again.close()


def test_a_disk_that_refuses_the_table_costs_nothing_else(tmp_path, backend, caplog):
    path = tmp_path / "s"
    tier = open_tier(path, backend)
    (path / SESSIONS_DIR).write_text("in the way")
    tier.put_session("a", {})
    tier.flush()
    assert "event=no_session_table" in caplog.text
    tier.close()
    (path / SESSIONS_DIR).unlink()
    again = open_tier(path, backend)
    assert listed(path) == list(again.sessions()) == ["a"]
    again.close()
