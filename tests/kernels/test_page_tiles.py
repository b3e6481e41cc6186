"""How compressed pages' kernels are cut: every format has its rows, and the compiler is asked for nothing that it refuses."""

from __future__ import annotations

import pytest

from kvtier.kernels import PageFormat
from kvtier.kernels.formats import FORMATS
from kvtier.kernels.page_tiles import TABLE, page_cut

pytest.importorskip("triton", reason="triton is not installed: nothing is cut")


def test_every_format_has_a_row_for_narrow_and_one_for_wide_heads():
    assert TABLE.keys() == FORMATS.keys()
    for name in FORMATS:
        assert page_cut(PageFormat(name, 1, 64, 128, group=128)) is TABLE[name][0]
    assert page_cut(PageFormat("int8", 1, 64, 192, 128)) is TABLE["int8"][1]
    assert page_cut(PageFormat("int4", 1, 64, 256)) is TABLE["int4"][1]


def test_two_bit_heads_of_64_take_one_warp():
    assert page_cut(PageFormat("int2", 1, 64, 64)).warps == 1 == page_cut(PageFormat("hack2", 1, 64, 64)).warps
    assert page_cut(PageFormat("int4", 1, 64, 64)).warps == 4 == page_cut(PageFormat("int2", 1, 64, 128)).warps


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("rows", [1, 16, 40, 4096])
def test_cuts_are_powers_of_two_within_a_block_and_a_group(rows, arch):
    from kvtier.kernels.triton_rows import compressed_shape

    for name in FORMATS:
        for block in (32, 128):
            fmt = PageFormat(name, 2, block, 64, group=64)
            cut = compressed_shape(fmt, 4, rows, arch)
            assert cut["TILE"] <= block and block % cut["TILE"] == 0
            assert fmt.keys.axis != "channel" or cut["TILE"] <= fmt.keys.group  # a tile has one row of scales
            assert not fmt.is_hack or cut["TILE"] == fmt.values.group
            assert min(16, rows) <= cut["M"] == cut["HEADS"] * cut["TOKENS"] or cut["M"] == 16
            for key in ("M", "TILE", "num_warps"):
                assert cut[key] & (cut[key] - 1) == 0
            assert cut["K_PIECE"] * cut["K_PIECES"] == fmt.keys.dim
    wide = compressed_shape(PageFormat("int8", 2, 64, 192, 128), 4, rows, arch)
    assert (wide["K_PIECE"], wide["K_PIECES"], wide["K_ROW"]) == (96, 2, 192)
