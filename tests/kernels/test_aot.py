"""Ahead-of-time compilation for sm_90 and sm_80 without a GPU: everything compiles, nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kvtier.kernels.formats import FORMATS

pytest.importorskip("triton", reason="triton is not installed: no kernels to compile")

# One compile costs about a second: every kernel and format for sm_90, and for sm_80 where its code differs. The soak has
# every case of both.
COMMON = "^(decode|decode_window_sinks|prefill|prefill_page16|blocks|write_kv|copy_rows|merge_parts|merge_states)$"
WIDE = "^(decode_softcap_256|decode_mla|prefill_window_sinks|prefill_mla)$"
PAGES = (
    "^(decode_(fp8|int8|int4|int2|int4_turns|hack8|hack2)|prefill_(int4|hack2)|quantize_(int4_(channel|token)"
    "|fp8_page)|dequantize_int4_token|score_blocks)$"
)
ON_80 = "^(decode|prefill|decode_(fp8|int4|hack2)|prefill_(fp8|hack2)|quantize_fp8_page)$"


def report(arch: int, only: str) -> dict[str, dict]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "kvtier.kernels.aot", "--json", "--arch", str(arch), "--only", only]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    rows = {row["case"]: row for row in json.loads(done.stdout)["rows"]}
    assert not {name: row["problems"] for name, row in rows.items() if row["problems"]}
    assert done.returncode == 0
    return rows


def check_no_spill(rows: dict[str, dict]) -> None:
    for row in rows.values():
        if row["registers"] is None:
            pytest.skip("this triton has no cuobjdump or nvdisasm: kernels compiled, machine code not read")
        assert row["local_accesses"] == 0 and row["stack_bytes"] == 0


@pytest.mark.timeout(900)
def test_hopper_code_neither_spills_nor_misses_its_instructions():
    """One process compiles all of them: half of a compiler's time is its start."""
    rows = report(90, "|".join((COMMON, WIDE, PAGES)))
    assert len(rows) == COMMON.count("|") + WIDE.count("|") + 2 + 14
    check_no_spill(rows)
    for name in ("prefill", "blocks", "prefill_mla"):
        assert rows[name]["HGMMA"] > 0
    for name in ("decode", "decode_window_sinks", "decode_softcap_256", "decode_mla"):
        assert rows[name]["async_copies_16"] > 0
    hacks = [name for name in rows if "hack" in name]
    assert len(hacks) == 3
    for name in hacks:
        assert rows[name]["IGMMA" if name.startswith("prefill") else "IMMA"] > 0  # products of integers
        assert rows[name]["HMMA"] + rows[name]["HGMMA"] == 0
    assert rows["prefill_int4"]["HGMMA"] > 0


@pytest.mark.timeout(900)
def test_ampere_code_does_not_spill():
    """fp8 included: its bytes are read and made through float16 bits, since sm_80 has no e4m3."""
    rows = report(80, ON_80)
    assert len(rows) == 8
    check_no_spill(rows)
    assert rows["prefill"]["HMMA"] > 0


LISTED = """
import json
from kvtier.kernels import aot
print(json.dumps([case.name for case in aot.cases(90)]))
"""


def test_every_format_is_listed_at_every_width_of_heads():
    """Compiled by the soak and by `kvtier bench kernels --aot`; HACK takes no heads wider than its groups allow."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LISTED], env=env, capture_output=True, text=True, check=True)
    names = json.loads(done.stdout)
    assert len(names) == len(set(names))
    widths, refused = ("_64", "", "_256", "_192_128"), {"hack8_256", *(f"hack{n}_192_128" for n in (8, 4, 2))}
    wanted = {f"{name}{width}" for name in FORMATS for width in widths} - refused
    for kind in ("decode", "prefill"):
        assert {f"{kind}_{one}" for one in wanted} < set(names)
        assert not {f"{kind}_{one}" for one in refused} & set(names)
        assert {kind, f"{kind}_64", f"{kind}_256"} < set(names)
    assert {"decode_192_128", "prefill_mla"} < set(names)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [90, 80])
def test_every_case_compiles_and_none_spills(arch):
    rows = report(arch, "")
    check_no_spill(rows)
    assert len(rows) > 150


def test_a_process_that_interprets_refuses_to_compile():
    command = [sys.executable, "-m", "kvtier.kernels.aot", "--only", "merge_states"]
    done = subprocess.run(command, env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode != 0 and "TRITON_INTERPRET" in done.stderr
