"""Rows of `kvtier bench accuracy` for turning K by a Hadamard matrix before it is rounded to 2 bits: where it pays.

Keys are random, evenly loud, or with some channels or tokens loud; the figure is the error of the scores q.k, as a share
of how far the scores spread. With a scale per channel (int2) a loud channel has a scale of its own, and turning spreads it
over all; with a scale per token (hack2) it takes the codes of all others, and turning takes that away. The format's own way
is the value, the other way the reference, in the same run. Beside them fp8 and int8, which have no zero point, against int4,
which has one: a channel that lies off zero costs them codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .harness import Row

if TYPE_CHECKING:
    from torch import Tensor

DIM, BLOCK, BLOCKS, ROWS, LOUD = 128, 64, 16, 16, 8.0
FORMATS = ("int2", "hack2")
WITHOUT_ZERO, WITH_ZERO = ("fp8", "int8"), "int4"
KINDS = ("even", "loud channels", "constant loud channels", "loud tokens")


def rotation_rows() -> list[Row]:
    """For each kind of keys the error of each format's scores, turned and not turned."""
    import torch

    from ...kernels import PageFormat

    rows = []
    for kind in KINDS:
        generator = torch.Generator().manual_seed(0)
        k = _keys(kind, torch.randn(BLOCKS, 1, BLOCK, DIM, generator=generator))
        q = torch.randn(BLOCKS, 1, ROWS, DIM, generator=generator)
        for name in FORMATS:
            fmt = PageFormat(name, 1, BLOCK, DIM)
            plain, turned = (_error(q, k, fmt, is_turned=is_turned) for is_turned in (False, True))
            ours, other = (turned, plain) if fmt.rotates else (plain, turned)
            reference = "K not turned" if fmt.rotates else "K turned first"
            rows.append(
                Row(f"keys: {kind}", f"error of scores, {name}", ours, "of spread", reference, other, other / ours)
            )
        beside = _error(q, k, PageFormat(WITH_ZERO, 1, BLOCK, DIM), is_turned=False)
        for name in WITHOUT_ZERO:
            ours = _error(q, k, PageFormat(name, 1, BLOCK, DIM), is_turned=False)
            metric, reference = f"error of scores, {name}", f"{WITH_ZERO}, same keys"
            rows.append(Row(f"keys: {kind}", metric, ours, "of spread", reference, beside, beside / ours))
    return rows


def _keys(kind: str, k: Tensor) -> Tensor:
    if kind == "loud channels":
        k[..., ::16] *= LOUD
    elif kind == "constant loud channels":
        k[..., ::16] += LOUD
    elif kind == "loud tokens":
        k[:, :, ::32] *= LOUD
    return k


def _error(q: Tensor, k: Tensor, fmt: object, *, is_turned: bool) -> float:
    """Of q.k, as a share of the spread of the scores, which is all that attention sees."""
    import torch

    from ...kernels import PageFormat, quantize_blocks
    from ...kernels.conversion import read_keys
    from ...kernels.cpu_quant import hadamard

    assert isinstance(fmt, PageFormat)
    exact = q @ k.transpose(-1, -2)
    if is_turned != fmt.rotates:  # a second turn undoes the first
        q, k = q @ hadamard(DIM), k @ hadamard(DIM)
    pages, ids = torch.zeros(len(k), fmt.layer_bytes, dtype=torch.uint8), range(len(k))
    quantize_blocks(k, k, ids, pages, ids, fmt)
    found = q @ read_keys(pages, ids, fmt).transpose(-1, -2)
    spread = (exact - exact.mean(-1, keepdim=True)).std()
    return float((found - exact).std() / spread)
