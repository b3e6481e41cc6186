"""The compressed pages' kernels as the ahead-of-time report compiles them: formats, shapes and launch options.

Types and alignment are those of a launch on the pool: rows and parts of pages are 16-byte aligned, so are the strides in
bytes and in float16 words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import triton_quant, triton_rows, triton_select
from .formats import FORMATS, PageFormat

Make = Callable[[str, Any, dict[str, Any], dict[str, int]], Any]  # makes a case: name, kernel, arguments, options


def types(names: str, kind: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


HEADS = ((64, 64), (128, 128), (256, 256), (192, 128))  # keys, values; the last are DeepSeek's


def formats() -> list[PageFormat]:
    """Every format at every width of heads that models in use have, and other groups for one of them."""
    found = [fmt for name in FORMATS for dims in HEADS if (fmt := _smallest_group(name, *dims)) is not None]
    return [*found, PageFormat("int4", 8, 128, 256, group=128), PageFormat("int4", 8, 64, 64, group=32)]


def _smallest_group(name: str, head_dim: int, value_dim: int) -> PageFormat | None:
    """In groups of 64 or, where it takes none, of 128; None for heads that it does not take at all (HACK's widest)."""
    for group in (64, 128):
        try:
            return PageFormat(name, 8, 64, head_dim, value_dim, group)
        except ValueError:
            continue
    return None


def name_of(fmt: PageFormat) -> str:
    dims = "" if fmt.head_dim == 128 else f"_{fmt.head_dim}"
    dims += "" if fmt.values.dim == fmt.head_dim else f"_{fmt.values.dim}"
    usual = _smallest_group(fmt.name, fmt.head_dim, fmt.values.dim)
    return f"{fmt.name}{dims}" + ("" if usual is not None and fmt.group == usual.group else f"_group{fmt.group}")


def quant_cases(make: Make) -> Iterator[Any]:
    """Describe quantising and reading back, for K and V of every format."""
    ids = types("source_ids target_ids", "*i32")
    strides = types("x_page x_head x_slot c_page c_head t_page t_head", "i32")
    pointers = dict(x="*bf16", codes="*u8", scales="*fp16", zeros="*fp16", bad="*i32", MARKS=True)
    seen = set()
    for fmt in formats():
        for part in (fmt.keys, fmt.values):
            if part in seen:
                continue
            seen.add(part)
            name = f"{name_of(fmt)}_{part.axis}"
            if part.axis == "channel":
                kernel, shape = triton_quant.quantize_channels, triton_quant.channels_shape(part)
            elif part.axis == "token":
                kernel, shape = triton_quant.quantize_tokens, triton_quant.tokens_shape(part)
            else:
                kernel, shape = triton_quant.quantize_fp8, triton_quant.fp8_shape(part)
            options = dict(num_warps=shape.pop("num_warps"))
            yield make(f"quantize_{name}", kernel, pointers | ids | strides | shape, options)
            shape = triton_quant.dequantize_shape(part)
            options = dict(num_warps=shape.pop("num_warps"))
            yield make(
                f"dequantize_{name}",
                triton_quant.dequantize,
                pointers | ids | strides | shape | dict(ROUND=False),
                options,
            )


def rows_case(make: Make, name: str, fmt: PageFormat, arch: int, rows: int, group: int = 4, **arguments: Any) -> Any:
    """Describe attention on compressed pages for so many query rows per KV head; few are a decode, with splits."""
    shape = triton_rows.compressed_shape(fmt, group, rows, arch)
    options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
    pointers = dict(q="*i8" if fmt.is_hack else "*bf16", steps="*fp32", pages="*u8", words="*fp16", lse="*fp32")
    pointers |= types("table turn_ids kv_lens ahead cu_q tile_sequence tile_start", "*i32")
    numbers = types(
        "q_row q_head q_turn step_row step_head step_turn page_bytes page_words table_row out_row out_head lse_row lse_head",
        "i32",
    )
    numbers |= types("group head_blocks", "i32") | types("scale_log2 softcap", "fp32")
    if rows <= 16:
        numbers |= dict(out="*fp32", out_split="i32")
    else:
        numbers |= dict(out="*bf16", out_split=1, lse_head=1)
    constants = dict(TURNS=False, WINDOW=0, SINKS=0, SOFTCAP=False, ROUND=False)
    return make(name, triton_rows.compressed_rows, pointers | numbers | constants | shape | arguments, options)


def rows_cases(make: Make, arch: int) -> Iterator[Any]:
    """Describe decode and prefill for every format, and what rules and shapes change in the code."""
    for fmt in formats():
        yield rows_case(make, f"decode_{name_of(fmt)}", fmt, arch, 4)
        yield rows_case(make, f"prefill_{name_of(fmt)}", fmt, arch, 512)
    fmt = PageFormat("int4", 8, 64, 128, group=64)
    yield rows_case(make, "decode_int4_window_sinks", fmt, arch, 4, WINDOW=4096, SINKS=4)
    yield rows_case(make, "decode_int4_softcap", fmt, arch, 4, SOFTCAP=True)
    yield rows_case(make, "decode_int4_turns", fmt, arch, 4, TURNS=True)
    yield rows_case(make, "prefill_int4_window_turns", fmt, arch, 512, WINDOW=4096, SINKS=4, TURNS=True)
    yield rows_case(make, "decode_int4_mqa", fmt, arch, 32, 32)
    for name, group in (("int4", 32), ("int2", 32), ("int8", 32), ("int2", 128)):
        fmt = PageFormat(name, 8, 128, 128, group=group)
        yield rows_case(make, f"decode_{name}_group{group}", fmt, arch, 4)


def cases(make: Make, arch: int) -> Iterator[Any]:
    """Describe all kernels of compressed pages."""
    yield from quant_cases(make)
    yield from rows_cases(make, arch)
    pointers = dict(q="*bf16", summaries="*bf16", scores="*fp32") | types("table counts", "*i32")
    strides = types("q_row q_head s_page s_head s_side table_row out_row out_head", "i32")
    shape = triton_select.score_shape(128)
    options = dict(num_warps=shape.pop("num_warps"))
    yield make("score_blocks", triton_select.score_blocks, pointers | strides | shape | dict(GROUP=4), options)
