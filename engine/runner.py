"""ModelRunner: one forward pass of an unmodified Hugging Face decoder over a lease. Knows spans, nothing of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import to_device
from ..pager.lease import Lease, Span
from ..pager.pager import Pager
from ..tiers.errors import ConfigError
from . import attention
from .attention import STEP, Bound, Step, layers_of
from .hf import ModelSpec
from .mass import StepMass
from .modes import Parts

Progress = Callable[[int, int], None]


class ModelRunner:
    """A model whose attention reads the pager's pages from `__init__` until `close`."""

    def __init__(self, model: Any, spec: ModelSpec, pager: Pager) -> None:
        self.model, self.spec, self.pager = model, spec, pager
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        # for steps of which no logits are read
        self._first_row = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._layers = layers_of(pager, spec, self._dtype)
        self._bound: Bound = {}
        if (pages := self._layers[0][0].k.device) != self._device:
            raise ConfigError(
                f"the model is on {str(self._device)!r}, its pages on {str(pages)!r}; with several GPUs, show the process "
                "one of them (CUDA_VISIBLE_DEVICES)"
            )
        attention.install(model)

    @torch.inference_mode()
    def forward(
        self, lease: Lease, spans: list[Span], reads: list[tuple[int, int]], parts: Parts | None = None
    ) -> Tensor:
        """Logits of the last rows of some spans. reads: (span index, number of rows) -> float [sum of rows, vocab].

        Raises: UnpackableError for values that the device tier's format cannot hold; the lease must not be committed.
        """
        pager = self.pager
        tokens = [token for s in spans for token in pager.token_ids(s.seq, s.start, s.end)]
        both = np.array([tokens, [at for s in spans for at in range(s.start, s.end)]], np.int64)
        input_ids, positions = to_device(both, self._device).split(1)
        step = Step(lease, self.spec, self._layers, pager.block_size, self._dtype, reads, parts, self._bound)
        step.mass = StepMass.of(lease, spans, reads) if pager.weighs_mass else None
        keep = 0 if step.reads_all else step.rows_on(self._device) if reads else self._first_row  # 0 means all
        token = STEP.set(step)
        try:
            out = self.model(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=None,
                past_key_values=None,
                use_cache=False,
                logits_to_keep=keep,
            )
        finally:
            STEP.reset(token)
        step.check()
        if step.mass is not None:
            step.mass.tell(pager)
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
                step = Step(lease, self.spec, self._layers, self.pager.block_size, self._dtype, [])
                for parts, (k, v) in zip(self._layers, cache, strict=True):
                    for pages in parts:
                        new = (t if pages.heads is None else t[pages.heads] for t in (k, v))
                        step.write(pages, *(t[:, start:end].transpose(0, 1) for t in new))
                step.check()
                lease.commit()
            if progress is not None:
                progress(end, total)

    def close(self) -> None:
        """Give the model its own attention back."""
        attention.uninstall(self.model)
