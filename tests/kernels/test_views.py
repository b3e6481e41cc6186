"""Layer views: the bytes of a layer are where the layout says, and a view writes through to the pool."""

from __future__ import annotations

import pytest
import torch

from kvtier.kernels import layer_views, stacked_views


def test_k_then_v_of_each_layer_in_order():
    pages, layers, heads, block, dim, value_dim = 3, 2, 2, 4, 8, 6
    per_layer = heads * block * (dim + value_dim)
    pool = torch.arange(float(pages * layers * per_layer)).view(pages, -1)
    for layer in range(layers):
        k, v = layer_views(pool, layer, heads, block, dim, value_dim)
        assert k.shape == (pages, heads, block, dim) and v.shape == (pages, heads, block, value_dim)
        start = layer * per_layer
        assert torch.equal(k[1].flatten(), pool[1, start : start + heads * block * dim])
        assert torch.equal(v[1].flatten(), pool[1, start + heads * block * dim : start + per_layer])


def test_all_layers_at_once_are_the_layers():
    pool = torch.arange(float(3 * (2 * 2 * 4 * 14 + 5))).view(3, -1)
    stack = stacked_views(pool, 2, 2, 4, 8, 6)
    for layer in range(2):
        for one, every in zip(layer_views(pool, layer, 2, 4, 8, 6), stack, strict=True):
            assert torch.equal(one, every[:, layer]) and one.data_ptr() == every[:, layer].data_ptr()
    with pytest.raises(ValueError, match="3 layers"):
        stacked_views(pool, 3, 2, 4, 8, 6)


def test_writing_a_view_writes_the_pool():
    pool = torch.zeros(2, 2 * 16 * 8)
    k, v = layer_views(pool, 0, 1, 16, 8)
    v[1, 0, 3] = 7.0
    assert pool[1].sum() == 7 * 8 and pool[0].sum() == 0 and k.sum() == 0


def test_a_layer_past_the_row_is_refused():
    pool = torch.zeros(2, 2 * 16 * 8)
    for layer in (1, -1):
        with pytest.raises(ValueError, match="layer"):
            layer_views(pool, layer, 1, 16, 8)
    with pytest.raises(ValueError, match="rows"):
        layer_views(pool.t(), 0, 1, 16, 8)
