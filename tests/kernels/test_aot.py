"""Ahead-of-time compilation for sm_90 and sm_80 without a GPU: everything compiles, nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed: no kernels to compile")

# One compile costs about a second: all kernels, the variants that differ in code, and sm_80 where its tiles differ.
COMMON = "^(decode|decode_window_sinks|prefill|prefill_page16|blocks|write_kv|copy_rows|merge_parts|merge_states)$"
WIDE = "^(decode_softcap_256|decode_mla|decode_dim96|decode_mqa_fp16|prefill_window_sinks|prefill_mla|prefill_fp32)$"
PAGES = (
    "^(decode_(fp8|int8|int4|int2|int4_turns|int2_group32|hack8|hack2)|prefill_(int4|hack2)|quantize_(int4_(channel|token)"
    "|fp8_page)|dequantize_int4_token|score_blocks)$"
)
PAGES_80 = "^(decode_(fp8|int4|hack2)|prefill_(fp8|hack4|hack2|int2)|quantize_fp8_page)$"


def report(arch: int, only: str) -> dict[str, dict]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "kvtier.kernels.aot", "--json", "--arch", str(arch), "--only", only]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    rows = {row["case"]: row for row in json.loads(done.stdout)["rows"]}
    assert not {name: row["problems"] for name, row in rows.items() if row["problems"]}
    assert done.returncode == 0
    return rows


@pytest.mark.timeout(240)
@pytest.mark.parametrize("only", [COMMON, WIDE], ids=["common", "wide"])
def test_hopper_code_neither_spills_nor_misses_its_instructions(only):
    rows = report(90, only)
    assert len(rows) == only.count("|") + 1
    for name, row in rows.items():
        if row["registers"] is None:
            pytest.skip("this triton has no cuobjdump or nvdisasm: kernels compiled, machine code not read")
        assert row["local_accesses"] == 0 and row["stack_bytes"] == 0
        if name in ("prefill", "blocks", "prefill_mla"):
            assert row["HGMMA"] > 0
        if name.startswith("decode"):
            assert row["async_copies_16"] > 0


@pytest.mark.timeout(240)
def test_ampere_code_does_not_spill():
    rows = report(80, COMMON)
    assert rows["prefill"]["registers"] is None or rows["prefill"]["HMMA"] > 0


@pytest.mark.timeout(240)
def test_hopper_code_for_compressed_pages_neither_spills_nor_misses_its_instructions():
    rows = report(90, PAGES)
    assert len(rows) == 15
    for name, row in rows.items():
        if row["registers"] is None:
            pytest.skip("this triton has no cuobjdump or nvdisasm: kernels compiled, machine code not read")
        assert row["local_accesses"] == 0 and row["stack_bytes"] == 0
        if "hack" in name:
            assert row["IGMMA" if name.startswith("prefill") else "IMMA"] > 0  # products of integers
            assert row["HMMA"] + row["HGMMA"] == 0
    assert rows["prefill_int4"]["HGMMA"] is None or rows["prefill_int4"]["HGMMA"] > 0


@pytest.mark.timeout(240)
def test_ampere_code_for_compressed_pages_does_not_spill():
    """fp8 included: its bytes are read and made through float16 bits, since sm_80 has no e4m3."""
    assert len(report(80, PAGES_80)) == 8


def test_a_process_that_interprets_refuses_to_compile():
    command = [sys.executable, "-m", "kvtier.kernels.aot", "--only", "merge_states"]
    done = subprocess.run(command, env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode != 0 and "TRITON_INTERPRET" in done.stderr
