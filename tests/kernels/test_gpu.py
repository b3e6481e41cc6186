"""The public functions on a CUDA device against the float64 references; needs a GPU, skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.kernels import (
    block_attention,
    copy_blocks,
    merge_many,
    merge_states,
    paged_attention,
    paged_prefill,
    reference,
    write_kv,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SPANS = [(1, 3000), (5, 5), (130, 700), (1, 1), (0, 0), (1, 64)]
SHAPES = [(8, 4, (128, 128)), (2, 1, (64, 64)), (1, 16, (576, 512)), (2, 7, (96, 96)), (2, 2, (256, 256))]
RULES = [{}, dict(window=100, sinks=4), dict(window=64), dict(softcap=20.0)]
# Matrix operands and weights are rounded to the cache's dtype on a GPU.
TOLERANCE = {torch.bfloat16: (1.5e-2, 2e-3), torch.float16: (2e-3, 1e-3), torch.float32: (5e-6, 1e-5)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch_matches_the_reference(make_case, assert_close, shape, dtype):
    heads, group, dims = shape
    for rules in RULES:
        for block in (16, 64):
            case = make_case(
                SPANS, dtype=dtype, heads=heads, group=group, dims=dims, block=block, device="cuda", **rules
            )
            expected = case.expected()
            assert_close(case.run(paged_attention), expected, *TOLERANCE[dtype])
            assert_close(case.run(paged_prefill), expected, *TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_streamed_blocks_merged_with_resident_ones_equal_the_whole(make_case, assert_close, rows):
    case = make_case([(rows, 640 + rows)], dtype=torch.float16, block=64, device="cuda")
    expected = case.expected()
    staged = torch.from_numpy(case.table[0, :6]).long().cuda()
    out, lse = paged_attention(
        case.q, case.k, case.v, case.table[:, 6:], [256 + rows], case.cu_q, scale=case.scale, out_dtype=torch.float32
    )
    part = block_attention(case.q, case.k[staged], case.v[staged], scale=case.scale, out_dtype=torch.float32)
    assert_close(merge_states(out, lse, *part), expected, *TOLERANCE[torch.float16])
    both = torch.stack([out, part[0]]), torch.stack([lse, part[1]])
    assert_close(merge_many(*both), expected, *TOLERANCE[torch.float16])


def test_writes_and_copies_are_byte_equal(make_case):
    case = make_case([(0, 96)], dtype=torch.bfloat16, device="cuda")
    slots = [5, 6, -1, 95, 0]
    expected = case.k.clone()
    new = torch.randn(5, 2, 16, device="cuda").bfloat16()
    reference.write_kv(new, new, expected, case.v.clone(), slots)
    write_kv(new, new, case.k, case.v, np.array(slots))
    assert torch.equal(case.k.view(torch.int16), expected.view(torch.int16))
    rows, target = torch.randn(9, 4096, device="cuda"), torch.zeros(9, 4096, device="cuda")
    copy_blocks(rows, target, [3, 8], [0, 5])
    assert torch.equal(target[[0, 5]], rows[[3, 8]]) and not target[1:5].any()


def test_block_table_on_the_device_is_checked_in_debug_mode(make_case, monkeypatch):
    monkeypatch.setenv("KVTIER_DEBUG", "1")
    case = make_case([(1, 40)], device="cuda")
    case.table[0, 1] = 10_000
    case.table = torch.from_numpy(case.table).cuda()
    with pytest.raises(ValueError, match="block_table"):
        case.run(paged_attention)
