"""`kvtier bench attention`: attention over pages, full and compressed, against torch on contiguous KV and the memory's speed.

Every case of one shape and context runs in turn within each round. References, all of the same run: torch SDPA on
contiguous KV with the query heads of a group handed over as rows (the fastest call there is), SDPA with enable_gqa (what
transformers makes), and the time in which memory can be read once (a sum of the same bytes as integers). Pages lie in
random order. `unpacked first` writes all pages in full precision and attends to that: what a cache without kernels on
compressed pages would do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...tiers.errors import ConfigError
from .harness import Row, interleave, medians

QUERY_HEADS, DIM = 32, 128
SHAPES = {"MHA": 32, "GQA4": 8, "GQA8": 4, "MQA": 1}  # KV heads
FORMATS = ("fp8", "int8", "int4", "int2", "hack8", "hack2")
UNPACKED = ("int8", "int4")
GROUP = 128
BLOCKS = {"cpu": 256, "cuda": 128}  # tokens per page
LAUNCHES = {"cpu": 1, "cuda": 20}  # calls per measurement: one is too short to time on a GPU
SLOWEST_TOKENS = 32 << 10  # no unpacking of longer contexts: it needs as much memory again as full precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default="4096,32768,131072", metavar="N,N", help="tokens of KV for decode")
    parser.add_argument(
        "--prefill-contexts", default="4096,32768", metavar="N,N", help="likewise for prefill; may be empty"
    )
    parser.add_argument("--rows", type=int, default=256, metavar="N", help="query tokens of the prefill (default 256)")
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B", help="page formats")
    parser.add_argument("--rounds", type=int, default=9, metavar="N")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in milliseconds per layer. Raises ConfigError for contexts, shapes and formats that cannot be."""
    import torch

    from ...kernels.formats import FORMATS as KNOWN

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.accelerator.is_available() else "cpu"
    contexts, prefills = _numbers(arguments, "contexts"), _numbers(arguments, "prefill_contexts")
    shapes, formats = _names(arguments, "shapes", SHAPES), _names(arguments, "formats", KNOWN)
    if arguments.rounds < 1 or arguments.rows < 1:
        raise ConfigError(f"--rounds {arguments.rounds}, --rows {arguments.rows}: need positive numbers")
    found = []
    for shape in shapes:
        for rows, context in [(1, n) for n in contexts] + [(arguments.rows, n) for n in prefills]:
            found += _Bench(torch, device, shape, context, rows, formats).rows(arguments.rounds)
    return found


def _numbers(arguments: argparse.Namespace, name: str) -> list[int]:
    text = getattr(arguments, name)
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() and int(part) % 256 == 0 and int(part) for part in parts):
        raise ConfigError(f"--{name.replace('_', '-')} {text!r}: need multiples of 256 tokens, as in 4096,32768")
    return [int(part) for part in parts]


def _names(arguments: argparse.Namespace, name: str, known: Any) -> list[str]:
    parts = [part for part in getattr(arguments, name).split(",") if part]
    if unknown := [part for part in parts if part not in known]:
        raise ConfigError(f"--{name} {unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return parts


@dataclass(frozen=True)
class _Case:
    """One way to attend; bytes are what it reads of the cache."""

    run: Callable[[], tuple[Any, Any]]
    nbytes: int


class _Bench:
    """One shape, context and number of query rows, attended to in every way."""

    def __init__(self, torch: Any, device: str, shape: str, context: int, rows: int, formats: list[str]) -> None:
        self.torch, self.device, self.rows_asked, self.context = torch, device, rows, context
        self.heads, self.block = SHAPES[shape], BLOCKS[device]
        self.name = f"{shape} {context} tokens, {'decode' if rows == 1 else f'prefill of {rows}'}"
        generator = torch.Generator().manual_seed(0)
        count, size = context // self.block, (self.heads, self.block, DIM)
        self.table = torch.randperm(count, generator=generator)[None]
        self.k, self.v = (torch.randn(count, *size, generator=generator).bfloat16().to(device) for _ in range(2))
        self.q = torch.randn(rows, QUERY_HEADS, DIM, generator=generator).bfloat16().to(device)
        self.scale = DIM**-0.5
        self.cases = self._contiguous() | {"pages in bf16": self._paged()}
        for name in formats:
            self.cases |= self._compressed(name)

    def rows(self, rounds: int) -> list[Row]:
        floor = "memory read once"
        timed = {name: self._timed(case.run) for name, case in self.cases.items()}
        words = self.cases["SDPA, heads as rows"]
        seconds = medians(interleave(timed | {floor: self._timed(self._read)}, rounds))
        each = {name: found / LAUNCHES[self.device] for name, found in seconds.items()}
        read_s_per_byte = each[floor] / words.nbytes
        found = [self._row(floor, each[floor], "itself", each[floor], rounds)]
        for name, case in self.cases.items():
            for other in ("SDPA, heads as rows", "SDPA, enable_gqa"):
                if name.startswith("SDPA") and name == other:
                    continue
                if other in each and not (other.endswith("gqa") and name.startswith("SDPA")):
                    found.append(self._row(name, each[name], other, each[other], rounds))
            found.append(self._row(name, each[name], "its bytes read once", case.nbytes * read_s_per_byte, rounds))
        return found

    def _row(self, name: str, ours_s: float, reference: str, reference_s: float, rounds: int) -> Row:
        return Row.of_times(self.name, name, "ms", ours_s, reference, reference_s, 1e3, rounds)

    def _timed(self, run: Callable[[], tuple[Any, Any]]) -> Callable[[], object]:
        """Run a case as often as is worth timing, and wait for the device by looking at a number."""

        def timed() -> float:
            for _ in range(LAUNCHES[self.device]):
                result = run()[0]
            return float(result.flatten()[0])

        return timed

    def _read(self) -> tuple[Any, None]:
        return self.k.view(self.torch.int64).sum() + self.v.view(self.torch.int64).sum(), None

    def _contiguous(self) -> dict[str, _Case]:
        """Torch's own attention, on K and V as one piece per head."""
        order = self.table[0].to(self.device)
        k, v = (x[order].transpose(0, 1).reshape(1, self.heads, -1, DIM) for x in (self.k, self.v))
        group = QUERY_HEADS // self.heads
        grouped = self.q.view(-1, self.heads, group, DIM).permute(1, 2, 0, 3).reshape(1, self.heads, -1, DIM)
        plain = self.q.transpose(0, 1)[None]
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        nbytes = 2 * k.numel() * k.element_size()
        cases = {"SDPA, heads as rows": _Case(lambda: (sdpa(grouped, k, v), None), nbytes)}
        if group > 1:
            cases["SDPA, enable_gqa"] = _Case(lambda: (sdpa(plain, k, v, enable_gqa=True), None), nbytes)
        return cases

    def _paged(self) -> _Case:
        """Pages in full precision; rows before which all of them lie, as for compressed ones."""
        from ...kernels import block_attention, paged_attention, plan_step

        nbytes = 2 * self.k.numel() * self.k.element_size()
        if self.rows_asked > 1:
            order = self.table[0].numpy()
            return _Case(lambda: block_attention(self.q, self.k, self.v, scale=self.scale, pages=order), nbytes)
        lens, bounds = [self.context], [0, 1]
        plan = plan_step(self.k, self.table, lens, bounds)
        return _Case(
            lambda: paged_attention(self.q, self.k, self.v, self.table, lens, bounds, scale=self.scale, plan=plan),
            nbytes,
        )

    def _compressed(self, name: str) -> dict[str, _Case]:
        """Pages of one format, attended to as they are and, for some, written out in full precision first."""
        from ...kernels import (
            PageFormat,
            block_attention,
            compressed_attention,
            dequantize_blocks,
            plan_pages,
            quantize_blocks,
        )

        fmt = PageFormat(name, self.heads, self.block, DIM, group=GROUP)
        count = len(self.k)
        pages = self.torch.zeros(count, fmt.layer_bytes, dtype=self.torch.uint8, device=self.device)
        quantize_blocks(self.k, self.v, range(count), pages, range(count), fmt)
        lens, bounds = [self.context], [0, self.rows_asked]
        plan = plan_pages(pages, fmt, self.table, lens, bounds)

        def attend() -> tuple[Any, Any]:
            return compressed_attention(self.q, pages, fmt, self.table, lens, bounds, scale=self.scale, plan=plan)

        cases = {f"pages in {name}": _Case(attend, pages.numel())}
        if name in UNPACKED and self.context <= SLOWEST_TOKENS:
            k, v = self.torch.empty_like(self.k), self.torch.empty_like(self.v)

            def unpack() -> tuple[Any, Any]:
                dequantize_blocks(pages, range(count), k, v, range(count), fmt)
                return block_attention(self.q, k, v, scale=self.scale, pages=self.table[0].numpy())

            cases[f"pages in {name}, unpacked first"] = _Case(unpack, pages.numel())
        return cases
