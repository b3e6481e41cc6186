"""The attention mass of a step's newest rows, for a policy that keeps what is attended to (policy = "importance").

Sampled: the row behind a prompt's end, and one decoded token of `EVERY_TOKENS` per sequence, over the pages that are resident
and in every layer that sees everything. Packed pages and selected steps are not looked at. Nothing of this runs under another
policy. Guards: what is told is about pages that the lease still pins.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..kernels import page_mass
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from .attention import LayerPages

EVERY_TOKENS = 16  # a sixteenth of half of a step's attention


class StepMass:
    """Of one lease. `spans`: those that are sampled."""

    def __init__(self, lease: Lease, spans: list[int]) -> None:
        self._lease, self._spans = lease, np.array(spans)
        self._rows = (lease.cu_q[1:][self._spans] - 1).tolist()
        self._sums: dict[int, Tensor] = {}

    @classmethod
    def of(cls, lease: Lease, spans: list[Span], reads: list[tuple[int, int]]) -> StepMass | None:
        """None where no span of the step is sampled."""
        if lease.is_selected or lease.is_write_only:
            return None
        at = [i for i, _ in reads if spans[i].end - spans[i].start > 1 or not spans[i].end % EVERY_TOKENS]
        return cls(lease, at) if at else None

    def note(self, pages: LayerPages, q: Tensor, scale: float, softcap: float | None) -> None:
        """What a layer's queries, q [T, Hq, D] of all rows, give to the pages that it reads."""
        if pages.packed is not None or pages.heads is not None or pages.shape.window is not None:
            return
        held = self._lease.groups[pages.group]
        tables, lengths = held.tables[self._spans], held.kv_lens[self._spans]
        mass = page_mass(q[self._rows], pages.k, tables, lengths, scale=scale, softcap=softcap)
        self._sums[pages.group] = mass if pages.group not in self._sums else self._sums[pages.group] + mass

    def tell(self, pager: Pager) -> None:
        """The lease is still held."""
        for group, mass in self._sums.items():
            for span, row in zip(self._spans.tolist(), mass.cpu().numpy(), strict=True):
                pager.note_mass(self._lease, group, span, row)
