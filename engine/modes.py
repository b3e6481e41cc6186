"""How the requests of a step attend: which of them run together, and what the runner needs for those that see a part.

Requests with full attention share a step as ever. Those with a window of their own, and decodes that select, run in steps
of their own kind, because a lease is of one kind. Guards: a sequence whose K/V become approximate is branched before the
step that makes them so, so no exact request ever finds them; a step selects only where every whole block is summarised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from ..tiers.errors import ConfigError
from .attending import Attention, SelectionReport
from .hf import ModelSpec
from .selected import Picks, SelectedStep
from .summaries import Summarizer, SummaryBook

if TYPE_CHECKING:
    from .request import Request

MAX_SELECTING_ROWS = 16  # a turn of more new tokens reads everything, as a prompt does
Work = list[tuple["Request", int]]
EXACT = Attention()


@dataclass(slots=True)
class Parts:
    """What the attention of one step needs beyond its lease."""

    window: int | None = None  # of full-attention layers
    sinks: int = 0
    selected: SelectedStep | None = None
    summarizer: Summarizer | None = None


class Modes:
    """Of one engine."""

    def __init__(self, pager: Pager, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._pager, self._spec, self._dtype = pager, spec, dtype
        self._book = SummaryBook(pager, dtype) if pager.can_select else None
        self._picks = Picks()

    def check(self, attention: Attention) -> None:
        """Raises ConfigError for what this engine cannot do."""
        if attention.kind == "select" and self._book is None:
            raise ConfigError(
                "attention='select' needs device memory for key summaries and picked slices: open the engine with "
                "selection_bytes (an eighth of device_bytes, say) or with attention='select'; models whose layers all "
                "have windows have nothing to select"
            )
        size = self._pager.block_size
        if attention.kind == "window" and attention.sinks > size and any(x.is_packed for x in self._pager.layouts):
            raise ConfigError(
                f"attention: sinks={attention.sinks} on packed pages; they must lie within one block of {size} tokens"
            )

    def split(self, work: Work) -> list[tuple[Attention, Work]]:
        """Requests that can share a lease, in order. `full` comes with those that would select but read all this time."""
        if all(request.params.attention is None or request.params.attention.is_exact for request, _ in work):
            return [(EXACT, work)] if work else []
        parts: dict[Attention, Work] = {}
        for request, count in work:
            attention = request.params.attention or EXACT
            kind = attention
            if attention.kind == "select":
                kind = Attention("select") if self._selects(request, count, attention) else EXACT
            parts.setdefault(kind, []).append((request, count))
        return sorted(parts.items(), key=lambda part: part[0].kind != "select")  # before others claim summaries

    def _selects(self, request: Request, count: int, attention: Attention) -> bool:
        """Whether this step of the request leaves something out, and may."""
        pager, size, seq = self._pager, self._pager.block_size, request.seq
        assert self._book is not None
        start = pager.num_computed(seq)
        is_last = start + count == pager.num_tokens(seq)
        num_blocks = start // size
        if not is_last or count > MAX_SELECTING_ROWS or num_blocks < attention.pages:
            return False
        return bool((self._book.rows_of(seq, num_blocks) >= 0).all())

    def spans(self, kind: Attention, spans: list[Span]) -> list[Span]:
        """The spans as this kind of step leases them. Branches sequences that are about to see only a part."""
        if kind.kind == "window":
            for span in spans:
                if span.end > kind.window + kind.sinks:
                    self._pager.branch(span.seq)
            return [Span(s.seq, s.start, s.end, kind.window, kind.sinks) for s in spans]
        if kind.kind == "select":
            for span in spans:
                self._pager.branch(span.seq)
        return spans

    def begin(self, kind: Attention, lease: Lease, work: Work, reads: Sequence[tuple[int, int]]) -> Parts:
        """What the step's attention needs."""
        if kind.kind == "window":
            return Parts(kind.window, kind.sinks)
        if self._book is None:
            return Parts()
        self._book.begin()
        which = [i for i, (request, _) in enumerate(work) if _wants_summaries(request)]
        parts = Parts()
        if kind.kind == "select":
            asked = [(request.params.attention or EXACT, _report_of(request)) for request, _ in work]
            parts.selected = SelectedStep(lease, self._book, self._picks, asked, self._dtype)
        else:
            for index in which:
                _report_of(work[index][0]).full_steps += 1
        if which:
            parts.summarizer = Summarizer(self._book, lease, lease.spans, which, bool(reads))
        return parts

    def done(self) -> None:
        """The step is committed."""
        if self._book is not None:
            self._book.publish()


def _wants_summaries(request: Request) -> bool:
    return request.params.attention is not None and request.params.attention.kind == "select"


def _report_of(request: Request) -> SelectionReport:
    if request.output.selection is None:
        request.output.selection = SelectionReport()
    return request.output.selection
