"""What mixed traffic runs on: small models, copies in a seed's order, and tiers whose sizes the seed draws."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvtier.engine.hf import StreamingWindow, discover
from kvtier.engine.scheduler import SchedulerLimits
from kvtier.tiers.cpu import CallerStream
from kvtier.tiers.simulated import SimulatedBackend

from .test_families import FAMILIES, tiny

BLOCK = 16
STEP_S = 1e-4  # of one step of a stream
SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@cache
def model_of(family: str, number: int = 0) -> Any:
    """A small decoder; the same weights under every number."""
    changes = dict(SMALL)
    if "layer_types" in FAMILIES[family][2]:
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    return tiny(family, **changes)


class Clock:
    """Seconds that pass only when something happens."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class NoCompute(CallerStream):
    """Computing happens in the caller; the scheduler of copies has nothing to run of it."""

    def is_ready(self) -> bool:
        return False


class SteppedBackend(SimulatedBackend):
    """Copies in the seed's order, each taking time; who waits for nothing waits all its time."""

    def __init__(self, seed: int, clock: Clock) -> None:
        super().__init__(seed)
        self._clock, self.compute = clock, NoCompute()  # type: ignore[assignment]
        self.on_step = self._pass_time

    def wait_any(self, timeout_s: float) -> None:
        if not self.run_one():
            self._clock.now_s += timeout_s

    def _pass_time(self, name: str) -> None:
        self._clock.now_s += STEP_S


@dataclass(frozen=True)
class Shape:
    """What a seed draws before it begins."""

    family: str
    settings: dict[str, Any]
    limits: SchedulerLimits
    is_packed: bool
    streaming: StreamingWindow | None  # of the whole engine
    fails: float  # share of rounds in which the next copy of some stream fails

    @classmethod
    def draw(cls, choose: random.Random, folder: Path) -> Shape:
        family = choose.choice(["llama", "llama", "llama", "qwen2", "gemma3", "gpt_oss"])
        is_packed = family == "llama" and choose.random() < 0.25
        block = 2 * BLOCK if is_packed else BLOCK
        size = sum(layout.block_bytes for layout in discover(model_of(family)).layouts(block))
        blocks = choose.choice([12, 14, 16, 20, 30, 60]) // (2 if is_packed else 1) + 4 * is_packed
        has_store, staging = choose.random() < 0.4, choose.choice([0, 0, 2])
        settings: dict[str, Any] = dict(
            device_bytes=(blocks + staging) * size,
            host_bytes=(choose.choice([8, 20, 100, 200] if has_store else [0, 8, 20, 100, 200]) + 3 * staging) * size,
            staging_bytes=staging * size,
            policy=choose.choice(["auto", "auto", "lru"]),
        )
        if has_store:
            settings |= dict(nvme_path=folder / "store", nvme_bytes=300 * size)
        if is_packed:
            settings |= dict(device="int8")
        elif family in ("llama", "qwen2") and staging and choose.random() < 0.7:
            settings["selection_bytes"] = max(128 << 10, settings["device_bytes"] // 8)
            settings["device_bytes"] += settings["selection_bytes"]
        limits = SchedulerLimits(
            max_active=choose.choice([2, 4, 64]),
            quantum_s=choose.choice([0.0, 0.0, 0.05, 1.0]),
            aging_s=choose.choice([0.1, 30.0]),
        )
        is_endless = family == "llama" and not is_packed and "selection_bytes" not in settings and choose.random() < 0.2
        streaming = StreamingWindow(choose.choice([20, 48]), choose.choice([0, 4])) if is_endless else None
        return cls(family, settings, limits, is_packed, streaming, choose.choice([0.0, 0.0, 0.02]))
