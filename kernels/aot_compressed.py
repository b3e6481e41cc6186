"""The compressed pages' kernels as the ahead-of-time report compiles them: formats, shapes and launch options.

Types and alignment are those of a launch on the pool: rows and parts of pages are 16-byte aligned, so are the strides in
bytes and in float16 words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import triton_quant
from .formats import FORMATS, PageFormat

Make = Callable[[str, Any, dict[str, Any], dict[str, int]], Any]  # makes a case: name, kernel, arguments, options


def types(names: str, kind: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


def formats() -> list[PageFormat]:
    """Every format at the shape that models in use have, and narrow and wide heads for one of them."""
    shapes = [PageFormat(name, kv_heads=8, block=64, head_dim=128, group=64) for name in FORMATS]
    return [*shapes, PageFormat("int4", 8, 128, 256, group=128), PageFormat("int4", 8, 64, 64, group=32)]


def name_of(fmt: PageFormat) -> str:
    return f"{fmt.name}_{fmt.head_dim}" if fmt.head_dim != 128 else fmt.name


def quant_cases(make: Make) -> Iterator[Any]:
    """Describe quantising and reading back, for K and V of every format."""
    ids = types("source_ids target_ids", "*i32")
    strides = types("x_page x_head x_slot c_page c_head t_page t_head", "i32")
    pointers = dict(x="*bf16", codes="*u8", scales="*fp16", zeros="*fp16")
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


def cases(make: Make, arch: int) -> Iterator[Any]:
    """Describe all kernels of compressed pages."""
    yield from quant_cases(make)
