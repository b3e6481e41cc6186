"""The public functions on a CUDA device against the float64 references; needs a GPU, skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.kernels import (
    PageFormat,
    block_attention,
    compressed_attention,
    copy_blocks,
    dequantize_blocks,
    merge_many,
    merge_states,
    paged_attention,
    paged_prefill,
    quantize_blocks,
    reference,
    score_pages,
    select_pages,
    summarize_pages,
    to_device,
    write_kv,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SPANS = [(1, 3000), (5, 5), (130, 700), (1, 1), (0, 0), (1, 64)]
SHAPES = [(8, 4, (128, 128)), (2, 1, (64, 64)), (1, 16, (576, 512)), (2, 7, (96, 96)), (2, 2, (256, 256))]
RULES = [{}, dict(window=100, sinks=4), dict(window=64), dict(softcap=20.0)]
RULE_NAMES = ["plain", "window-and-sinks", "window", "softcap"]  # gpu_check chooses by these
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


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "hack8", "hack4", "hack2"])
@pytest.mark.parametrize("rules", RULES, ids=RULE_NAMES)
def test_compressed_pages_match_the_reference(make_pages, assert_close, name, rules):
    """Folded scales meet q in bfloat16, fp8's codes in float16; HACK rounds q and p to 8 bits on top."""
    for dims, size, group in (((128, 128), 128, 4), ((64, 64), 64, 1), ((256, 256), 64, 2), ((128, 128), 64, 8)):
        if name == "hack8" and size < dims[0]:
            continue
        fmt = PageFormat(name, 2, 64, *dims, group=size)
        spans = [(1, 20, 3), (130, 4, 0), (1, 0, 2), (5, 1, 70)]
        case = make_pages(fmt, spans, group=group, device="cuda", **rules)
        found = compressed_attention(
            case.q, case.pages, fmt, case.table, case.kv_lens, case.cu_q, case.ahead, scale=case.scale, **rules
        )
        tolerances = (4e-2, 4e-2) if fmt.is_hack else (2e-2, 1e-2)
        assert_close(tuple(x.cpu() for x in found), case.expected(), *tolerances)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "hack8"])
def test_quantised_bytes_are_those_of_the_cpu(name):
    fmt = PageFormat(name, 2, 64, 128, group=128)
    k, v = torch.randn(2, 5, 2, 64, 128)
    here, there = (torch.zeros(5, fmt.layer_bytes, dtype=torch.uint8, device=d) for d in ("cpu", "cuda"))
    quantize_blocks(k, v, range(5), here, range(5), fmt)
    quantize_blocks(k.cuda(), v.cuda(), range(5), there, range(5), fmt)
    assert torch.equal(here, there.cpu())
    out = torch.empty(2, 5, 2, 64, 128), torch.empty(2, 5, 2, 64, 128, device="cuda")
    for pages, (keys, values) in ((here, out[0]), (there, out[1])):
        dequantize_blocks(pages, range(5), keys, values, range(5), fmt)
    assert torch.allclose(out[0], out[1].cpu(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2", "hack8", "hack4", "hack2"])
def test_blocks_that_no_format_holds_are_marked_as_on_the_cpu(name, sync_debug):
    fmt, ids = PageFormat(name, 2, 64, 128, group=128), np.arange(8)
    k, v = torch.randn(2, 8, 2, 64, 128)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e30)):
        (k, v)[i % 2][2 * i, 1, 63, 17] = value
    made = []
    for device in ("cpu", "cuda"):
        pages = torch.zeros(8, fmt.layer_bytes, dtype=torch.uint8, device=device)
        bad, x, y = torch.zeros(8, dtype=torch.int32, device=device), k.to(device), v.to(device)
        if device == "cuda":
            quantize_blocks(x, y, ids, pages, ids, fmt)  # compiled
            quantize_blocks(x, y, ids, pages, ids, fmt, bad=bad)
            bad.zero_()
            sync_debug()
        quantize_blocks(x, y, ids, pages, ids, fmt, bad=bad)
        made.append((pages, bad))
    torch.cuda.set_sync_debug_mode("default")
    assert made[0][1].tolist() == [1, 0] * 4 and made[1][1].tolist() == [1, 0] * 4
    if not fmt.rotates:  # by a matrix product, whose order is the device's
        assert torch.equal(made[0][0][1::2], made[1][0][1::2].cpu())


def test_pages_are_scored_as_on_the_cpu():
    summaries = torch.randn(300, 2, 2, 128).sort(2).values
    q, table = torch.randn(3, 8, 128), torch.stack([torch.randperm(300) for _ in range(3)])
    expected = score_pages(q, summaries, table, [300, 7, 0])
    found = score_pages(q.cuda(), summaries.cuda(), table, [300, 7, 0]).cpu()
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.fixture
def sync_debug():
    """Switches on that torch raises where it would wait for the device itself."""

    def switch_on() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield switch_on
    torch.cuda.set_sync_debug_mode("default")


def test_uploads_are_queued_behind_work_that_still_runs():
    values = np.arange(1000)
    torch.cuda._sleep(1 << 30)  # cycles: half a second
    there = to_device(values, torch.device("cuda", 0), torch.int32)
    assert not torch.cuda.current_stream().query(), "the host has waited for the device"
    values[:] = -1  # the host's own from here on
    assert there.tolist() == list(range(1000)) and there.dtype == torch.int32


def test_a_step_waits_for_nothing(make_case, make_pages, sync_debug):
    """Tables, slots and row numbers of a whole step, with plans made anew."""
    case, fmt = make_case(SPANS, dtype=torch.bfloat16, block=64, device="cuda"), PageFormat("int4", 2, 64, 64, group=64)
    packed = make_pages(fmt, [(1, 20, 3), (5, 1, 70)], group=4, device="cuda")
    new, staged = torch.randn(5, *case.k.shape[1:4:2], device="cuda").bfloat16(), np.arange(6)
    rows = case.k[:, 0].flatten(1)
    blocks = torch.randn(2, 4, 2, 64, 64, device="cuda").bfloat16()
    summaries = torch.randn(300, 2, 2, 16, device="cuda").sort(2).values
    q, table = torch.randn(3, 4, 16, device="cuda"), np.arange(300)[None].repeat(3, 0)
    compressed_attention(
        packed.q, packed.pages, fmt, packed.table, packed.kv_lens, packed.cu_q, packed.ahead, scale=packed.scale
    )
    case.run(paged_attention)  # compiled, and what is made once is made
    sync_debug()
    write_kv(new, new, case.k, case.v, np.array([5, 6, -1, 95, 0]))
    out, lse = case.run(paged_attention, out_dtype=torch.float32)
    part = block_attention(case.q, case.k, case.v, scale=case.scale, out_dtype=torch.float32, pages=staged)
    merge_states(out, lse, *part)
    copy_blocks(rows, torch.empty_like(rows), staged, staged)
    quantize_blocks(*blocks, range(4), packed.pages, range(4), fmt)
    dequantize_blocks(packed.pages, range(4), *blocks, range(4), fmt)
    compressed_attention(
        packed.q, packed.pages, fmt, packed.table, packed.kv_lens, packed.cu_q, packed.ahead, scale=packed.scale
    )
    select_pages(score_pages(q, summaries, table, [300, 7, 2]), [300, 7, 2], 8, scale=0.25)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2"])
def test_compressed_pages_are_summarised_as_on_the_cpu(name):
    k = torch.randn(9, 2, 64, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    fmt, ids = PageFormat(name, 2, 64, 128), range(9)
    pages = torch.zeros(9, fmt.layer_bytes, dtype=torch.uint8)
    quantize_blocks(k, k, ids, pages, ids, fmt)
    made = [torch.zeros(9, 2, 2, 128, dtype=torch.bfloat16, device=device) for device in ("cpu", "cuda")]
    for target in made:
        summarize_pages(pages.to(target.device), ids, fmt, target, ids)
    torch.testing.assert_close(made[1].cpu(), made[0], rtol=1e-2, atol=1e-6)
