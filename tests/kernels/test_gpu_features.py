"""What the kernels do together, on a CUDA device: turned, mixed, streamed and selected pages; the rest is in test_gpu.py.

Each body takes its device from DEVICE and compares with a float64 reference or with the CPU, so it runs on a CPU as it is.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.kernels import (
    ChunkedAttention,
    PageFormat,
    apply_sink_logits,
    compressed_attention,
    dequantize_blocks,
    mixed_attention,
    omitted_share,
    paged_decode,
    plan_turns,
    quantize_blocks,
    reference,
    reference_compressed,
    score_pages,
    select_pages,
    summarize_blocks,
    turn_table,
    turned_attention,
)
from kvtier.kernels.rope import rotate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
FORMATS = ["fp8", "int8", "int4", "int2", "hack8", "hack4", "hack2"]
LOOSE = {"fp8": (2e-2, 1e-2), "hack": (4e-2, 4e-2)}  # operands in 16 bits; HACK rounds q and p to 8 on top


def tolerance(name: str) -> tuple[float, float]:
    return LOOSE["hack" if name.startswith("hack") else "fp8"]


def there(*tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("dims", [(256, 256), (192, 128), (64, 64)], ids=str)
def test_every_width_of_heads_that_is_compiled_ahead_of_time(make_pages, assert_close, name, dims):
    fmt = PageFormat(name, 2, 64, *dims)
    case = make_pages(fmt, [(1, 9, 3), (40, 4, 0), (300, 2, 7)], group=4, device=DEVICE)
    found = compressed_attention(
        case.q, case.pages, fmt, case.table, case.kv_lens, case.cu_q, case.ahead, scale=case.scale
    )
    assert_close(tuple(x.cpu() for x in found), case.expected(), *tolerance(name))


@pytest.mark.parametrize("name", ["full", "int4", "fp8", "hack8"])
def test_documents_in_any_order(assert_close, name):
    """Keys computed at position 0, met by queries that are turned back: whole pages and compressed ones."""
    torch.manual_seed(2)
    inv_freq = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) * 2 / 64)
    k, v, q = torch.randn(6, 2, 32, 64), torch.randn(6, 2, 32, 64), torch.randn(5, 4, 64)
    table, offsets = [4, 5, 0, 1, 2, 3], [0, 0, 64, 64, 128, 128]
    turns = plan_turns([offsets], inv_freq)
    kept = k, v
    if name != "full":
        fmt, ids = PageFormat(name, 2, 32, 64, group=64 if name == "hack8" else 32), range(6)
        pages = torch.zeros(6, fmt.layer_bytes, dtype=torch.uint8, device=DEVICE)
        quantize_blocks(*there(k, v), ids, pages, ids, fmt)
        kept = tuple(x.float() for x in reference_compressed.dequantize_pages(pages.cpu(), fmt))
    moved = rotate(kept[0][table].double(), turn_table(offsets, inv_freq).double()[:, None, None], 1.0)
    expected = reference.block_attention(q, moved.double(), kept[1][table], scale=0.2)
    if name == "full":
        found = turned_attention(*there(q, k, v), [table], [192], [0, 5], turns, scale=0.2)
    else:
        found = compressed_attention(q.to(DEVICE), pages, fmt, [table], [192], [0, 5], scale=0.2, turns=turns)
    assert_close(tuple(x.cpu() for x in found), expected, *((1e-5, 2e-5) if name == "full" else tolerance(name)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rules", [{}, dict(window=100, sinks=5), dict(softcap=20.0)], ids=str)
def test_compressed_blocks_and_their_tail_are_one_attention(make_pages, assert_close, name, rules):
    fmt, spans, tails = PageFormat(name, 2, 64, 64, group=64), [(1, 9, 0), (20, 3, 0), (1, 0, 0)], [40, 70, 30]
    case = make_pages(fmt, spans, group=4, device=DEVICE)
    k, v = torch.full((2, 5, 2, 64, 64), float("nan"))
    table = np.array([[3, -1], [0, 4], [1, -1]], np.int32)
    for s, tail in enumerate(tails):
        at = torch.arange(tail)
        pages = torch.from_numpy(table[s]).long()[at // 64]
        k[pages, :, at % 64], v[pages, :, at % 64] = torch.randn(2, tail, 2, 64)
    found = mixed_attention(
        case.q, case.pages, fmt, case.table, case.kv_lens, *there(k, v), table, tails, case.cu_q, scale=0.1, **rules
    )
    whole = reference_compressed.dequantize_pages(case.pages.cpu(), fmt)
    for s, (rows, _, _) in enumerate(spans):
        keys, values = (
            torch.cat([
                reference.gather_tokens(old, torch.as_tensor(case.table[s]), case.kv_lens[s]),
                reference.gather_tokens(new.double(), torch.as_tensor(table[s]), tails[s]),
            ])
            for old, new in zip(whole, (k, v))
        )  # fmt: skip
        visible = reference.visible_keys(rows, len(keys), rules.get("window"), rules.get("sinks", 0))
        span = slice(case.cu_q[s], case.cu_q[s + 1])
        expected = reference.dense_attention(
            case.q[span].cpu(), keys, values, visible, scale=0.1, softcap=rules.get("softcap")
        )
        assert_close(tuple(x[span].cpu() for x in found), expected, *tolerance(name))


@pytest.mark.parametrize("rows", [1, 40])
def test_a_context_that_comes_in_chunks_is_one_attention(assert_close, rows):
    torch.manual_seed(0)
    q, k, v = torch.randn(rows, 8, 64), torch.randn(24, 2, 32, 64), torch.randn(24, 2, 32, 64)
    ring = there(torch.zeros(9, 2, 32, 64), torch.zeros(9, 2, 32, 64))
    running = ChunkedAttention(q.to(DEVICE), scale=0.1)
    for start in range(0, 24, 9):
        parts = [x[: len(k[start : start + 9])] for x in ring]
        for part, source in zip(parts, (k, v)):
            part.copy_(source[start : start + 9])
        running.add(*parts)
        for part in ring:
            part.fill_(float("nan"))  # the ring is filled again
    assert_close(tuple(x.cpu() for x in running.result()), reference.block_attention(q, k, v, scale=0.1), 1e-5, 2e-5)


def test_chosen_pages_and_what_was_left_out_are_those_of_the_cpu():
    torch.manual_seed(1)
    k, v, q = torch.randn(64, 2, 16, 64), torch.randn(64, 2, 16, 64), torch.randn(2, 8, 64)
    k[37] += 2.0 * q[0, 0] / q[0, 0].norm() * 4  # one page matters
    table, counts, found = np.stack([np.random.default_rng(s).permutation(64) for s in (0, 1)]), [64, 20], []
    for device in ("cpu", DEVICE):
        pages, values, rows = (x.to(device) for x in (k, v, q))
        summaries = torch.zeros(64, 2, 2, 64, device=device)
        summarize_blocks(pages, range(64), summaries, range(64))
        scores = score_pages(rows, summaries, table, counts)
        chosen = select_pages(scores, counts, 8, scale=0.1)
        lens = chosen.lengths([16 * n for n in counts], 16)
        out, lse = paged_decode(rows, pages, values, chosen.table(table), lens, scale=0.1)
        left_out = omitted_share(scores, chosen, lse, scale=0.1, block=16)
        found.append((summaries.cpu(), chosen.table(table), lens, out.cpu(), lse.cpu(), left_out.cpu()))
    ours, theirs = found[1], found[0]
    assert torch.equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1]) and 37 in ours[1][0]
    assert np.array_equal(ours[2], theirs[2])
    for a, b in zip(ours[3:], theirs[3:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["hack4", "hack2"])
def test_turned_keys_are_turned_back(name):
    """Formats whose K is rotated before it is rounded: the product's order is the device's, so codes may differ by one."""
    fmt, ids = PageFormat(name, 2, 64, 128), range(5)
    k, v = torch.randn(2, 5, 2, 64, 128, generator=torch.Generator().manual_seed(3))
    read = []
    for device in ("cpu", DEVICE):
        pages = torch.zeros(5, fmt.layer_bytes, dtype=torch.uint8, device=device)
        quantize_blocks(k.to(device), v.to(device), ids, pages, ids, fmt)
        out = [torch.empty(5, 2, 64, 128, device=device) for _ in "kv"]
        dequantize_blocks(pages, ids, *out, ids, fmt)
        read.append([x.cpu() for x in out])
    assert torch.allclose(read[0][1], read[1][1], atol=1e-6)
    assert (read[0][0] - read[1][0]).abs().mean() < 1e-2 * (read[0][0] - k).abs().mean()


def test_a_learned_score_without_a_value_joins_at_the_end(assert_close):
    torch.manual_seed(4)
    out, lse, sinks = torch.randn(7, 4, 64), torch.randn(7, 4), torch.randn(4)
    found = apply_sink_logits(*there(out, lse, sinks)).cpu()
    torch.testing.assert_close(found, reference.apply_sink_logits(out, lse, sinks).float(), atol=1e-6, rtol=1e-6)
