"""Rows of `kvtier bench accuracy` for formats by layers and heads: an engine over the needle model, pages packed as said.

The model is in bfloat16 and has two layers of two KV heads, each of which carries its own part of an answer. The margin is
that of the worst token of all needles, and beside it stands how many tokens the same device tier holds, tails and scales
included. The reference of both is full precision in the same run and the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .harness import Row

TEXTS = (
    "int4",
    "int4; heads 0: bf16",
    "int4; layers 1: bf16",
    "int2",
    "int2; heads 0: bf16",
    "int2; heads 0: int8",
    "int2; layers 1: int8",
    "hack2",
)
BLOCK = 64
ROOM = 16  # of the device tier: times what the context takes in full precision


def mixed_rows(context: int, outlier: float, texts: Sequence[str], case: str) -> list[Row]:
    """Margins, needles and tokens held, of full precision and of each text."""
    import torch

    from ...engine.needle import NeedleSpec, build_needle_model, needle_prompt
    from ...engine.needle_check import build_needle_cache
    from ...tiers.layout import FULL

    spec = NeedleSpec(outlier=outlier)
    model = build_needle_model(spec, dtype=torch.bfloat16)
    ids, needles = needle_prompt(spec, context)
    cache = build_needle_cache(model, ids)
    rows, whole, most = list[Row](), 0.0, 0
    for text in (FULL, *texts) if texts else ():
        margin, exact, held = _ask(model, ids, cache, needles, text)
        whole, most = whole or margin, most or held
        name = f"{case}, device={text!r}"
        if margin > 0:
            rows.append(Row(name, "margin", margin, "nats", "full precision", whole, margin / whole))
        share = exact / len(needles) or None
        rows.append(Row(name, "needles found", exact, f"of {len(needles)}", "full precision", len(needles), share))
        rows.append(Row(name, "tokens held", held, "tokens", "full precision", most, held / most))
    return rows


def _ask(model: Any, ids: list[int], cache: Any, needles: Any, text: str) -> tuple[float, int, int]:
    """The smallest margin, needles that came back, and tokens that the device tier has pages for."""
    from ...engine.engine import Engine
    from ...engine.needle_check import score_needles
    from ...engine.sampling import SamplingParams
    from ...pager.config import PagerConfig

    kv_bytes = sum(x.numel() * x.element_size() for pair in cache for x in pair)
    config = PagerConfig(kv_bytes * ROOM, kv_bytes, staging_bytes=0, backend="cpu", device=text)
    with Engine.from_model(model, config, block_size=BLOCK) as engine:
        session = engine.session("needles")
        session.inject(ids, cache)

        def ask(key: int, count: int) -> tuple[list[int], list[float]]:
            out = session.send([key], SamplingParams(max_tokens=count, top2_margin=True))
            session.rollback(len(ids))
            return out.token_ids, out.margins

        score = score_needles(ask, needles)
        kept = [i for i, layout in enumerate(engine.pager.layouts) if not layout.is_tail]
        return score.min_margin_nats, score.exact, min(len(engine.pager.device_rows(i)) for i in kept) * BLOCK
