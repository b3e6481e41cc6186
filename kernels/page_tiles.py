"""How the kernels over compressed pages are cut, by format: one table, from what the compiler makes of each cut.

    rows     query rows (tokens times heads of one KV head) of a program in a prefill, from sm_90 on and before
    tile     keys that a program takes at once; HACK takes a partition of V, formats with a scale per channel at most a group
    warps    of a decode; more rows than 16 take 8
    stages   tiles asked for ahead of a decode

Why these: a decode waits for memory, so what counts is how many bytes an SM has asked for at any time. That is its programs
(of 65,536 registers, by the registers of the report) times their shared memory; 4.8 TB/s and 0.8 us of latency, divided by 132
SMs, ask for 29 KB. Heads of 128 reach 67 KB in fp8, 42 in int8, 33 in int4, 35 in int2 (28 with 3 stages), 50 in hack2. int8 in
8 warps has twice the warps of 4 at as many bytes. 2-bit heads of 64 have tiles of 1 KB: at one warp a program 9 of them fit
an SM (45 KB), at four warps two (11 KB). Wide heads ask for 17 to 51. Prefills take the most rows that spill nothing.
Guards: nothing here changes a result.

Source: `kvtier bench kernels --aot`, registers and shared memory on sm_90; not yet measured on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .formats import PageFormat

NARROW = 128  # the widest heads that the first of two rows is for


@dataclass(frozen=True, slots=True)
class PageCut:
    """One row of the table."""

    rows: int
    rows_before: int  # on devices before sm_90, whose accumulators take more registers
    tile: int
    warps: int
    stages: int


#                 rows sm_80 tile warps stages; heads up to 128 wide, and wider ones
TABLE: dict[str, tuple[PageCut, PageCut]] = {
    "fp8": (PageCut(128, 64, 64, 4, 3), PageCut(64, 32, 32, 8, 3)),
    "int8": (PageCut(128, 64, 64, 8, 3), PageCut(64, 32, 32, 8, 3)),
    "int4": (PageCut(64, 64, 64, 4, 3), PageCut(64, 32, 64, 8, 5)),
    "int2": (PageCut(64, 64, 64, 4, 5), PageCut(64, 32, 64, 8, 5)),
    "hack8": (PageCut(128, 64, 64, 4, 3), PageCut(64, 32, 64, 8, 3)),
    "hack4": (PageCut(64, 32, 64, 4, 3), PageCut(64, 32, 64, 8, 3)),
    "hack2": (PageCut(64, 64, 64, 4, 5), PageCut(32, 32, 64, 8, 3)),
}


def page_cut(fmt: PageFormat) -> PageCut:
    """The row for a format and its heads."""
    widest = max(fmt.keys.dim, fmt.values.dim)
    cut = TABLE[fmt.name][widest > NARROW]
    return replace(cut, warps=1) if fmt.bits == 2 and widest <= 64 else cut
