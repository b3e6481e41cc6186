"""Compile the Triton kernels ahead of time, without a GPU, and report what the machine code holds.

    python -m kvtier.kernels.aot [--json] [--arch 90 --arch 80] [--only decode]

A case is a kernel with the argument types and constants of a real launch; tile sizes come from the launchers' own
functions, so what is compiled here is what runs there. Guards: no kernel spills or uses local memory, and the matrix
kernels use tensor cores. Run it in a process of its own where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.6 does; 3.9 warns when it is not said

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import aot_compressed, triton_cache, triton_common, triton_decode, triton_merge, triton_prefill

ARCHS = (90, 80)
_WORD = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TYPE = re.compile(r"^\*?(bf16|fp16|fp32|i1|i8|u8|i16|i32|i64|u64)$")
_UNALIGNED = (
    "table_row",
    "lse_row",
    "out_split",
    "lse_head",
    "group",
    "head_blocks",
    "heads",
    "count",
    "rows",
    "step_row",
    "step_head",
    "step_turn",
)


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched: types and constants by argument name, and compiler options."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def _types(names: str, kind: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


def _attention(name: str, kernel: Any, shape: dict[str, Any], dtype: torch.dtype, **arguments: Any) -> Case:
    """Describe an attention kernel; a launcher's choice of shape holds both constants and compiler options."""
    options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
    common = _types("q k v", _WORD[dtype]) | _types("q_row q_head k_page k_head k_slot v_page v_head v_slot", "i32")
    common |= _types("out_row out_head lse_row lse_head table_row group head_blocks", "i32")
    common |= dict(table="*i32", kv_lens="*i32", lse="*fp32", scale_log2="fp32", softcap="fp32", ROUND=False)
    common |= dict(WINDOW=0, SINKS=0, SOFTCAP=False, COMPUTE=triton_common.compute_dtype(dtype))
    return Case(name, kernel, common | arguments | shape, options)


def decode_case(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group: int = 4,
    block: int = 64,
    dims: tuple[int, int] = (128, 128),
    splits: bool = True,
    **arguments: Any,
) -> Case:
    """Describe a launch of the decode kernel; with splits it writes float32 parts."""
    shape = triton_decode.decode_shape(group, block, *dims, dtype)
    if splits:
        arguments |= dict(out="*fp32", out_split="i32")
    else:
        arguments |= dict(out=_WORD[dtype], out_split=1, lse_head=1)
    return _attention(name, triton_decode.decode_split, shape, dtype, **arguments)


def prefill_case(
    name: str,
    arch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group: int = 4,
    block: int = 64,
    dims: tuple[int, int] = (128, 128),
    **arguments: Any,
) -> Case:
    """Describe a launch of the prefill kernel."""
    shape = triton_prefill.prefill_shape(group, block, *dims, dtype, arch)
    arguments = _types("cu_q tile_sequence tile_start", "*i32") | dict(CAUSAL=True) | arguments
    return _attention(name, triton_prefill.prefill_tile, shape, dtype, out=_WORD[dtype], lse_head=1, **arguments)


def _other_cases() -> Iterator[Case]:
    """Describe the kernels that move and merge."""
    strides = _types("kn_token kn_head vn_token vn_head k_page k_head k_slot v_page v_head v_slot heads", "i32")
    constants = dict(PAGE=64, HEADS=8, DK=128, DKP=128, DV=128, DVP=128, ROUND=False)
    pointers = _types("k_new v_new k v", "*bf16") | dict(slots="*i64")
    yield Case("write_kv", triton_cache.write_tokens, pointers | strides | constants, dict(num_warps=4))

    pointers = _types("source target source_ids target_ids", "*i64")
    constants = dict(HAS_SOURCE=True, HAS_TARGET=True, WORDS=triton_cache.COPY_WORDS)
    strides = _types("words source_row target_row", "i32")
    yield Case("copy_rows", triton_cache.copy_words, pointers | strides | constants, dict(num_warps=4))

    pointers = _types("parts part_lse lse", "*fp32") | dict(out="*bf16")
    strides = _types("count heads part_p part_t part_h plse_t plse_h out_t out_h lse_t", "i32")
    constants = dict(plse_p=1, lse_h=1, D=128, DP=128, TILE=triton_merge.PART_TILE, ROUND=False)
    yield Case("merge_parts", triton_merge.merge_rows, pointers | strides | constants, dict(num_warps=2))

    pointers = _types("out_a out_b out", "*bf16") | _types("lse_a lse_b lse", "*fp32")
    yield Case(
        "merge_states",
        triton_merge.merge_two,
        pointers | dict(rows="i32", D=128, DP=128, R=8, ROUND=False),
        dict(num_warps=4),
    )


def cases(arch: int) -> list[Case]:
    """List what is compiled: the launches that models in use make, and the edges of what we claim."""
    return [
        decode_case("decode"),
        decode_case("decode_one_split", splits=False),
        decode_case("decode_page16", block=16),
        decode_case("decode_window_sinks", WINDOW=4096, SINKS=4),
        decode_case("decode_softcap_256", dims=(256, 256), group=2, SOFTCAP=True),
        decode_case("decode_mqa_fp16", torch.float16, group=32, dims=(64, 64)),
        decode_case("decode_mla", group=16, dims=(576, 512)),
        decode_case("decode_fp32", torch.float32),
        decode_case("decode_dim96", dims=(96, 96), group=1),
        decode_case("decode_64", dims=(64, 64)),
        decode_case("decode_256", dims=(256, 256)),
        decode_case("decode_192_128", dims=(192, 128)),
        prefill_case("prefill", arch),
        prefill_case("prefill_page16", arch, block=16),
        prefill_case("prefill_window_sinks", arch, WINDOW=4096, SINKS=4),
        prefill_case("prefill_softcap_256", arch, dims=(256, 256), group=2, SOFTCAP=True),
        prefill_case("prefill_mla", arch, group=1, dims=(192, 128)),
        prefill_case("prefill_64", arch, dims=(64, 64)),
        prefill_case("prefill_256", arch, dims=(256, 256)),
        prefill_case("prefill_mla_absorbed", arch, group=16, dims=(576, 512)),
        prefill_case("prefill_fp32", arch, torch.float32),
        prefill_case("blocks", arch, CAUSAL=False),
        *_other_cases(),
        *aot_compressed.cases(Case, arch),
    ]


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Compile one case for one architecture; return its resources and instruction counts."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], Any] = {}
    for i, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        if isinstance(value, str) and _TYPE.match(value):
            signature[name] = value
            if value.startswith("*") or (value in ("i32", "i64") and name not in _UNALIGNED):  # as the JIT would find
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=hints)
    start = time.perf_counter()
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    row = dict(
        case=case.name, arch=arch, seconds=round(time.perf_counter() - start, 3), shared_bytes=binary.metadata.shared
    )
    return row | _read_cubin(binary.asm["cubin"])


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    """Read registers, local memory and instruction counts from machine code; None where the tools are missing."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "cuobjdump").exists() or not (tools / "nvdisasm").exists():
        return dict(registers=None, stack_bytes=None, local_accesses=None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout

    def find(key: str) -> int | None:
        return next((int(x) for x in re.findall(rf"\b{key}:(\d+)", usage)), None)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return dict(
        registers=find("REG"), stack_bytes=find("STACK"), local_accesses=count(r"\b(?:LDL|STL)\b"),
        HGMMA=count(r"\bHGMMA"), HMMA=count(r"\bHMMA"), IGMMA=count(r"\bIGMMA"), IMMA=count(r"\bIMMA"), FFMA=count(r"\bFFMA"),
        async_copies_16=count(r"\bLDGSTS\S*\.128"), loads_16=count(r"\bLDG\.E\.(?:\w+\.)*128"),
    )  # fmt: skip


def problems(row: dict[str, Any]) -> list[str]:
    """Say what is wrong with a compiled kernel."""
    if "error" in row:
        return [row["error"]]
    if row["registers"] is None:
        return []
    found = [f"{row[key]} {key}" for key in ("local_accesses", "stack_bytes") if row[key]]
    is_matrix = row["case"].startswith(("decode", "prefill", "blocks")) and "fp32" not in row["case"]
    if is_matrix and not sum(row[key] for key in ("HGMMA", "HMMA", "IGMMA", "IMMA")):
        found.append("no tensor-core instruction")
    return found


def report(archs: Sequence[int] = ARCHS, only: str = "") -> list[dict[str, Any]]:
    """Compile every case for every architecture, in as many processes as there are cores."""
    if triton_common.IS_INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels cannot be compiled in this process")
    jobs = [(arch, i) for arch in archs for i, case in enumerate(cases(arch)) if re.search(only, case.name)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(_row, jobs))


def _row(job: tuple[int, int]) -> dict[str, Any]:
    """What becomes of one case, named by architecture and place in its list."""
    arch, index = job
    case = cases(arch)[index]
    try:
        row = compile_case(case, arch)
    except Exception as error:  # the compiler's errors have no common class; one bad case is a row
        row = dict(case=case.name, arch=arch, error=f"{type(error).__name__}: {str(error)[:300]}")
    return row | dict(problems=problems(row))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; exit 1 when a kernel fails to compile, spills or misses the tensor cores."""
    parser = argparse.ArgumentParser(prog="python -m kvtier.kernels.aot", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--arch", type=int, action="append", help="compute capability, e.g. 90; may be repeated")
    parser.add_argument("--only", default="", help="cases whose name matches this pattern")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kvtier-aot-") as fresh:
        os.environ.setdefault("TRITON_CACHE_DIR", fresh)
        rows = report(options.arch or ARCHS, options.only)
    if options.json:
        print(json.dumps(dict(triton=triton.__version__, rows=rows)))
    else:
        for row in rows:
            facts = "  ".join(
                f"{k} {v}" for k, v in row.items() if k not in ("case", "arch", "problems", "error") and v
            )
            print(f"{row['case']:22s} sm_{row['arch']}  {facts}  {'; '.join(row['problems'])}")
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
