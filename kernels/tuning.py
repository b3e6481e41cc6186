"""How kernels are cut for a device: one table of defaults, and what was measured here, which is stronger.

A row says how many tokens a block has and how a decode is cut into programs. The table holds what is known of each device;
`tune` measures candidates on the device at hand and keeps the best in the user's cache directory, by device and versions, so
it is measured once. Nothing here runs by itself. Guards: a choice changes speed and never results; a cache file that
cannot be read, or was written for something else, counts as absent.

    blocks: small ones for the device's own memory, since a block is what is paged; CPUs want long ones, because every block
    is a call. What a page's format asks for beyond that (tiles of a group's size, say) the launchers derive themselves.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # of the cache file
CACHE_VARIABLE = "KVTIER_CACHE_DIR"
WORTH_CHANGING = 1.05  # a candidate has to be so many times faster than the table's choice


@dataclass(frozen=True, slots=True)
class Tuning:
    """One row. Tokens: block, tile, min_split_tokens. tile is for heads up to 128 wide in 16 bits."""

    name: str
    block: int
    tile: int
    warps: int
    stages: int
    programs_per_sm: int  # of a decode: enough to hide latency, few enough that partial results stay few
    min_split_tokens: int  # shorter splits spend their time starting and merging
    is_measured: bool = False


#                    name            block tile warps stages per SM split
TABLE = {
    row.name: row
    for row in (
        Tuning("A100", 64, 64, 4, 3, 4, 512),  # sm_80: 108 SMs, 1.6 to 2.0 TB/s
        Tuning("H100", 64, 64, 4, 3, 4, 512),  # sm_90: 114 or 132 SMs, 2.0 to 3.4 TB/s
        Tuning("H200", 64, 64, 4, 3, 4, 512),  # sm_90: 132 SMs, 4.8 TB/s: the same cut, the faster memory only fills it
        Tuning("other GPU", 64, 64, 4, 3, 4, 512),
        Tuning("CPU", 256, 64, 4, 3, 1, 512),  # blocks are read in place; tile, warps and splits have no say
    )
}
H200_BYTES_PER_S = 4.0e12  # of sm_90 devices those with faster memory than this


@dataclass(frozen=True, slots=True)
class Device:
    """What choices depend on: kind of device, its processors, and its memory's rate where it tells."""

    kind: str  # cpu, or sm_90
    processors: int
    bytes_per_s: float = 0.0

    @property
    def row(self) -> Tuning:
        """The table's row for it."""
        if self.kind == "cpu":
            return TABLE["CPU"]
        if self.kind == "sm_90":
            return TABLE["H200" if self.bytes_per_s > H200_BYTES_PER_S else "H100"]
        return TABLE["A100" if self.kind == "sm_80" else "other GPU"]

    @property
    def key(self) -> str:
        """Under which measurements are kept: another device, torch or Triton measures anew."""
        cpu = platform.processor() or platform.machine() if self.kind == "cpu" else ""
        return "|".join([self.kind, cpu, str(self.processors), f"torch {torch.__version__}", f"triton {_triton()}"])


def this_device(kind: str) -> Device:
    """The CPU, or the current GPU (kind "cuda")."""
    if kind == "cpu":
        return Device("cpu", len(os.sched_getaffinity(0)))
    from triton.runtime import driver

    target = driver.active.get_current_target()
    told = driver.active.utils.get_device_properties(driver.active.get_current_device())
    rate = 2e3 * told.get("mem_clock_rate", 0) * told.get("mem_bus_width", 0) / 8  # kHz, two transfers a clock; bits
    return Device(f"sm_{target.arch}", int(told["multiprocessor_count"]), rate)


def current(kind: str) -> Tuning:
    """The row in use for a kind of device ("cpu", "cuda"): measured here, or the table's."""
    return _tried.get() or _looked_up(kind)


@cache
def _looked_up(kind: str) -> Tuning:
    """Once per process."""
    device = this_device(kind)
    return _measured(device) or device.row


_tried: ContextVar[Tuning | None] = ContextVar("kvtier_tried_tuning", default=None)


@contextmanager
def using(row: Tuning) -> Iterator[None]:
    """Cut as this row says inside the block; for measuring."""
    token = _tried.set(row)
    try:
        yield
    finally:
        _tried.reset(token)


def cache_path() -> Path:
    """Where measurements are kept: $KVTIER_CACHE_DIR, $XDG_CACHE_HOME/kvtier, or ~/.cache/kvtier."""
    own, common = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(common or Path.home() / ".cache") / "kvtier"
    return folder / "tuning.json"


def tune(kind: str, measure: Callable[[Tuning], float]) -> Tuning:
    """Measure the candidates for this device, keep the best and use it from here on.

    measure: seconds that a representative decode takes when cut so. A candidate that the device cannot run is left out.
    Raises: OSError when the cache cannot be written.
    """
    device = this_device(kind)
    first = device.row
    best, best_s = first, _seconds(first, measure)
    limit_s = best_s / WORTH_CHANGING
    for candidate in candidates(first, kind):
        try:
            seconds = _seconds(candidate, measure)
        except _refusals(kind):  # this device has not the memory or the registers that it takes
            continue
        if seconds < min(best_s, limit_s):
            best, best_s = candidate, seconds
    best = replace(best, is_measured=True)
    _keep(device, best)
    _looked_up.cache_clear()
    return best


def _seconds(row: Tuning, measure: Callable[[Tuning], float]) -> float:
    with using(row):
        return measure(row)


def _refusals(kind: str) -> tuple[type[Exception], ...]:
    """What a cut that a device cannot run raises."""
    if kind == "cpu":
        return ()
    from triton.errors import TritonError

    return (TritonError,)


def candidates(row: Tuning, kind: str) -> list[Tuning]:
    """Cuts worth trying beside the table's own."""
    if kind == "cpu":
        return [replace(row, block=n) for n in (64, 128, 512) if n != row.block]
    return [
        replace(row, tile=tile, warps=warps, stages=stages, programs_per_sm=programs)
        for tile in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for programs in (2, 4, 8)
        if (tile, warps, stages, programs) != (row.tile, row.warps, row.stages, row.programs_per_sm)
    ]


def _measured(device: Device) -> Tuning | None:
    try:
        told = json.loads(cache_path().read_text())
        return _tuning(told["devices"][device.key]) if told["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _tuning(told: Mapping[str, Any]) -> Tuning | None:
    """A row as it was kept; None where it is none, or names something that no kernel takes."""
    row = Tuning(**told)
    numbers = [value for name, value in asdict(row).items() if name not in ("name", "is_measured")]
    is_sound = all(type(n) is int and 1 <= n <= 4096 for n in numbers) and row.tile & (row.tile - 1) == 0
    return row if is_sound and row.block % 16 == 0 and row.tile >= 16 and row.warps in (1, 2, 4, 8) else None


def _keep(device: Device, row: Tuning) -> None:
    path = cache_path()
    try:
        told = json.loads(path.read_text())
        devices = dict(told["devices"]) if told["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        devices = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"format": FORMAT, "devices": devices | {device.key: asdict(row)}}, indent=1) + "\n")
    new.replace(path)


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
