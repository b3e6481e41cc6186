"""`pager-inspect`: what a pager or a store holds, and where its bytes go. Changes nothing; knows only the protocol.

Starts without torch and zarr. Exit codes: 0 shown, 2 nothing to show at that place.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..pager.protocol import KvTierError, fetch_status

_RATE_WINDOW_S = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pager-inspect", description="Look at a running pager or at a store at rest.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="per tier: capacity, use, hits, evictions, bytes each way")
    status.add_argument("target", nargs="?", default=".", metavar="PATH|SOCKET")
    status.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        _show(arguments.target, as_json=arguments.json)
    except KvTierError as error:
        print(f"pager-inspect: error: {error}", file=sys.stderr)
        return 2
    return 0


def _show(target: str, *, as_json: bool) -> None:
    status = fetch_status(target)
    if status["source"] == "pager":
        _add_rates(status, target)
    if as_json:
        print(json.dumps(status))
    elif status["source"] == "store":
        _print_store(status["store"])
    elif status["source"] == "daemon":
        print(
            f"pagerd without a model: nobody has opened one since it started; {status['host_bytes']} bytes are for them"
        )
    else:
        _print_pager(status)
    if not as_json and "daemon" in status:
        _print_daemon(status["daemon"])


def _print_daemon(daemon: dict[str, Any]) -> None:
    ways = ("connections", "attached_processes", "left_processes", "pinned_slots", "waiting_requests")
    counts = ", ".join(f"{daemon[name]} {name.replace('_', ' ')}" for name in ways)
    print(f"daemon: up {daemon['uptime_s']:.0f} s, {counts}{', draining' if daemon['is_draining'] else ''}")


def _add_rates(status: dict[str, Any], target: str) -> None:
    """Bytes per second each way, from two looks."""
    started_s = time.monotonic()
    time.sleep(_RATE_WINDOW_S)
    later = fetch_status(target)
    seconds = time.monotonic() - started_s
    for name, tier in status["tiers"].items():
        for way in ("in", "out"):
            moved = later["tiers"][name][f"bytes_{way}"] - tier[f"bytes_{way}"]
            tier[f"rate_{way}_bytes_per_s"] = moved / seconds


def _print_pager(status: dict[str, Any]) -> None:
    pinned = "pinned" if status["pinned_memory"] else "not pinned"
    print(f"pager pid {status['pid']}  backend {status['backend']}  host memory {pinned}", end="  ")
    print(
        f"sequences {status['sequences']}  sessions {status['sessions']}  copies in flight {status['transfers_in_flight']}"
    )
    heads = (
        "TIER",
        "USED",
        "CAPACITY",
        "PINNED",
        "DIRTY",
        "IN FLIGHT",
        "HITS tok",
        "EVICTED",
        "IN",
        "OUT",
        "IN/s",
        "OUT/s",
    )
    print(("{:<7}" + "{:>11}" * (len(heads) - 1)).format(*heads))
    for name, t in status["tiers"].items():
        sizes = [t[f"{k}_bytes"] for k in ("used", "capacity", "pinned", "dirty", "in_flight")]
        flows = [t["bytes_in"], t["bytes_out"], t["rate_in_bytes_per_s"], t["rate_out_bytes_per_s"]]
        cells = [*map(_size, sizes), f"{t['hit_tokens']:,}", f"{t['evicted_blocks']:,}", *map(_size, flows)]
        print(("{:<7}" + "{:>11}" * len(cells)).format(name, *cells))
    print(_memory_line(status["tiers"]["host"]["memory"]))
    print(f"missed {status['miss_tokens']:,} tokens, {status['ghost_tokens']:,} of them evicted before")
    if "nvme" in status["tiers"]:
        _print_cold(status["tiers"]["nvme"])


def _print_cold(cold: dict[str, Any]) -> None:
    """What only the cold tier has: its ring of segments, its disk, its quotas."""
    clean, segments = cold["clean_segments"], cold["segments"]
    ring = ", ".join(f"{c} of {n}" for c, n in zip(clean, segments, strict=True))
    way = "past the page cache" if cold["direct_io"] else "through the page cache (O_DIRECT refused)"
    amplified = f"written {cold['write_amplification']:.2f} times"
    print(f"nvme at {cold['path']}: {ring} segments clean, blocks {amplified}, {way}")
    if not cold["takes_writes"]:
        print(f"nvme takes no writes: {cold['last_write_error'] or 'unknown error'}; tried again every 30 s")
    elif cold["last_write_error"]:
        print(f"nvme refused a write earlier: {cold['last_write_error']}")
    for count, what in (
        (cold["corrupt_blocks"], "blocks failed their checks and were dropped"),
        (cold["failed_syncs"], "syncs failed; what they were for is not listed"),
        (cold["failed_index_writes"], "segment indexes could not be written; only stock Zarr readers notice"),
    ):
        if count:
            print(f"nvme: {count:,} {what}")
    for name, quota in cold["namespaces"].items():
        print(f"nvme namespace {name}: {_size(quota['used_bytes'])} of {_size(quota['limit_bytes'])}")


def _memory_line(memory: dict[str, Any]) -> str:
    """How much of the host tier is in memory, in what pages and where; then what could not be had, a line each."""
    huge = memory["huge_page_bytes"]
    line = (
        f"host memory: prefault {memory['prefault']}, {_size(memory['prefaulted_bytes'])} of "
        f"{_size(memory['prefault_total_bytes'])}"
        + (f", {_size(huge)} in huge pages" if huge is not None else "")
        + f", NUMA {memory['numa_policy']} {', '.join(map(str, memory['numa_nodes']))}"
    )
    return "\n  ".join([line, *memory["notices"]])


def _print_store(store: dict[str, Any]) -> None:
    print(f"store at rest {store['path']}  format {store['format']}  model {store['model_fingerprint']}")
    for group in store["groups"]:
        print(f"  {group['name']:<12} {group['blocks']:>8} blocks {_size(group['bytes']):>11}  {group['dtype']}")
    print(f"  sessions {store['sessions']}")


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
