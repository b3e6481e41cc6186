"""`kvtier bench capacity`: tokens that a fixed budget of bytes holds in each tier, format by format, through the pager.

A real pager is given the budget for the tier in question and little for the others, and chats of random KV are written
to it until it has evicted some; the most that lay there at once is counted, scales and trailers included (a store keeps
some segments clean, and empties one at a time). The device tier has small blocks and a budget of its own: what it sets
apart for tails in full precision is a number of tokens, whatever the budget, and a row says how many bytes that is; another
says what the key summaries of a block take, for whoever selects pages. The reference is full precision in the same budget and
the same run. The store's disk is measured too, as the file system has it, and how fast one thread packs and unpacks blocks,
against a memcpy of the same blocks in the same rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pager.config import PagerConfig
from ...pager.lease import Span
from ...pager.pager import Pager
from ...pager.sizing import summary_bytes
from ...pager.tier_formats import device_layouts
from ...tiers.errors import ConfigError
from ...tiers.formats import block_formats
from ...tiers.layout import FULL, KVLayout, format_bytes, parse_bytes
from .harness import Row, check_folder, interleave, medians

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=128, block_size=256, dtype="bfloat16")  # 1 MiB
DEVICE_LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=128, block_size=256, dtype="bfloat16")  # 128 KiB
FORMATS = ("fp8", "int8/128", "int4/128", "int2/128", "hack4/128")
CHAT_BLOCKS, DEVICE_CHAT_BLOCKS = 4, 16
SMALL_PAGES = 3 * CHAT_BLOCKS
PARK_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", default=".", metavar="DIR", help="a directory on the disk for the stores")
    parser.add_argument("--budget", default="64MiB", metavar="SIZE", help="bytes of the tier (default 64MiB)")
    parser.add_argument(
        "--device-budget",
        default="512MiB",
        metavar="SIZE",
        help="bytes of the device tier (default 512MiB); 0: leave it out",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of packing (default 5)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="FORMAT")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of tokens. Raises ConfigError for a budget that is too small or a format that cannot be."""
    budget = parse_bytes(arguments.budget, name="--budget")
    if budget < 2 * CHAT_BLOCKS * LAYOUT.block_bytes:
        raise ConfigError(f"--budget {arguments.budget}: give at least {2 * CHAT_BLOCKS} blocks of 1 MiB")
    check_folder(arguments.path)
    device = parse_bytes(arguments.device_budget, name="--device-budget")
    rows = _speeds(arguments.formats, arguments.rounds)
    if device:
        rows += _device_rows(arguments.formats, device)
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        for tier in ("host", "nvme"):
            full = 0.0
            for number, name in enumerate((FULL, *arguments.formats)):
                held, disk = _fill(tier, name, budget, Path(folder) / f"{tier}{number}")
                full = full or held
                rows.append(_row(f"{tier}, {name}", "tokens held", held, "tokens", full))
                if tier == "nvme":
                    rows.append(_row(f"{tier}, {name}", "disk taken", disk, "bytes", disk and budget, is_less=True))
    return rows


def _device_rows(formats: Sequence[str], budget: int) -> list[Row]:
    rows, full = [], 0
    for name in (FULL, *formats):
        held, tail = _fill_device(name, budget)
        full = full or held
        rows.append(_row(f"device, {name}", "tokens held", held, "tokens", full))
        if tail:
            rows.append(_row(f"device, {name}", "set apart for tails", tail, "bytes", budget, is_less=True))
    share = summary_bytes(DEVICE_LAYOUT) / DEVICE_LAYOUT.block_bytes
    what = f"a block of {DEVICE_LAYOUT.block_size} tokens in full precision"
    rows.append(
        Row("device, selection", "key summaries of a block", share * DEVICE_LAYOUT.block_bytes, "bytes", what,
            DEVICE_LAYOUT.block_bytes, share)
    )  # fmt: skip
    return rows


def _fill_device(name: str, budget: int) -> tuple[int, int]:
    """The most tokens in whole blocks that lay in the device tier before it was full, and bytes of the tails' pages."""
    from ...tiers.packing import pack

    config = PagerConfig(budget, staging_bytes=0, backend="cpu", device=name)
    layouts = device_layouts(config, [DEVICE_LAYOUT])
    (fmt,) = block_formats(name, [DEVICE_LAYOUT], name="--formats")
    tokens = 0
    with Pager.open(layouts, config) as pager:
        count = min(DEVICE_CHAT_BLOCKS, pager.max_span_tokens() // DEVICE_LAYOUT.block_size)
        blocks, ids = _kv(count, 0, DEVICE_LAYOUT), np.arange(count)
        tail = sum(pager.device_rows(i).nbytes for i, layout in enumerate(layouts) if layout.is_tail)
        while not pager.counters.get("evicted_blocks", tier="device"):
            seq = pager.begin()
            pager.append(seq, [tokens % (1 << 30) + 1] * (count * DEVICE_LAYOUT.block_size))
            with pager.lease([Span(seq, 0, pager.num_tokens(seq))], write_only=True) as lease:
                pack(fmt, blocks, ids, pager.device_rows(0), lease.tables[0][0].astype(np.int64))
                lease.commit()
            pager.finish(seq)
            tokens = max(tokens, pager.status()["tiers"]["device"]["blocks"] * DEVICE_LAYOUT.block_size)
        pager.check_integrity()
    return tokens, tail


def _row(case: str, metric: str, value: float, unit: str, reference: float, *, is_less: bool = False) -> Row:
    what = "the budget" if is_less else "full precision"
    ratio = (reference / value if is_less else value / reference) if reference and value else None
    return Row(case, metric, value, unit, what, reference, ratio)


def _speeds(formats: Sequence[str], rounds: int) -> list[Row]:
    """GB/s of blocks in full precision, in and out of each format."""
    from ...tiers.packing import pack, unpack

    source, ids = _kv(SMALL_PAGES, 0), np.arange(SMALL_PAGES)
    target = np.zeros_like(source)
    cases: dict[str, Callable[[], object]] = {"memcpy": partial(np.copyto, target, source)}
    for name in formats:
        (fmt,) = block_formats(name, [LAYOUT], name="--formats")
        packed = np.zeros((SMALL_PAGES, fmt.block_bytes), np.uint8)
        cases[f"pack {name}"] = partial(pack, fmt, source, ids, packed, ids)
        cases[f"unpack {name}"] = partial(unpack, fmt, packed, ids, target, ids)
    moved = {name: source.nbytes * 1e-9 / seconds for name, seconds in medians(interleave(cases, rounds)).items()}
    limit = moved.pop("memcpy")
    return [Row(name, "speed", rate, "GB/s", "memcpy", limit, rate / limit, rounds) for name, rate in moved.items()]


def _kv(count: int, seed: int, layout: KVLayout = LAYOUT) -> npt.NDArray[np.uint8]:
    """Blocks of KV as a model makes it: normal numbers in bfloat16, with a loud channel in every sixteen."""
    values = np.random.default_rng(seed).standard_normal((count, layout.block_bytes // 2), np.float32)
    values[:, ::16] *= 8
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _fill(tier: str, name: str, budget: int, path: Path) -> tuple[int, int]:
    """The most tokens that lay in that tier before it was full, and the disk that the store takes."""
    sizes: dict[str, Any] = {"host_bytes": budget, "host": name}
    if tier == "nvme":
        sizes = {"host_bytes": SMALL_PAGES * LAYOUT.block_bytes, "nvme_path": path, "nvme_bytes": budget, "nvme": name}
    config = PagerConfig(SMALL_PAGES * LAYOUT.block_bytes, staging_bytes=0, backend="cpu", **sizes)
    with Pager.open(LAYOUT, config) as pager:
        tokens, chats = 0, list[list[int]]()
        while not pager.counters.get("evicted_blocks", tier=tier):
            chats.append(_write_chat(pager, len(chats), flush=tier == "nvme"))
            held = pager.status()["tiers"][tier]
            tokens = max(tokens, held["blocks"] * LAYOUT.block_size)
        pager.check_integrity()
        assert held["capacity_bytes"] <= budget, f"{tier} takes {format_bytes(held['capacity_bytes'])}"
        assert pager.match(chats[-1]).tokens == len(chats[-1]) - len(chats[-1]) % LAYOUT.block_size
    files = (path / "blocks.zarr" / "g0").glob("c.*") if tier == "nvme" else ()
    return tokens, sum(file.stat().st_blocks * 512 for file in files)


def _write_chat(pager: Pager, number: int, *, flush: bool) -> list[int]:
    """A chat of some whole blocks."""
    ids = [number + 1] * (CHAT_BLOCKS * LAYOUT.block_size)
    seq = pager.begin()
    pager.append(seq, ids)
    with pager.lease([Span(seq, 0, len(ids))], write_only=True) as lease:
        pages = lease.tables[0][0]
        pager.device_rows(0)[pages] = _kv(len(pages), number)
        lease.commit()
    if flush:
        pager.persist([seq], timeout_s=PARK_S)
    pager.finish(seq)
    return ids
