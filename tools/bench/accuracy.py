"""`kvtier bench accuracy`: what compressed pages and selected pages cost in answers, on KV of the needle model.

The model recalls 16 pairs anywhere in its context, so its margins (best logit minus second best, in nats) show what a
format loses before answers break; random weights would show nothing. All but the newest tokens are compressed, as a tier
does it, and every step attends to them as they are. With outliers, K has four loud constant channels, as real models do.
The reference of every row is full precision, in the same run and through the same steps. mixed.py and rotation.py add theirs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...tiers.errors import ConfigError
from .harness import Row
from .mixed import TEXTS, mixed_rows
from .rotation import rotation_rows

if TYPE_CHECKING:
    from ...engine.needle_check import NeedleScore

FORMATS = ("fp8", "int8", "int4", "int2", "hack8", "hack4", "hack2")
OUTLIERS = (0.0, 8.0)
BLOCK, GROUP = 64, 64
SELECT_BLOCK = 16  # small pages are what makes selection sharp: 8,192 of them at 131,072 tokens
MANY_TOKENS = 65536  # in longer contexts every second needle is asked for, to be done in minutes
ROOM = 64  # token slots for what is asked and answered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", default="4096,32768,131072", metavar="N,N", help="tokens of context")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B", help="page formats")
    parser.add_argument("--residual", type=int, default=0, metavar="N", help="newest tokens kept in full precision")
    parser.add_argument(
        "--device",
        nargs="*",
        default=list(TEXTS),
        metavar="TEXT",
        help="formats of an engine's pages, by layers and heads",
    )
    parser.add_argument("--picks", default="8,16,32", metavar="N,N", help="selected pages per step; may be empty")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Rows of margins in nats and of needles found. Raises ConfigError for contexts and formats that cannot be."""
    from ...kernels.formats import FORMATS as KNOWN

    contexts, picks = _numbers(arguments.contexts, "contexts"), _numbers(arguments.picks, "picks")
    formats = [part for part in arguments.formats.split(",") if part]
    if min(contexts, default=0) < 256 or arguments.residual < 0 or min(picks, default=3) < 3:
        raise ConfigError("accuracy: need contexts of 256 tokens or more, --residual from 0 up, --picks from 3 up")
    if unknown := [part for part in formats if part not in KNOWN]:
        raise ConfigError(f"--formats {unknown[0]!r} is unknown; choose of {', '.join(KNOWN)}")
    found = rotation_rows()
    for context in contexts:
        for outlier in OUTLIERS:
            found += _rows(context, outlier, formats, arguments.residual, picks)
    for outlier in OUTLIERS:
        shortest = min(contexts)
        found += mixed_rows(shortest, outlier, arguments.device, _case(shortest, outlier))
    return found


def _case(context: int, outlier: float) -> str:
    return f"{context} tokens" + (", outlier channels" if outlier else "")


def _numbers(text: str, name: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--{name} {text!r}: need numbers such as 8,16")
    return [int(part) for part in parts]


def _rows(context: int, outlier: float, formats: list[str], residual: int, picks: list[int]) -> list[Row]:
    from ...engine.needle import NeedleSpec, build_needle_model, needle_prompt
    from ...engine.needle_check import build_needle_cache, score_needles

    spec = NeedleSpec(outlier=outlier)
    model = build_needle_model(spec)
    ids, needles = needle_prompt(spec, context)
    if context > MANY_TOKENS:
        needles = needles[::2]
    cache = build_needle_cache(model, ids)
    case = _case(context, outlier)
    whole = score_needles(_Asker(model, cache, BLOCK, None, 0).ask, needles)
    found = [Row(case, "margin, full precision", whole.min_margin_nats, "nats", "itself", whole.min_margin_nats, 1.0)]
    for name in formats:
        score = score_needles(_Asker(model, cache, BLOCK, name, residual).ask, needles)
        margin = score.min_margin_nats
        ratio = margin / whole.min_margin_nats if margin > 0 else None
        # A wrong answer's margin is negative: the row of needles found says how many there were.
        if margin > 0:
            found.append(Row(case, f"margin, {name}", margin, "nats", "full precision", whole.min_margin_nats, ratio))
        found.append(_exact(case, name, score.exact, whole))
    for k in picks:
        asker = _Asker(model, cache, SELECT_BLOCK, None, 0, picks=k)
        score = score_needles(asker.ask, needles)
        found.append(_exact(case, f"{k} pages of {-(-context // SELECT_BLOCK)} per step", score.exact, whole))
    return found


def _exact(case: str, name: str, exact: int, whole: NeedleScore) -> Row:
    ratio = exact / whole.exact if exact and whole.exact else None
    unit = f"of {whole.asked}"
    return Row(f"{case}, {name}", "needles found", exact, unit, "full precision", whole.exact, ratio)


class _Asker:
    """The needle model over pages: one token at a time, compressed blocks and a tail, or selected pages."""

    def __init__(
        self, model: Any, cache: list[Any], block: int, name: str | None, residual: int, picks: int | None = None
    ) -> None:
        self.model, self.block, self.picks = model, block, picks
        self.length = cache[0][0].shape[1]
        self.compressed = 0 if name is None else max(0, self.length - residual) // block * block
        self.layers = [self._pages(k, v, name) for k, v in cache]

    def _pages(self, k: Any, v: Any, name: str | None) -> dict[str, Any]:
        """Cut one layer's K and V [heads, tokens, dim] into compressed blocks and a tail with room for new tokens."""
        import torch

        from ...kernels import PageFormat, quantize_blocks, summarize_blocks

        heads, _, dim = k.shape
        count = -(-(self.length - self.compressed + ROOM) // self.block)
        tail = [torch.zeros(count, heads, self.block, dim, dtype=x.dtype) for x in (k, v)]
        for x, pages in zip((k, v), tail):
            flat = torch.nn.functional.pad(x[:, self.compressed :], (0, 0, 0, count * self.block))
            pages.copy_(flat[:, : count * self.block].unflatten(1, (count, self.block)).transpose(0, 1))
        layer: dict[str, Any] = dict(k=tail[0], v=tail[1], fmt=None, pages=None)
        if self.compressed and name is not None:
            blocks = [x[:, : self.compressed].unflatten(1, (-1, self.block)).transpose(0, 1) for x in (k, v)]
            layer["fmt"] = fmt = PageFormat(name, heads, self.block, dim, group=GROUP)
            layer["pages"] = torch.zeros(len(blocks[0]), fmt.layer_bytes, dtype=torch.uint8)
            ids = range(len(blocks[0]))
            quantize_blocks(blocks[0], blocks[1], ids, layer["pages"], ids, fmt)
        if self.picks is not None:
            layer["summaries"] = torch.zeros(count, heads, 2, dim, dtype=k.dtype)
            summarize_blocks(tail[0], range(count), layer["summaries"], range(count))
        return layer

    def ask(self, key: int, count: int) -> tuple[list[int], list[float]]:
        """Answer with so many tokens; what was asked before is written over."""
        token, answer, margins = key, [], []
        for i in range(count):
            best = self._step(token, self.length + i).topk(2)
            token = int(best.indices[0])
            answer.append(token)
            margins.append(float(best.values[0] - best.values[1]))
        return answer, margins

    def _step(self, token: int, position: int) -> Any:
        """Logits after one token at this position, whose K and V are kept."""
        import torch
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        model = self.model.model
        with torch.no_grad():
            hidden = model.embed_tokens(torch.tensor([[token]]))
            cos_sin = model.rotary_emb(hidden, position_ids=torch.tensor([[position]]))
            for layer, kept in zip(model.layers, self.layers):
                attention = layer.self_attn
                normed = layer.input_layernorm(hidden)
                shape = (1, 1, -1, attention.head_dim)
                q, k, v = (getattr(attention, f"{name}_proj")(normed).view(shape).transpose(1, 2) for name in "qkv")
                q, k = apply_rotary_pos_emb(q, k, *cos_sin)
                out = self._attend(kept, q[:, :, 0], k[0, :, 0], v[0, :, 0], position, attention.scaling)
                hidden = hidden + attention.o_proj(out.reshape(1, 1, -1))
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            return self.model.lm_head(model.norm(hidden))[0, 0].float()

    def _attend(self, kept: dict[str, Any], q: Any, k: Any, v: Any, position: int, scale: float) -> Any:
        """Write one token and attend with it to what the layer holds."""
        import numpy as np

        from ...kernels import mixed_attention, paged_decode

        slot, tail_len = position - self.compressed, position - self.compressed + 1
        kept["k"][slot // self.block, :, slot % self.block] = k
        kept["v"][slot // self.block, :, slot % self.block] = v
        table = np.arange(len(kept["k"]))[None]
        if self.picks is not None:
            return self._attend_selected(kept, q, table, tail_len, scale)
        if kept["fmt"] is None:
            return paged_decode(q, kept["k"], kept["v"], table, [tail_len], scale=scale)[0]
        count = self.compressed // self.block
        return mixed_attention(
            q, kept["pages"], kept["fmt"], np.arange(count)[None], [self.compressed], kept["k"], kept["v"],
            table, [tail_len], [0, 1], scale=scale,
        )[0]  # fmt: skip

    def _attend_selected(self, kept: dict[str, Any], q: Any, table: Any, length: int, scale: float) -> Any:
        """Attend to the pages whose bounds are best, with the sink's page and the newest two."""
        from ...kernels import paged_decode, score_pages, select_pages, summarize_blocks

        last = (length - 1) // self.block
        summarize_blocks(kept["k"], [last], kept["summaries"], [last], [length - last * self.block])
        scores = score_pages(q, kept["summaries"], table, [last + 1])
        chosen = select_pages(scores, [last + 1], self.picks or 0, scale=scale, keep_first=1, keep_last=2)
        lens = chosen.lengths([length], self.block)
        return paged_decode(q, kept["k"], kept["v"], chosen.table(table), lens, scale=scale)[0]
