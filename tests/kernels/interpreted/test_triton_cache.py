"""Writing tokens and copying rows with Triton: byte-equal to the references, nothing else touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.kernels import reference, triton_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_tokens_land_in_their_slots(make_case, dtype, heads):
    slots = [5, 6, 7, -1, 47, 0, 16]
    case = make_case([(0, 48)], dtype=dtype, heads=heads, dims=(24, 16))
    expected_k, expected_v = case.k.clone(), case.v.clone()
    k_new, v_new = torch.randn(heads, 7, 24).transpose(0, 1), torch.randn(7, heads, 16)  # cast on the way in
    reference.write_kv(k_new, v_new, expected_k, expected_v, slots)
    triton_cache.write_kv(k_new, v_new, case.k, case.v, torch.tensor(slots))
    for ours, expected in ((case.k, expected_k), (case.v, expected_v)):
        assert torch.equal(torch.nan_to_num(ours.float()), torch.nan_to_num(expected.float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [(0, 48), (8, 40), (3, 10)])
def test_rows_are_copied_as_the_widest_words(dtype, columns):
    pool = torch.randint(0, 100, (12, 48)).to(dtype)
    source, target = pool[:, slice(*columns)], torch.zeros(9, 48, dtype=dtype)[:, slice(*columns)]
    expected = target.clone()
    ids, to = np.array([3, 11, 3]), np.array([8, 0, 5])
    reference.copy_blocks(source, expected, ids, to)
    triton_cache.copy_rows(source, target, ids, to, 3)
    assert torch.equal(target, expected)
    gathered = torch.zeros(3, source.shape[1], dtype=dtype)
    triton_cache.copy_rows(source, gathered, ids, None, 3)
    assert torch.equal(gathered, source[ids])
    triton_cache.copy_rows(gathered, target, None, to, 3)
    assert torch.equal(target, expected)


def test_long_rows_take_several_programs():
    source = torch.randint(0, 1 << 40, (3, 2 * triton_cache.COPY_WORDS + 5))
    target = torch.zeros_like(source)
    triton_cache.copy_rows(source, target, np.array([2, 0]), np.array([0, 1]), 2)
    assert torch.equal(target[:2], source[[2, 0]]) and not target[2].any()


def test_word_width_follows_alignment():
    rows = torch.zeros(4, 64, dtype=torch.uint8)
    for columns, word in (((0, 64), 8), ((4, 12), 4), ((2, 8), 2), ((1, 9), 1)):
        view = rows[:, slice(*columns)]
        assert triton_cache.as_words(view, view)[0].element_size() == word


def test_slots_and_rows_beyond_two_gib_are_reached():
    """Page and row numbers times strides pass 2**31: offsets are 64-bit. Both are 5 GiB of untouched addresses."""
    block, dim, pages = 16, 16, 1 << 16
    far = torch.empty((pages - 1) * 40_000 + 2 * block * dim, dtype=torch.float16)
    k, v = (far.as_strided((pages, 1, block, dim), (40_000, block * dim, dim, 1), at) for at in (0, block * dim))
    new = torch.randn(2, 2, 1, dim).half()
    triton_cache.write_kv(*new, k, v, torch.tensor([pages * block - 1, (pages - 1) * block]))
    assert torch.equal(k[-1, 0, [-1, 0]], new[0, :, 0]) and torch.equal(v[-1, 0, [-1, 0]], new[1, :, 0])
    count, row = 1 << 16, 80_001  # words of one byte
    rows = torch.empty((count - 1) * row + 64, dtype=torch.uint8).as_strided((count, 64), (row, 1))
    source, back = torch.randint(0, 256, (1, 64), dtype=torch.uint8), torch.zeros(1, 64, dtype=torch.uint8)
    triton_cache.copy_rows(source, rows, np.array([0]), np.array([count - 1]), 1)
    triton_cache.copy_rows(rows, back, np.array([count - 1]), np.array([0]), 1)
    assert torch.equal(rows[-1:], source) and torch.equal(back, source)
