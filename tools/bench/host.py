"""`kvtier bench host`: moving scattered 2 MiB blocks between the tiers' memory, against one large memcpy of the same bytes.

The copies go through the backend's streams, as the pager's do: what is measured holds the submission, the worker's
wake-up and the event. Both sides are memory that was faulted in before; what that and huge pages give is measured in
slabs.py, whose rows follow.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import numpy as np

from kvtier import KVLayout

from ...tiers.cpu import CpuBackend
from ...tiers.errors import ConfigError
from .harness import Row, interleave, medians
from .slabs import SlabBench

LAYOUT = KVLayout(num_layers=16, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16")  # 2 MiB blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=128, metavar="N", help="2 MiB blocks per round")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--path", default=".", metavar="PATH", help="where a file of the blocks is read from")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows in GB/s. Raises ConfigError for no blocks, or where no file can be made at --path."""
    if arguments.blocks < 2 or arguments.rounds < 1:
        raise ConfigError(f"--blocks {arguments.blocks}, --rounds {arguments.rounds}: need two blocks and one round")
    backend = CpuBackend()
    host, device = (backend.alloc_host(arguments.blocks, LAYOUT.block_bytes) for _ in range(2))
    host[:], device[:] = 1, 2
    order = np.random.default_rng(0)
    t, s = order.permutation(arguments.blocks), order.permutation(arguments.blocks)
    half = arguments.blocks // 2

    def put() -> None:
        backend.demote.copy_rows(host, t, device, s)
        backend.demote.record().wait()

    def get() -> None:
        backend.promote.copy_rows(device, t, host, s)
        backend.promote.record().wait()

    def both() -> None:
        """One half up, the other down, at the same time."""
        backend.promote.copy_rows(device, t[:half], host, t[:half])
        backend.demote.copy_rows(host, t[half:], device, t[half:])
        backend.promote.record().wait()
        backend.demote.record().wait()

    def two_threads() -> None:
        other = threading.Thread(target=np.copyto, args=(device[:half], host[:half]))
        other.start()
        np.copyto(host[half:], device[half:])
        other.join()

    cases = {
        "put": put,
        "get": get,
        "both": both,
        "one memcpy": lambda: np.copyto(device, host),
        "two memcpy": two_threads,
    }
    seconds = medians(interleave(cases, arguments.rounds, warmup=2))
    try:
        slabs = SlabBench(backend, device, Path(arguments.path)).rows(arguments.rounds)
    except OSError as error:
        raise ConfigError(
            f"--path {arguments.path!r} takes no file of the blocks: {error.strerror or error}"
        ) from error
    finally:
        backend.close(5.0)
    moved = arguments.blocks * LAYOUT.block_bytes * 1e-9
    case = f"{arguments.blocks} scattered blocks of 2 MiB"
    limits = {
        "put": "one memcpy",
        "get": "one memcpy",
        "both": "two memcpy",
    }
    return [
        Row(
            case,
            name,
            moved / seconds[name],
            "GB/s",
            f"limit: {limit} of the same bytes",
            moved / seconds[limit],
            seconds[limit] / seconds[name],
            arguments.rounds,
        )
        for name, limit in limits.items()
    ] + slabs
