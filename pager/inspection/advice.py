"""Advice: what more (or less) memory would hit, from sampled reuse distances of the traffic that this pager saw."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...tiers.errors import ConfigError

if TYPE_CHECKING:
    from ..core import Core

FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
FEW_USES = 200  # sampled; below, the answer is mostly noise and says so


def advise(core: Core, *, tier: str = "host", factor: float = 2.0) -> dict[str, Any]:
    """Share of block uses hit at or above a tier, by size of that tier, least recently used first.

    Tiers are taken to hold different blocks but for those that lie in both now.
    """
    if tier not in ("device", "host", "nvme"):
        raise ConfigError(f"tier={tier!r} is unknown; choose device, host, nvme")
    if not 0 < factor <= 1000:
        raise ConfigError(f"factor={factor}: need more than 0 and at most 1000")
    with core.lock:
        sampler, group = core.observer.reuse, core.groups[0]
        d = group.directory
        own = {"device": len(group.pages), "host": len(group.host)}
        own["nvme"] = core.nvme.num_slots(group.index) if core.nvme is not None else 0
        blocks = d.live()
        twice = int((d.in_device(blocks) & d.in_host(blocks)).sum())
        facts = sampler.to_dict()
        names = ("device", "host", "nvme")[: ("device", "host", "nvme").index(tier) + 1]
        above = sum(own[name] for name in names[:-1]) - (twice if tier == "host" else 0)
        sampled = facts["uses"] * facts["sample_rate"]
        rows = []
        for times in sorted({*FACTORS, factor}):
            size = max(0, above) + own[tier] * times
            rate = sampler.hit_rate(size)
            rows.append(
                {
                    "factor": times,
                    "tier_bytes": int(own[tier] * times) * group.layout.block_bytes,
                    "blocks": int(size),
                    "hit_rate": rate,
                    "band": None if rate is None else 1.96 * math.sqrt(rate * (1 - rate) / max(sampled, 1.0)),
                }
            )
        curve = [
            {"blocks": int(size), "hit_rate": sampler.hit_rate(size)}
            for size in np.unique(np.geomspace(1, 1 << 24, 49).astype(int))
        ]
    return {"tier": tier, "rows": rows, "curve": curve, "is_sure": sampled >= FEW_USES, **facts}
