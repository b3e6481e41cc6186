"""Attention mass per page: the softmax of a float64 reference, summed by page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.kernels import page_mass


def reference(q, k, table, length, scale, softcap):
    """[width] in float64, of one sequence."""
    heads, group, block = k.shape[1], q.shape[0] // k.shape[1], k.shape[2]
    used = -(-length // block)
    keys = k[torch.as_tensor(table[:used])].double().transpose(0, 1).reshape(heads, used * block, -1)[:, :length]
    scores = torch.einsum("hd,htd->ht", q.double(), keys.repeat_interleave(group, 0)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weight = torch.nn.functional.pad(scores.softmax(-1), (0, used * block - length))
    return weight.unflatten(1, (used, block)).sum(2).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [16, 8192])
def test_mass_is_that_of_a_float64_softmax(dtype, softcap, chunk, monkeypatch):
    monkeypatch.setattr("kvtier.kernels.mass._CHUNK_TOKENS", chunk)
    torch.manual_seed(3)
    pages, heads, block, dim = 40, 2, 16, 32
    pool = torch.full((pages, 3, heads, block, dim), float("nan"), dtype=dtype)
    lengths = np.array([1, 16, 37, 0, 160])
    order, table = np.random.default_rng(1).permutation(pages), np.full((5, 12), -1, np.int32)
    for i, length in enumerate(lengths):
        used = -(-int(length) // block)
        table[i, :used], order = order[:used], order[used:]
        pool[table[i, :used]] = torch.randn(used, 3, heads, block, dim).to(dtype)
        if length % block:
            pool[table[i, used - 1], :, :, length % block :] = float("nan")  # nothing past a length is believed
    q, k = torch.randn(5, 3 * heads, dim).to(dtype), pool[:, 1]
    found = page_mass(q, k, table, lengths, scale=0.4, softcap=softcap)
    assert found.dtype == torch.float32 and found.shape == (5, 12)
    for i, length in enumerate(lengths.tolist()):
        used = -(-length // block)
        assert (found[i, used:] == 0).all()
        if length:
            wanted = reference(q[i], k, table[i], length, 0.4, softcap)
            assert torch.allclose(found[i, :used].double(), wanted, atol=2e-6)
            assert float(found[i].sum()) == pytest.approx(1.0, abs=1e-5)
