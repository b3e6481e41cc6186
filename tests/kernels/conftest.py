"""Paged caches for kernel tests: random tokens on scattered pages, NaN (or what `poison` says) in every slot nobody owns.

Compressed ones likewise: random blocks, and 0xFF (NaN scales, NaN fp8) in pages that nobody owns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kernels need torch")

from kvtier.kernels import PageFormat, quantize_blocks, reference, reference_compressed, stacked_views  # noqa: E402

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["interpreted"]  # test_interpreter.py runs these in a process of their own


@dataclass
class Case:
    """One step over a paged cache: queries, pages, tables; spans are (queries, keys) per sequence."""

    q: Any
    k: Any
    v: Any
    table: np.ndarray
    kv_lens: list[int]
    cu_q: list[int]
    scale: float
    rules: dict[str, Any] = field(default_factory=dict)
    stack: tuple[Any, Any] | None = None  # the pool that k and v are layer 1 of

    def run(self, attention: Callable[..., Any], **more: Any) -> Any:
        return attention(
            self.q, self.k, self.v, self.table, self.kv_lens, self.cu_q, scale=self.scale, **self.rules, **more
        )

    def expected(self) -> Any:
        return self.run(reference.paged_attention)


def build_case(
    spans: Sequence[tuple[int, int]],
    *,
    dtype: Any = torch.float32,
    heads: int = 2,
    group: int = 2,
    dims: tuple[int, int] = (16, 16),
    block: int = 16,
    order: str = "scattered",
    seed: int = 0,
    device: str = "cpu",
    poison: float = float("nan"),
    **rules: Any,
) -> Case:
    """Lay sequences on pages: `scattered` at random, `runs` side by side, or `woven` in turns."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    needs = [-(-keys // block) for _, keys in spans]
    num_pages = sum(needs) + 3
    pages = np.arange(num_pages)
    if order == "scattered":
        random.shuffle(pages)
    table = np.full((len(spans), max([1, *needs])), -1, np.int32)
    if order == "woven":
        turns = sorted((i, s) for s, need in enumerate(needs) for i in range(need))
        for page, (i, s) in enumerate(turns):
            table[s, i] = page
    else:
        for s, need in enumerate(needs):
            table[s, :need], pages = pages[:need], pages[need:]
    pool = torch.full((num_pages, 3 * heads * block * sum(dims)), poison, device=device).to(dtype)
    stack = stacked_views(pool, 3, heads, block, *dims)
    k, v = (part[:, 1] for part in stack)
    for s, (_, keys) in enumerate(spans):
        at = torch.arange(keys, device=device)
        page = torch.from_numpy(table[s]).to(device).long()[at // block]
        k[page, :, at % block] = torch.randn(keys, heads, dims[0], device=device).to(dtype)
        v[page, :, at % block] = torch.randn(keys, heads, dims[1], device=device).to(dtype)
    cu_q = np.cumsum([0, *(queries for queries, _ in spans)]).tolist()
    q = torch.randn(cu_q[-1], heads * group, dims[0], device=device).to(dtype)
    return Case(q, k, v, table, [keys for _, keys in spans], cu_q, dims[0] ** -0.5, rules, stack)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return build_case


@dataclass
class PagesCase:
    """Queries over compressed blocks; spans are (queries, compressed blocks, tokens between those and the first query)."""

    q: Any
    pages: Any
    fmt: PageFormat
    table: np.ndarray
    kv_lens: list[int]
    cu_q: list[int]
    ahead: list[int]
    scale: float
    rules: dict[str, Any] = field(default_factory=dict)

    def expected(self) -> Any:
        return reference_compressed.compressed_attention(
            self.q,
            self.pages,
            self.fmt,
            self.table,
            self.kv_lens,
            self.cu_q,
            self.ahead,
            scale=self.scale,
            **self.rules,
        )


def build_pages(
    fmt: PageFormat,
    spans: Sequence[tuple[int, int, int]],
    *,
    group: int = 2,
    dtype: Any = torch.float32,
    outliers: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    **rules: Any,
) -> PagesCase:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    needs = [blocks for _, blocks, _ in spans]
    order = random.permutation(sum(needs) + 3)
    table = np.full((len(spans), max([1, *needs])), -1, np.int32)
    for s, need in enumerate(needs):
        table[s, :need], order = order[:need], order[need:]
    rows = torch.full((sum(needs) + 3, fmt.layer_bytes + 384), 0xFF, dtype=torch.uint8, device=device)
    pages = rows[:, 256:-128]  # one layer of blocks that hold more
    k = torch.randn(sum(needs), fmt.kv_heads, fmt.block, fmt.keys.dim)
    k[..., 1::8] += outliers
    v = torch.randn(sum(needs), fmt.kv_heads, fmt.block, fmt.values.dim)
    quantize_blocks(k.to(device), v.to(device), range(sum(needs)), pages, table[table >= 0], fmt)
    cu_q = np.cumsum([0, *(queries for queries, _, _ in spans)]).tolist()
    q = torch.randn(cu_q[-1], fmt.kv_heads * group, fmt.keys.dim, device=device).to(dtype)
    kv_lens, ahead = [need * fmt.block for need in needs], [gap for _, _, gap in spans]
    return PagesCase(q, pages, fmt, table, kv_lens, cu_q, ahead, fmt.keys.dim**-0.5, rules)


@pytest.fixture(scope="session")
def make_pages() -> Callable[..., PagesCase]:
    return build_pages


def close(result: Any, expected: Any, out_tolerance: float = 2e-6, lse_tolerance: float = 3e-6) -> None:
    """Compare (out, lse) with a float64 reference; the out tolerance is relative for values above 1."""
    out, lse = (x.double() for x in result)
    expected_out, expected_lse = expected
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape
    no_keys = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), no_keys)
    assert torch.isfinite(out).all(), "an unused token slot reached the output"
    error = (out - expected_out).abs() / expected_out.abs().clamp(min=1.0)
    assert error.max().item() <= out_tolerance if out.numel() else True
    lse_error = (lse - expected_lse)[~no_keys].abs()
    assert lse_error.max().item() <= lse_tolerance if lse_error.numel() else True


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    return close
