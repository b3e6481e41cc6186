"""Checks: what a caller may hand to a kernel, said once for the CPU path and the Triton kernels.

Shapes are checked always. Values of block tables and slots are checked wherever they come as host arrays; those that
lie on a GPU only under KVTIER_DEBUG=1, because looking at them waits for the device. Guards against the out-of-range
read that a kernel cannot see: it would return another sequence's bytes, or end the process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IntArray = Tensor | np.ndarray | Sequence[int]


def is_debug() -> bool:
    """Read KVTIER_DEBUG at each call, so that it can be switched on in a running process."""
    return os.environ.get("KVTIER_DEBUG", "0") not in ("", "0")


def to_host(values: IntArray, dtype: type = np.int64) -> np.ndarray:
    """Return integers as a numpy array; waits for the device when they lie there."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=dtype)


def check_cache(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Check that queries and pages belong together; return the number of query heads per KV head."""
    if q.dim() != 3:
        raise ValueError(f"q must be [tokens, heads, head_dim], got {tuple(q.shape)}")
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k, v must be [pages, kv_heads, block, dim], got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[3] != q.shape[2]:
        raise ValueError(f"q has head_dim {q.shape[2]}, k has {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly")
    if k.dtype != v.dtype or not k.dtype.is_floating_point:
        raise ValueError(f"k and v must share one floating dtype, got {k.dtype} and {v.dtype}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"the last axis of k and v must be dense, strides are {k.stride()} and {v.stride()}")
    return q.shape[1] // k.shape[1]


def check_window(window: int | None, sinks: int) -> None:
    """Check the retention rule: a query sees at least itself."""
    if window is not None and window < 1:
        raise ValueError(f"window must be None or >= 1 (a query sees itself), got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be >= 0, got {sinks}")


def check_rows_cut(num_tokens: int, kv_lens: np.ndarray, cu_q: np.ndarray) -> np.ndarray:
    """Check that the packed rows are cut into as many sequences as have lengths; return the rows of each."""
    if cu_q.ndim != 1 or kv_lens.ndim != 1 or len(cu_q) != len(kv_lens) + 1:
        raise ValueError(f"cu_q needs one entry more than kv_lens, got {cu_q.shape} and {kv_lens.shape}")
    q_lens = cu_q[1:] - cu_q[:-1]
    if cu_q[0] != 0 or cu_q[-1] != num_tokens or q_lens.min(initial=0) < 0:
        raise ValueError(f"cu_q must rise from 0 to the {num_tokens} rows of q, got {cu_q.tolist()[:8]}...")
    return q_lens


def check_spans(num_tokens: int, kv_lens: np.ndarray, cu_q: np.ndarray) -> np.ndarray:
    """Check that the packed rows are cut into sequences, each no longer than its keys; return the rows of each."""
    q_lens = check_rows_cut(num_tokens, kv_lens, cu_q)
    if (too_few := kv_lens < q_lens).any():
        s = int(np.argmax(too_few))
        raise ValueError(f"sequence {s} has {q_lens[s]} queries but kv_len {kv_lens[s]}; kv_len counts the new tokens")
    return q_lens


def check_whole_blocks(kv_lens: np.ndarray, ahead: np.ndarray, block: int) -> None:
    """Check that compressed lengths are whole blocks and that rows lie behind them."""
    if (bad := (kv_lens < 0) | (kv_lens % block != 0)).any():
        s = int(np.argmax(bad))
        raise ValueError(
            f"kv_lens[{s}] = {kv_lens[s]} is not a multiple of the block of {block} tokens; only whole blocks are "
            f"compressed, the tail stays in full precision"
        )
    if ahead.shape != kv_lens.shape or (ahead < 0).any():
        raise ValueError(f"ahead must be [{len(kv_lens)}] numbers from 0 up, got {ahead.tolist()[:8]}")


def check_table(table: np.ndarray, kv_lens: np.ndarray, block: int, num_pages: int) -> None:
    """Check that every entry a kernel will read names a page of the pool."""
    if table.ndim != 2 or table.shape[0] != len(kv_lens):
        raise ValueError(f"block_table must be [{len(kv_lens)} sequences, max_blocks], got {table.shape}")
    used = -(-kv_lens // block)
    if used.max(initial=0) > table.shape[1]:
        s = int(np.argmax(used))
        raise ValueError(f"sequence {s} needs {used[s]} blocks, block_table has room for {table.shape[1]}")
    bad = (table < 0) | (table >= num_pages)
    if bad.any():
        bad &= np.arange(table.shape[1])[None, :] < used[:, None]  # behind the end of a row anything may stand
    if bad.any():
        s, i = (int(x) for x in np.argwhere(bad)[0])
        raise ValueError(f"block_table[{s}, {i}] = {table[s, i]} is not a page of the pool (0..{num_pages - 1})")


def check_turns(turn_ids: np.ndarray, kv_lens: np.ndarray, block: int, num_turns: int, shape: tuple[int, ...]) -> None:
    """Check that every block read has a rotation."""
    if turn_ids.shape != shape:
        raise ValueError(f"turn_ids must be shaped as block_table {shape}, got {turn_ids.shape}")
    is_read = np.arange(shape[1])[None, :] < (kv_lens // block)[:, None]
    bad = is_read & ((turn_ids < 0) | (turn_ids >= num_turns))
    if bad.any():
        s, i = (int(x) for x in np.argwhere(bad)[0])
        raise ValueError(f"turn_ids[{s}, {i}] = {turn_ids[s, i]} is not one of the {num_turns} turns")


def check_slots(slots: np.ndarray, num_tokens: int, num_slots: int) -> None:
    """Check a slot mapping: one entry per token, -1 or inside the pool; under KVTIER_DEBUG also no slot twice."""
    if slots.shape != (num_tokens,):
        raise ValueError(f"slots must be [{num_tokens}], got {slots.shape}")
    if len(slots) and (slots.min() < -1 or slots.max() >= num_slots):
        i = int(np.argmax((slots < -1) | (slots >= num_slots)))
        raise ValueError(f"slots[{i}] = {slots[i]} is not -1 or a token slot of the pool (0..{num_slots - 1})")
    if is_debug():
        check_unique(slots[slots >= 0], "slots")


def check_rows(rows: Tensor, ids: np.ndarray, what: str) -> None:
    """Check that row ids lie inside a 2-D tensor of rows."""
    if len(ids) and (ids.min() < 0 or ids.max() >= rows.shape[0]):
        i = int(np.argmax((ids < 0) | (ids >= rows.shape[0])))
        raise ValueError(f"{what}[{i}] = {ids[i]} is not a row (0..{rows.shape[0] - 1})")


def check_unique(ids: np.ndarray, what: str) -> None:
    """Check that no target is written twice: which write wins would be a matter of luck."""
    if len(np.unique(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise ValueError(f"{what} names {int(values[counts > 1][0])} more than once")


def check_states(out: Tensor, lse: Tensor, what: str) -> None:
    """Check that a partial result and its LSE belong together."""
    if lse.shape != out.shape[:-1] or lse.dtype != torch.float32:
        raise ValueError(f"{what}: lse must be float32 {tuple(out.shape[:-1])}, got {lse.dtype} {tuple(lse.shape)}")
