"""`kvtier bench recovery`: opening a store that lists a million blocks, and an empty one, and what the listing takes in memory.

The journal is real, the blocks are not: opening reads the journal and the metadata, never a block.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from kvtier import KVLayout, Pager, PagerConfig

from ...tiers.cpu import CpuBackend
from ...tiers.errors import ConfigError
from ...tiers.nvme.identity import MANIFEST_FILE
from ...tiers.nvme.manifest import STAMP, Manifest
from ...tiers.nvme.store import NvmeTier, StoreIdentity
from .harness import Row, check_folder

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16")
IDENTITY = StoreIdentity("bench", (LAYOUT,))
BATCH = 1000  # blocks per record, as a busy writer has
MOST_S, MOST_EMPTY_S, MOST_BYTES = 1.0, 0.05, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--path", default=".", metavar="DIR", help="where the stores are made for the run")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Raises ConfigError for numbers that make no run, and for a directory that is none."""
    if arguments.blocks < 1 or arguments.rounds < 1:
        raise ConfigError(f"--blocks {arguments.blocks}, --rounds {arguments.rounds}: need positive numbers")
    check_folder(arguments.path)
    backend = CpuBackend()
    with tempfile.TemporaryDirectory(dir=arguments.path, prefix="kvtier-bench-") as folder:
        full, empty = Path(folder) / "full", Path(folder) / "empty"
        for path in (full, empty):
            _open(path, arguments.blocks, backend).close()
        list_blocks(full / MANIFEST_FILE, arguments.blocks)
        times = {
            path: [_opening_s(path, arguments.blocks, backend) for _ in range(arguments.rounds)]
            for path in (full, empty)
        }
        held = _held_bytes(full, arguments.blocks, backend)
        pager_s = statistics.median(_pager_s(full, arguments.blocks) for _ in range(arguments.rounds))
    backend.close(5.0)
    full_s, empty_s = statistics.median(times[full]), statistics.median(times[empty])
    case, n = f"{arguments.blocks} blocks listed", arguments.rounds
    per_block = held / arguments.blocks
    return [
        Row(case, "open", full_s, "s", "aim: at most", MOST_S, MOST_S / full_s, n),
        Row(case, "open, by a pager", pager_s, "s", "the store alone", full_s, full_s / pager_s, n),
        Row("nothing listed", "open", empty_s, "s", "aim: at most", MOST_EMPTY_S, MOST_EMPTY_S / empty_s, n),
        Row(
            case, "listing in memory", per_block, "bytes per block", "aim: at most", MOST_BYTES, MOST_BYTES / per_block
        ),
    ]


def _open(path: Path, blocks: int, backend: CpuBackend) -> NvmeTier:
    return NvmeTier.open(path, IDENTITY, num_slots=[blocks], backend=backend)


def list_blocks(path: Path, blocks: int) -> None:
    """Journal what a store would that wrote so many blocks and committed them."""
    manifest, keys = Manifest.open(path), np.random.default_rng(0)
    for first in range(0, blocks, BATCH):
        slots = np.arange(first, min(first + BATCH, blocks))
        stamps = np.zeros(len(slots), STAMP)
        stamps["key"] = np.frombuffer(keys.bytes(32 * len(slots)), "V32")
        stamps["generation"], stamps["tokens"] = slots + 1, LAYOUT.block_size
        manifest.put(0, slots, stamps)
    manifest.commit()
    manifest.sync()
    manifest.close()


def _opening_s(path: Path, blocks: int, backend: CpuBackend) -> float:
    start_s = time.perf_counter()
    tier = _open(path, blocks, backend)
    spent_s = time.perf_counter() - start_s
    tier.close()
    return spent_s


def _pager_s(path: Path, blocks: int) -> float:
    """A pager's start over the store: every block has an entry in its directory then, and can be found."""
    config = PagerConfig("8MiB", "8MiB", path, blocks * LAYOUT.block_bytes * 2, backend="cpu", host_prefault=False)
    gc.collect()
    start_s = time.perf_counter()
    pager = Pager.open(LAYOUT, config, model_fingerprint=IDENTITY.model_fingerprint)
    spent_s = time.perf_counter() - start_s
    assert pager.status()["tiers"]["nvme"]["blocks"] == blocks
    pager.close()
    return spent_s


def _held_bytes(path: Path, blocks: int, backend: CpuBackend) -> int:
    """What is allocated while the store is open; what the C library keeps of tables that grew is not counted."""
    tracemalloc.start()
    tier = _open(path, blocks, backend)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tier.close()
    return max(1, held)
