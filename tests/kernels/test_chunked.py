"""A context that comes in chunks: one result, whatever the cut, and never of a row that was overwritten."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import ChunkedAttention, beside_copies, chunked, reference

HEADS, BLOCK, DIM = 2, 16, 8


def pages(count: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    pool = torch.randn(count, 2, HEADS, BLOCK, DIM).to(dtype)
    return pool[:, 0], pool[:, 1]


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("cuts", [[7], [1, 1, 5], [3, 0, 4]])
def test_any_cut_gives_the_attention_over_everything(rows, cuts, assert_close, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_PARTS_BYTES", 2 * HEADS * DIM * 4)  # so that parts are merged on the way, too
    q, (k, v), (k0, v0) = torch.randn(rows, 2 * HEADS, DIM), pages(sum(cuts)), pages(2)
    running = ChunkedAttention(q, scale=0.3)
    running.add_result(*(part.float() for part in reference.block_attention(q, k0, v0, scale=0.3)))
    ring_k, ring_v = pages(max(cuts))
    start = 0
    for count in cuts:
        ring_k[:count], ring_v[:count] = k[start : start + count], v[start : start + count]
        running.add(ring_k[:count], ring_v[:count])
        ring_k[:], ring_v[:] = float("nan"), float("nan")  # the ring is filled again
        start += count
    expected = reference.block_attention(q, torch.cat([k0, k]), torch.cat([v0, v]), scale=0.3)
    assert_close(running.result(), expected)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.bfloat16, None), (torch.float32, 2.0)])
def test_other_dtypes_and_scores(dtype, softcap, assert_close):
    q, (k, v) = torch.randn(1, 2 * HEADS, DIM).to(dtype), pages(4, dtype)
    running = ChunkedAttention(q, scale=0.3, softcap=softcap)
    running.add_result(
        torch.zeros(1, 2 * HEADS, DIM), torch.full((1, 2 * HEADS), float("-inf"))
    )  # no key anywhere else
    for chunk in (slice(0, 3), slice(3, 4)):
        running.add(k[chunk], v[chunk])
    out, lse = running.result()
    assert out.dtype == torch.float32
    expected = reference.block_attention(q.float(), k.float(), v.float(), scale=0.3, softcap=softcap)
    assert_close((out, lse), expected, *((1e-5, 1e-5) if dtype == torch.float32 else (3e-2, 1e-2)))


def test_what_does_not_fit_is_refused():
    running = ChunkedAttention(torch.randn(1, 3, DIM), scale=1.0)
    with pytest.raises(RuntimeError, match="before anything"):
        running.result()
    with pytest.raises(ValueError, match="cannot share"):
        running.add(*pages(1))
    running = ChunkedAttention(torch.randn(1, HEADS, DIM), scale=1.0)
    running.add(*pages(1))
    with pytest.raises(ValueError, match="after pages of"):
        running.add(*(rows[..., :4] for rows in pages(1)))


def test_a_core_is_left_to_the_copies_and_given_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), beside_copies(torch.empty(1, 1, 1)):
            assert torch.get_num_threads() == 2
            raise KeyError
        assert torch.get_num_threads() == 3
        with beside_copies(torch.empty(chunked.FEW_ROWS + 1, 1, 1)):
            assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        with beside_copies(torch.empty(1, 1, 1)):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
