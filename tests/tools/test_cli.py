from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import tomllib

import pytest

from kvtier import KVLayout, Pager, PagerConfig
from kvtier.pager import cold
from kvtier.pager.lease import Span
from kvtier.tiers.errors import KvTierError
from kvtier.tiers.nvme.calls import SystemCalls
from kvtier.tools import cli, inspect, pagerd
from kvtier.tools.demo import _faster


def run(capsys, main, *argv) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def demo(capsys, *argv):
    small = ("--context", 1024, "--needles", 4, "--fast-fill", "--block-size", 16)
    return run(capsys, cli.main, "demo", "--json", *small, *argv)


@pytest.mark.parametrize("argv", [[], ["--nvme-codec", "split", "--dtype", "bfloat16"]])
def test_the_demo_answers_everything_before_and_after_its_restart(capsys, argv):
    code, out, _ = demo(capsys, *argv)
    result = json.loads(out)
    assert code == 0
    assert result["needles_exact"] == result["needles_exact_after_restart"] == result["needles_asked"] == 4
    assert result["recomputed_tokens_after_restart"] == 0 and result["min_margin_nats"] == pytest.approx(22.5, abs=0.1)
    assert result["device_bytes"] <= result["device_cap_bytes"] <= result["kv_bytes"] / 10
    assert result["host_bytes"] <= result["host_cap_bytes"] <= result["kv_bytes"] * 0.3
    assert result["promoted_blocks"] > 0 and result["demoted_blocks"] > 0


def test_the_demo_answers_everything_from_tiers_in_fewer_bits_and_moves_fewer_bytes(capsys):
    code, out, _ = demo(capsys, "--host-format", "int8", "--nvme-format", "int4")
    result, moved = json.loads(out), json.loads(out)["moved_bytes"]
    assert code == 0 and result["needles_exact"] == result["needles_exact_after_restart"] == 4
    assert result["formats"] == {"device": "full", "host": "int8/64", "nvme": "int4/64"}
    assert result["min_margin_nats"] > 19 and result["recomputed_tokens_after_restart"] == 0
    assert result["host_bytes"] <= result["host_cap_bytes"]
    down = result["demoted_blocks"] * 16 * 2048  # as many bytes in full precision
    assert 0 < moved["device_to_host"] + moved["host_to_nvme"] < down / 2.5


def test_the_demo_answers_everything_from_packed_pages_that_move_as_they_are(capsys):
    code, out, _ = demo(capsys, "--device-format", "int8", "--device-bytes", "1MiB")
    result = json.loads(out)
    assert code == 0 and result["needles_exact"] == result["needles_exact_after_restart"] == 4
    assert result["formats"] == dict.fromkeys(("device", "host", "nvme"), "int8/64, full")  # the tail's is full
    assert result["min_margin_nats"] > 21 and result["recomputed_tokens_after_restart"] == 0
    assert result["device_bytes"] <= result["device_cap_bytes"] and result["host_bytes"] <= result["host_cap_bytes"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device-format", "int8", "--nvme-format", "int4"], "nvme='int4/64' below device='int8/64'"),
        (["--host-format", "int3"], "host='int3': 'int3' is unknown; choose full"),
        (["--host-format", "int4", "--nvme-format", "int8"], "regains nothing"),
        (["--device-blocks", 0], "--device-blocks 0"),
        (["--block-size", 24], "block_size=24"),
        (["--dtype", "int3"], "int3"),
        (["--store", "/proc/nowhere/x"], "cannot be written"),
        (["--device-bytes", "many"], "--device-bytes='many'"),
        (["--needles", 0], "--needles 0"),
        (["--nvme-bytes", "512KiB"], "longer than all tiers together"),
        (["--nvme-codec", "gzip"], "nvme_codec='gzip' is unknown; choose none, lz4, zstd, split"),
        (["--nvme-bytes", "1KiB"], "nvme_bytes=1024 holds no block"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(capsys, argv, message):
    code, out, err = demo(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("kvtier: error: ") and message in err


def test_a_store_of_another_model_is_refused(capsys, tmp_path):
    assert demo(capsys, "--store", tmp_path / "s", "--needles", 1)[0] == 0
    code, _, err = demo(capsys, "--store", tmp_path / "s", "--dtype", "bfloat16")
    assert code == 2 and "was made with" in err


def test_inspect_says_what_a_disk_that_refuses_writes_does(capsys, tmp_path, monkeypatch):
    config = PagerConfig(
        "1MiB", "1MiB", nvme_path=tmp_path / "s", nvme_bytes="4MiB", backend="cpu", namespace_quotas={"mine": "1MiB"}
    )
    layout = KVLayout(2, 1, 8, 16, "float32")
    with Pager.open(layout, config) as pager:
        code, out, _ = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "s")
        assert code == 0 and "segments clean" in out and "namespace mine: 0 B of 1.0 MiB" in out
        assert "takes no writes" not in out

        def refuse(self, fd, buffers, offset):
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(SystemCalls, "pwritev", refuse)
        for number in range(cold.MAX_WRITE_ERRORS):
            seq = pager.begin()
            pager.append(seq, [number] * 16)
            with pager.lease([Span(seq, 0, 16)]) as lease:
                lease.commit()
            with pytest.raises(KvTierError):
                pager.park(f"s{number}", seq, timeout_s=10.0)
        _, out, _ = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "s")
        assert "nvme takes no writes: no space left; tried again every 30 s" in out


def test_inspect_reads_a_running_pager_and_then_its_store_at_rest(capsys, tmp_path):
    config = PagerConfig("1MiB", "1MiB", nvme_path=tmp_path / "s", nvme_bytes="4MiB", backend="cpu")
    with Pager.open(KVLayout(2, 1, 8, 16, "float32"), config):
        code, out, _ = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "s", "--json")
        assert code == 0 and set(json.loads(out)["tiers"]) == {"device", "host", "nvme"}
        assert "rate_in_bytes_per_s" in json.loads(out)["tiers"]["device"]
        code, out, _ = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "s")
        assert code == 0 and "CAPACITY" in out
    code, out, _ = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "s")
    assert code == 0 and "store at rest" in out
    code, _, err = run(capsys, inspect.main, "--timeout", 60, "status", tmp_path / "nothing")
    assert code == 3 and "no such socket or store" in err


def test_pagerd_checks_and_prints_a_configuration(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('device_bytes = "1GiB"\nhost_bytes = "2GiB"\n')  # one that engines read too
    assert run(capsys, pagerd.main, "--config", file, "--check-config")[:2] == (0, "config ok\n")
    code, out, _ = run(capsys, pagerd.main, "--config", file, "--print-config", "--host-bytes", "3GiB")
    assert code == 0 and tomllib.loads(out)["host_bytes"] == "3GiB" and "device_bytes" not in out
    file.write_text("nonsense = 1\n")
    code, _, err = run(capsys, pagerd.main, "--config", file, "--check-config")
    assert code == 2 and "'nonsense' is an unknown setting" in err
    code, _, err = run(capsys, pagerd.main, "--config", tmp_path / "none.toml")
    assert code == 2 and "cannot read config file" in err
    code, _, err = run(capsys, pagerd.main, "--socket", tmp_path)
    assert code == 2 and "is no socket" in err


def test_pagerd_makes_secrets_and_tokens(capsys, tmp_path, monkeypatch):
    assert run(capsys, pagerd.main, "--new-secret", tmp_path / "secret")[0] == 0
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    code, _, err = run(capsys, pagerd.main, "--new-secret", tmp_path / "secret")
    assert code == 2 and "cannot be made" in err
    code, out, _ = run(capsys, pagerd.main, "--new-token")
    token, kept = (line.rpartition(": ")[2] for line in out.splitlines())
    monkeypatch.setattr("sys.stdin", io.StringIO(token + "\n"))
    assert code == 0 and run(capsys, pagerd.main, "--hash-token")[1].strip() == kept
    monkeypatch.setattr("sys.stdin", io.StringIO("my password\n"))
    code, _, err = run(capsys, pagerd.main, "--hash-token")
    assert code == 2 and "my password" not in err


def test_doctor_says_what_each_missing_thing_costs(capsys, tmp_path):
    code, out, _ = run(capsys, cli.main, "doctor", "--path", tmp_path, "--json")
    findings = json.loads(out)
    assert code == 0 and all(f["is_good"] or (f["cost"] and f["mend"]) for f in findings)
    assert {"huge pages", "reserved pages", "prefault", "NUMA nodes", "memlock limit"} <= {f["name"] for f in findings}
    text = run(capsys, cli.main, "doctor", "--path", tmp_path)[1]
    assert text.count("mend:") == text.count("costs:") == sum(line.startswith("miss") for line in text.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_which_row_cuts_the_kernels_and_measures_on_request(tmp_path, capsys, monkeypatch):
    from kvtier.kernels import tuning
    from kvtier.tools import tune

    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    measured = tune.decode_seconds
    monkeypatch.setattr(tune, "decode_seconds", lambda row, kind: measured(row, kind, tokens=2048, rounds=1))
    said = []
    for options in ([], ["--tune"]):
        tuning._looked_up.cache_clear()
        assert cli.main(["doctor", "--path", str(tmp_path), "--json", *options]) == 0
        (line,) = [one["found"] for one in json.loads(capsys.readouterr().out) if one["name"] == "tuning"]
        said.append(line)
    tuning._looked_up.cache_clear()
    assert "from the table" in said[0] and "measured on this device" in said[1] and (tmp_path / "tuning.json").exists()


def test_help_and_light_commands_import_nothing_heavy():
    """`kvtier --help` has to come at once: benchmarks and engines are imported for the command that needs them."""
    script = (
        "import sys\n"
        "from kvtier.tools import cli\n"
        "for words in (['--help'], ['bench', '--help'], ['store', '--help'], ['replay', '--help'], ['doctor', '--help']):\n"
        "    try:\n"
        "        cli.main(words)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0, words\n"
        "assert not {'torch', 'transformers', 'zarr'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "--capacity C,.." in done.stdout and "TRACE" in done.stdout  # the chosen one tells all


def test_a_resume_is_compared_with_a_real_prefill_only():
    told = {"prefill_s": 45.0, "resume_ttft_s": 0.5}
    assert _faster(told | {"fill": "prefill"}) == " (90x faster)"
    assert _faster(told | {"fill": "fast"}) == ""
