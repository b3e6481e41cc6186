"""kvtier store: what it finds, what it repairs, and that copies hold the same blocks and sessions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager.lease import Span
from kvtier.tiers.cpu import CpuBackend
from kvtier.tiers.nvme.identity import stored_codecs, stored_geometries
from kvtier.tools import cli

sys.path.insert(0, str(Path(__file__).parent.parent / "faults"))
from blocks_of import IDENTITY, open_tier, put, wrong_blocks


@pytest.fixture(params=["none", "zstd"])
def path(tmp_path, request):
    make(tmp_path / "s", list(range(80)), gone=slice(30, 64), codec=request.param)
    return tmp_path / "s"


def make(path, numbers, gone=slice(0, 0), codec="none"):
    backend = CpuBackend()
    tier = open_tier(path, backend, codec=codec)
    slots = tier.allocate(0, len(numbers))
    put(tier, slots, numbers)
    tier.free(0, slots[gone])
    tier.put_session("a", {"n": 1})
    tier.close()
    backend.close(5)


def store(capsys, verb, *argv) -> tuple[int, dict]:
    code = cli.main(["store", verb, *[str(a) for a in argv], "--json"])
    out = capsys.readouterr()
    assert out.err == "", out.err
    return code, json.loads(out.out)


def damage(path) -> None:
    for slot in (2, 5):
        number, offset = stored_geometries(path, IDENTITY)[0].place(slot)
        segment = path / "blocks.zarr" / "g0" / f"c.{number}.0.0.0.0.0"
        raw = bytearray(segment.read_bytes())
        raw[offset + 9] ^= 1
        segment.write_bytes(raw)


def right_keys(path) -> set[bytes]:
    backend = CpuBackend()
    tier = open_tier(path, backend)
    wrong, right = wrong_blocks(tier)
    assert wrong == 0 and tier.sessions() == {"a": {"n": 1}}
    tier.close()
    backend.close(5)
    return right


def test_check_counts_what_is_bad_and_repair_takes_it_out(path, capsys):
    assert store(capsys, "check", path) == (0, store(capsys, "check", path)[1])
    damage(path)
    code, report = store(capsys, "check", path)
    assert code == 1 and (report["blocks"], report["bad_blocks"], report["dropped_blocks"]) == (46, 2, 0)
    code, report = store(capsys, "repair", path)
    assert code == 0 and report["dropped_blocks"] == 2
    code, report = store(capsys, "check", path)
    assert code == 0 and (report["blocks"], report["bad_blocks"]) == (44, 0)


def test_gc_gives_empty_segments_back(path, capsys):
    before = right_keys(path)
    code, report = store(capsys, "gc", path)
    assert code == 0 and report["freed_bytes"] > 0
    assert len(list((path / "blocks.zarr" / "g0").glob("c.*"))) == 3  # of five
    assert right_keys(path) == before


def test_gc_gives_the_disk_under_free_slots_of_sparse_segments_back(tmp_path, capsys):
    make(tmp_path / "s", list(range(80)), gone=slice(0, 80, 2), codec="lz4")
    before = right_keys(tmp_path / "s")
    code, report = store(capsys, "gc", tmp_path / "s")
    assert code == 0 and report["freed_bytes"] > 40 * 4096 / 2
    assert len(before) == 40 and right_keys(tmp_path / "s") == before
    code, report = store(capsys, "gc", tmp_path / "s")
    assert code == 0 and report["freed_bytes"] <= 0


def test_export_writes_another_codec_when_asked(path, tmp_path, capsys):
    had = stored_codecs(path)
    for codec in ("split", "none"):
        code, report = store(capsys, "export", path, tmp_path / codec, "--codec", codec)
        assert code == 0 and report["copied_blocks"] == 46 and stored_codecs(tmp_path / codec) == [codec]
        assert right_keys(tmp_path / codec) == right_keys(path)
    assert store(capsys, "export", path, tmp_path / "same")[0] == 0 and stored_codecs(tmp_path / "same") == had


def test_export_and_import_carry_blocks_and_sessions(path, tmp_path, capsys):
    damage(path)
    code, report = store(capsys, "export", path, tmp_path / "copy")
    assert code == 0 and (report["copied_blocks"], report["bad_blocks"], report["sessions"]) == (44, 2, 1)
    assert right_keys(tmp_path / "copy") == right_keys(path)
    make(tmp_path / "other", list(range(60, 100)))
    code, report = store(capsys, "import", tmp_path / "other", path)
    assert code == 0 and report["known_blocks"] == 16 and report["copied_blocks"] == 28
    assert len(right_keys(tmp_path / "other")) == 68


def test_what_cannot_be_is_one_clear_line(path, tmp_path, capsys):
    def refused(*argv) -> str:
        assert cli.main(["store", *[str(a) for a in argv]]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "store.json" in refused("check", tmp_path / "nothing")
    assert str(path) in refused("check", path.parent)  # as pagerd's --nvme-path: the stores are below it
    config = PagerConfig("1MiB", "1MiB", nvme_path=tmp_path / "p", nvme_bytes="1MiB", backend="cpu")
    with Pager.open(KVLayout(1, 1, 8, 16, "float32"), config):
        assert "in use by process" in refused("check", tmp_path / "p")
    assert "another model" in refused("import", path, tmp_path / "p")


def test_an_encrypted_store_is_checked_and_exported_with_the_secrets_of_a_file(capsys, tmp_path):
    pytest.importorskip("cryptography")
    layout, secret = KVLayout(1, 1, 8, 4, "float32"), "ab" * 32
    settings = {"nvme_path": tmp_path / "s", "nvme_bytes": "1MiB", "nvme_codec": "aes", "backend": "cpu"}
    with Pager.open(layout, PagerConfig("64KiB", "64KiB", namespace_secrets={"mine": secret}, **settings)) as pager:
        seq = pager.begin("mine")
        pager.append(seq, [1, 2, 3, 4, 5])
        with pager.lease([Span(seq, 0, 5)]) as lease:
            lease.commit()
        pager.park("chat", seq)
    engines, daemons = tmp_path / "engine.toml", tmp_path / "pagerd.toml"
    engines.write_text(f'[namespace_secrets]\nmine = "{secret}"\n')
    (tmp_path / "secret").write_text(secret)
    (tmp_path / "secret").chmod(0o600)
    daemons.write_text(f'[namespaces.mine]\nsecret_file = "{tmp_path / "secret"}"\n')
    assert cli.main(["store", "check", str(tmp_path / "s")]) == 2
    assert "secrets of 1 namespaces are not given" in capsys.readouterr().err
    for file in (engines, daemons):
        code, report = store(capsys, "check", tmp_path / "s", "--config", file)
        assert (code, report["blocks"], report["bad_blocks"], report["sessions"]) == (0, 2, 0, 1)
    store(capsys, "export", tmp_path / "s", tmp_path / "open", "--codec", "none", "--config", daemons)
    code, report = store(capsys, "check", tmp_path / "open")
    assert (code, report["blocks"], report["bad_blocks"]) == (0, 2, 0)
