"""Views: where one layer's K and V lie in the device pool.

A block is all layers of a group back to back; in each layer K [kv_heads, block, head_dim] comes first, then
V [kv_heads, block, value_dim]. Kernels take strides, so a layer is a view of the pool and never a copy.
"""

from __future__ import annotations

from torch import Tensor


def layer_views(
    pool: Tensor, layer: int, num_kv_heads: int, block_size: int, head_dim: int, value_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the K and V of one layer as strided views of the pool.

    Shapes: pool [pages, block elements], typed, last axis dense; k [pages, kv_heads, block, head_dim];
            v [pages, kv_heads, block, value_dim].
    Raises: ValueError when the pool's rows do not hold the layer.
    """
    value_dim = head_dim if value_dim is None else value_dim
    _check_pool(pool)
    key_elements = num_kv_heads * block_size * head_dim
    value_elements = num_kv_heads * block_size * value_dim
    start = layer * (key_elements + value_elements)
    end = start + key_elements + value_elements
    if layer < 0 or end > pool.shape[1]:
        raise ValueError(f"layer {layer} needs elements [{start}, {end}) of a block, a row has {pool.shape[1]}")
    k = pool[:, start : start + key_elements].unflatten(1, (num_kv_heads, block_size, head_dim))
    v = pool[:, start + key_elements : end].unflatten(1, (num_kv_heads, block_size, value_dim))
    return k, v


def stacked_views(
    pool: Tensor, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, value_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the K and V of all layers as strided views of the pool.

    Shapes: pool as in layer_views; k [pages, layers, kv_heads, block, head_dim]; v likewise with value_dim.
    Raises: ValueError when the pool's rows do not hold so many layers.
    """
    value_dim = head_dim if value_dim is None else value_dim
    _check_pool(pool)
    sizes = [num_kv_heads * block_size * dim for dim in (head_dim, value_dim)]
    end = num_layers * sum(sizes)
    if num_layers < 1 or end > pool.shape[1]:
        raise ValueError(f"{num_layers} layers need {end} elements of a block, a row has {pool.shape[1]}")
    k, v = pool[:, :end].unflatten(1, (num_layers, sum(sizes))).split(sizes, dim=2)
    shapes = [(num_kv_heads, block_size, dim) for dim in (head_dim, value_dim)]
    return k.unflatten(2, shapes[0]), v.unflatten(2, shapes[1])


def _check_pool(pool: Tensor) -> None:
    if pool.dim() != 2 or pool.stride(1) != 1:
        raise ValueError(f"pool must be rows [pages, elements] with a dense last axis, got {tuple(pool.shape)}")
