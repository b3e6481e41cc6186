"""Advice: what more (or less) memory would hit, and what that would make of the time to first token, from sampled reuse
distances of the traffic that this pager saw and from rates that it measured.

Array code over the sampler; the sample itself goes along, so that whoever asks can try policies on it in a process of its
own (tools/inspect/advising.py). Without a measured rate there is no estimate: None, never a constant from a data sheet.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.errors import ConfigError
from .reuse import ReuseSampler, Use

if TYPE_CHECKING:
    from ..core import Core
    from ..group import BlockGroup

TIER_NAMES = ("device", "host", "nvme")
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
FEW_USES = 200  # sampled; below, the answer is mostly noise and says so


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds as this pager measured them; None: not yet. Loads are per token, from a tier to the device."""

    prompt_tokens: float
    ttft_s: float | None
    prefill_s: float | None
    host_load_s: float | None
    nvme_load_s: float | None

    @classmethod
    def of(cls, core: Core) -> Costs:
        records = list(core.observer.requests)
        rates = [r.usage["prefill_s_per_token"] for r in records if r.usage.get("prefill_s_per_token")]
        up_s, read_s = (_seconds_per_token(core, way) for way in ("host_to_device", "nvme_to_host"))
        sizes = [lookup.tokens for lookup in core.observer.lookups]
        return cls(
            prompt_tokens=statistics.fmean(sizes) if sizes else 0.0,
            ttft_s=statistics.fmean(r.lines_s["ttft_s"] for r in records) if records else None,
            prefill_s=statistics.median(rates) if rates else None,
            host_load_s=up_s,
            nvme_load_s=None if read_s is None else read_s + (up_s or 0.0),
        )

    def modelled_s(self, hit_rates: tuple[float, ...]) -> float | None:
        """Of the blocks of a mean prompt, by the shares hit at or above each tier. None where a rate is missing."""
        device, host, nvme = hit_rates
        shares = (host - device, self.host_load_s), (nvme - host, self.nvme_load_s), (1.0 - nvme, self.prefill_s)
        if any(share > 0 and seconds is None for share, seconds in shares):
            return None
        return self.prompt_tokens * sum(share * (seconds or 0.0) for share, seconds in shares)


def _seconds_per_token(core: Core, direction: str) -> float | None:
    """Moves overlap, so this is an upper bound of what a token's share of a block costs."""
    moved = core.counters.get("moved_bytes", direction=direction)
    source = direction.partition("_to_")[0]
    token_bytes = sum(group.tier_bytes(source) for group in core.groups) / core.block_size
    return core.counters.get("move_seconds", direction=direction) / moved * token_bytes if moved else None


def advise(core: Core, *, tier: str = "host", factor: float = 2.0) -> dict[str, Any]:
    """Share of block uses hit at or above a tier, by size of that tier, least recently used first; and the mean TTFT.

    Tiers are taken to hold different blocks but for those that lie in both now. What of the measured TTFT the model does
    not explain (queues, the first decode step) is taken to stay.
    """
    if tier not in TIER_NAMES:
        raise ConfigError(f"tier={tier!r} is unknown; choose {', '.join(TIER_NAMES)}")
    if not 0 < factor <= 1000:
        raise ConfigError(f"factor={factor}: need more than 0 and at most 1000")
    with core.lock:
        sampler, sizes, costs = core.observer.reuse, _Sizes.of(core), Costs.of(core)
        facts, log = sampler.to_dict(), sampler.logged()
        sampled = facts["uses"] * facts["sample_rate"]
        times = sorted({*FACTORS, factor})
        rows = [_row(sampler, sizes, costs, tier, number, sampled) for number in times] if facts["uses"] else []
        curve = [
            {"blocks": int(size), "hit_rate": sampler.hit_rate(size)}
            for size in np.unique(np.geomspace(1, 1 << 24, 49).astype(int))
        ]
    told = {"tier": tier, "factor": factor, "policy": core.config.policy, "block_size": core.block_size}
    told |= {"rows": rows, "curve": curve, "is_sure": sampled >= FEW_USES, "sample": _sample(log), **facts}
    return told | {"measured_ttft_s": costs.ttft_s, "prefill_s_per_token": costs.prefill_s}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Blocks of the first layer group that each tier holds, and those that lie in device and host at once.

    Bytes are of all layer groups: that is what a tier's setting counts.
    """

    own: dict[str, int]
    twice: int
    tier_bytes: dict[str, int]

    @classmethod
    def of(cls, core: Core) -> _Sizes:
        group = core.groups[0]
        d = group.directory
        blocks = d.live()
        twice = int((d.in_device(blocks) & d.in_host(blocks)).sum())
        own = [_slots(core, one) for one in core.groups]
        sizes = {
            tier: sum(held[tier] * one.tier_bytes(tier) for held, one in zip(own, core.groups, strict=True))
            for tier in TIER_NAMES
        }
        return cls(own[0], twice, sizes)

    def down_to(self, tier: str, changed: str, factor: float) -> float:
        """Distinct blocks at or above `tier` when one tier is so many times as large."""
        names = TIER_NAMES[: TIER_NAMES.index(tier) + 1]
        total = sum(self.own[name] * (factor if name == changed else 1.0) for name in names)
        return max(0.0, total - (self.twice if tier != "device" else 0))


def _slots(core: Core, group: BlockGroup) -> dict[str, int]:
    on_nvme = core.nvme.num_slots(group.index) if core.nvme is not None else 0
    return {"device": len(group.pages), "host": len(group.host), "nvme": on_nvme}


def _row(
    sampler: ReuseSampler, sizes: _Sizes, costs: Costs, tier: str, factor: float, sampled: float
) -> dict[str, Any]:
    blocks = sizes.down_to(tier, tier, factor)
    rate = sampler.hit_rate(blocks) or 0.0
    return {
        "factor": factor,
        "tier_bytes": int(sizes.tier_bytes[tier] * factor),
        "blocks": int(blocks),
        "hit_rate": rate,
        "band": 1.96 * math.sqrt(rate * (1 - rate) / max(sampled, 1.0)),
        "ttft_s": _ttft_s(sampler, sizes, costs, tier, factor),
    }


def _ttft_s(sampler: ReuseSampler, sizes: _Sizes, costs: Costs, tier: str, factor: float) -> float | None:
    def modelled_s(times: float) -> float | None:
        return costs.modelled_s(tuple(sampler.hit_rate(sizes.down_to(t, tier, times)) or 0.0 for t in TIER_NAMES))

    now_s, then_s = modelled_s(1.0), modelled_s(factor)
    if costs.ttft_s is None or now_s is None or then_s is None:
        return None
    return max(0.0, costs.ttft_s - now_s) + then_s


def _sample(log: list[Use]) -> list[dict[str, Any]]:
    """Requests with their sampled blocks, numbered from 0 in order of their first use: no tag leaves here."""
    numbers: dict[int, int] = {}
    return [
        {"time_s": use.time_s, "ids": [numbers.setdefault(tag, len(numbers)) for tag in use.tags.tolist()]}
        for use in log
    ]
