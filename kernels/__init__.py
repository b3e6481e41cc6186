"""Arithmetic on pages: attention over a paged KV cache, KV writes, block copies and exact merging of partial results.

Knows tensors and nothing of tiers or pagers. Importing this package loads neither torch nor triton: a name loads torch
when it is first taken, and triton only when a CUDA tensor is handed in. Guards the residency rule from its side: a
kernel reads the pages that a block table names and nothing else, and never a token slot past a sequence's length.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunked import ChunkedAttention as ChunkedAttention
    from .chunked import beside_copies as beside_copies
    from .compressed import compressed_attention as compressed_attention
    from .compressed import mixed_attention as mixed_attention
    from .compressed import plan_pages as plan_pages
    from .conversion import dequantize_blocks as dequantize_blocks
    from .conversion import quantize_blocks as quantize_blocks
    from .cpu_step import DecodeStep as DecodeStep
    from .dispatch import SlotPlan as SlotPlan
    from .dispatch import StepPlan as StepPlan
    from .dispatch import apply_sink_logits as apply_sink_logits
    from .dispatch import block_attention as block_attention
    from .dispatch import copy_blocks as copy_blocks
    from .dispatch import gather_rows as gather_rows
    from .dispatch import merge_many as merge_many
    from .dispatch import merge_states as merge_states
    from .dispatch import paged_attention as paged_attention
    from .dispatch import paged_decode as paged_decode
    from .dispatch import paged_prefill as paged_prefill
    from .dispatch import plan_decode as plan_decode
    from .dispatch import plan_slots as plan_slots
    from .dispatch import plan_step as plan_step
    from .dispatch import scatter_rows as scatter_rows
    from .dispatch import write_kv as write_kv
    from .formats import PageFormat as PageFormat
    from .mass import page_mass as page_mass
    from .positions import turned_attention as turned_attention
    from .rope import Turns as Turns
    from .rope import plan_turns as plan_turns
    from .rope import turn_table as turn_table
    from .rounding import summarize_pages as summarize_pages
    from .rounding import widen_summaries as widen_summaries
    from .selection import Selection as Selection
    from .selection import omitted_share as omitted_share
    from .selection import score_pages as score_pages
    from .selection import select_pages as select_pages
    from .selection import summarize_blocks as summarize_blocks
    from .uploads import to_device as to_device
    from .views import layer_views as layer_views
    from .views import stacked_views as stacked_views

_HOME = {
    "ChunkedAttention": "chunked",
    "DecodeStep": "cpu_step",
    "PageFormat": "formats",
    "Selection": "selection",
    "SlotPlan": "dispatch",
    "StepPlan": "dispatch",
    "Turns": "rope",
    "apply_sink_logits": "dispatch",
    "beside_copies": "chunked",
    "block_attention": "dispatch",
    "compressed_attention": "compressed",
    "copy_blocks": "dispatch",
    "dequantize_blocks": "conversion",
    "gather_rows": "dispatch",
    "layer_views": "views",
    "merge_many": "dispatch",
    "merge_states": "dispatch",
    "mixed_attention": "compressed",
    "omitted_share": "selection",
    "page_mass": "mass",
    "paged_attention": "dispatch",
    "paged_decode": "dispatch",
    "paged_prefill": "dispatch",
    "plan_decode": "dispatch",
    "plan_pages": "compressed",
    "plan_slots": "dispatch",
    "plan_step": "dispatch",
    "plan_turns": "rope",
    "quantize_blocks": "conversion",
    "scatter_rows": "dispatch",
    "score_pages": "selection",
    "select_pages": "selection",
    "stacked_views": "views",
    "summarize_blocks": "selection",
    "to_device": "uploads",
    "turn_table": "rope",
    "turned_attention": "positions",
    "summarize_pages": "rounding",
    "widen_summaries": "rounding",
    "write_kv": "dispatch",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvtier.kernels' has no attribute {name!r}; names: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
