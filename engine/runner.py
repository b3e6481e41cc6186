"""ModelRunner: one forward pass of an unmodified Hugging Face decoder over a lease. Knows spans, nothing of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import write_kv
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from . import attention
from .attention import STEP, Step, layers_of
from .hf import ModelSpec

Progress = Callable[[int, int], None]


class ModelRunner:
    """A model whose attention reads the pager's pages from `__init__` until `close`."""

    def __init__(self, model: Any, spec: ModelSpec, pager: Pager) -> None:
        self.model, self.spec, self.pager = model, spec, pager
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._layers = layers_of(pager, spec, self._dtype)
        attention.install(model)

    @torch.inference_mode()
    def forward(self, lease: Lease, spans: list[Span], reads: list[tuple[int, int]]) -> Tensor:
        """Logits of the last rows of some spans. reads: (span index, number of rows) -> float [sum of rows, vocab]."""
        pager = self.pager
        tokens = torch.tensor([t for s in spans for t in pager.token_ids(s.seq, s.start, s.end)])[None]
        positions = torch.cat([torch.arange(s.start, s.end) for s in spans])[None]
        step = Step(lease, self.spec, self._layers, pager.block_size, self._dtype, reads)
        keep = step.rows if reads else torch.tensor([0])
        token = STEP.set(step)
        try:
            out = self.model(
                input_ids=tokens.to(self._device),
                position_ids=positions.to(self._device),
                attention_mask=None,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=keep.to(self._device),
            )
        finally:
            STEP.reset(token)
        logits: Tensor = out.logits[0]
        return logits

    @torch.inference_mode()
    def inject(
        self, seq: int, cache: Sequence[tuple[Tensor, Tensor]], chunk: int, progress: Progress | None = None
    ) -> None:
        """Write the K/V of the sequence's uncomputed tokens from a prebuilt cache instead of computing them.

        Shapes: per layer K [kv_heads, tokens, head_dim], V [kv_heads, tokens, value_dim], over all tokens of the sequence.
        """
        total = int(cache[0][0].shape[1])
        while (start := self.pager.num_computed(seq)) < total:
            end = min(total, start + chunk)
            with self.pager.lease([Span(seq, start, end)]) as lease:
                for pages, (k, v) in zip(self._layers, cache, strict=True):
                    new_k, new_v = (t[:, start:end].transpose(0, 1) for t in (k, v))
                    write_kv(new_k, new_v, pages.k, pages.v, lease.slots[pages.group])
                lease.commit()
            if progress is not None:
                progress(end, total)

    def close(self) -> None:
        """Give the model its own attention back."""
        attention.uninstall(self.model)
