"""The ways to attend that `kvtier bench attention` compares, over the KV of one shape and context.

Here are the buffers and the calls, nothing is timed. Time does not hang on the numbers in a page, so a few random pages are
made and quantised, and repeated until the context is full; every case still reads memory of its own. Pages lie in random
order. `unpacked first` writes all pages in full precision and attends to that: what a cache without kernels on compressed
pages would do. Guards: every case attends to the same keys, so all of them must give nearly the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QUERY_HEADS, DIM = 32, 128
SHAPES = {"MHA": 32, "GQA4": 8, "GQA8": 4, "MQA": 1}  # KV heads
FORMATS = ("fp8", "int8", "int4", "int2", "hack8", "hack2")
UNPACKED = ("int8", "int4")
GROUP = 128
BLOCKS = {"cpu": 256, "cuda": 128}  # tokens per page
DISTINCT_PAGES = 16
UNPACKED_BYTES = (
    256 << 20
)  # KV in bf16 that is unpacked; more needs several times its memory, and half of the run's time
COPIES, UNPACKED_COPIES = 5, 8  # of the KV in full precision, in memory at once: with all formats; unpacking, too

SLOW_TOKENS = 4 << 10  # HACK's formats hold scores in memory, 20 times the time of the flash kernel in a prefill

FAST_SDPA, PLAIN_SDPA = "SDPA, heads as rows", "SDPA, enable_gqa"
PAGES = "pages in bf16"


def compressed_name(fmt: str) -> str:
    return f"pages in {fmt}"


def unpacked_name(fmt: str) -> str:
    return f"pages in {fmt}, unpacked first"


def is_slow(fmt: str, device: str, context: int, rows: int) -> bool:
    """Whether this case would take longer than all others together."""
    return device == "cpu" and fmt.startswith("hack") and rows > 1 and context > SLOW_TOKENS


def bytes_wanted(shape: str, context: int) -> int:
    """K and V in bf16, as pages and as one piece, the formats, and what unpacking needs."""
    nbytes = 2 * 2 * context * SHAPES[shape] * DIM
    return nbytes * (UNPACKED_COPIES if nbytes <= UNPACKED_BYTES else COPIES)


@dataclass(frozen=True)
class Case:
    """One way to attend; bytes are what it reads of the cache."""

    run: Callable[[], tuple[Any, Any]]
    nbytes: int


class Cases:
    """One shape, context and number of query rows, and every way to attend."""

    def __init__(self, torch: Any, device: str, shape: str, context: int, rows: int) -> None:
        self.torch, self.device, self.rows, self.context = torch, device, rows, context
        self.heads, self.block = SHAPES[shape], BLOCKS[device]
        self.scale = DIM**-0.5
        generator = torch.Generator().manual_seed(0)
        count, size = context // self.block, (self.heads, self.block, DIM)
        some = [torch.randn(min(count, DISTINCT_PAGES), *size, generator=generator).bfloat16() for _ in range(2)]
        self.some_k, self.some_v = (x.to(device) for x in some)
        self.k, self.v = (self._repeated(x, count) for x in (self.some_k, self.some_v))
        self.q = torch.randn(rows, QUERY_HEADS, DIM, generator=generator).bfloat16().to(device)
        self.table = torch.randperm(count, generator=generator)[None]
        self.bounds, self.lens = [0, rows], [context]

    def _repeated(self, rows: Any, count: int) -> Any:
        times = -(-count // len(rows))
        return rows.repeat(times, *[1] * (rows.dim() - 1))[:count]

    def read(self) -> tuple[Any, None]:
        """Read all of the KV once and do next to nothing with it."""
        return self.k.view(self.torch.int64).sum() + self.v.view(self.torch.int64).sum(), None

    def contiguous(self) -> dict[str, Case]:
        """Torch's own attention, on K and V as one piece per head."""
        k, v = (x.transpose(0, 1).reshape(1, self.heads, -1, DIM) for x in (self.k, self.v))
        group = QUERY_HEADS // self.heads
        grouped = self.q.view(-1, self.heads, group, DIM).permute(1, 2, 0, 3).reshape(1, self.heads, -1, DIM)
        plain = self.q.transpose(0, 1)[None]
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        nbytes = 2 * k.numel() * k.element_size()
        cases = {FAST_SDPA: Case(lambda: (sdpa(grouped, k, v), None), nbytes)}
        if group > 1:
            cases[PLAIN_SDPA] = Case(lambda: (sdpa(plain, k, v, enable_gqa=True), None), nbytes)
        return cases

    def paged(self) -> Case:
        """Pages in full precision; rows before which all of them lie, as for compressed ones."""
        from ...kernels import block_attention, paged_attention, plan_step

        nbytes = 2 * self.k.numel() * self.k.element_size()
        if self.rows > 1:
            order = self.table[0].numpy()
            return Case(lambda: block_attention(self.q, self.k, self.v, scale=self.scale, pages=order), nbytes)
        plan = plan_step(self.k, self.table, self.lens, self.bounds)

        def attend() -> tuple[Any, Any]:
            return paged_attention(
                self.q, self.k, self.v, self.table, self.lens, self.bounds, scale=self.scale, plan=plan
            )

        return Case(attend, nbytes)

    def compressed(self, name: str) -> dict[str, Case]:
        """Pages of one format, attended to as they are and, for some, written out in full precision first."""
        from ...kernels import PageFormat, compressed_attention, plan_pages, quantize_blocks

        fmt = PageFormat(name, self.heads, self.block, DIM, group=GROUP)
        few = self.torch.zeros(len(self.some_k), fmt.layer_bytes, dtype=self.torch.uint8, device=self.device)
        quantize_blocks(self.some_k, self.some_v, range(len(few)), few, range(len(few)), fmt)
        pages = self._repeated(few, len(self.k))
        plan = plan_pages(pages, fmt, self.table, self.lens, self.bounds)

        def attend() -> tuple[Any, Any]:
            return compressed_attention(
                self.q, pages, fmt, self.table, self.lens, self.bounds, scale=self.scale, plan=plan
            )

        cases = {compressed_name(name): Case(attend, pages.numel())}
        if name in UNPACKED and 2 * self.k.numel() * self.k.element_size() <= UNPACKED_BYTES:
            cases[unpacked_name(name)] = self._unpacked(pages, fmt)
        return cases

    def _unpacked(self, pages: Any, fmt: Any) -> Case:
        from ...kernels import block_attention, dequantize_blocks

        k, v = self.torch.empty_like(self.k), self.torch.empty_like(self.v)

        def attend() -> tuple[Any, Any]:
            dequantize_blocks(pages, range(len(pages)), k, v, range(len(pages)), fmt)
            return block_attention(self.q, k, v, scale=self.scale, pages=self.table[0].numpy())

        return Case(attend, pages.numel())
