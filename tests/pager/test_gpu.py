"""A pager over CUDA: every value read is checked, through device, host and disk, resident and streamed.

The same scenario runs on the CPU backend, so that a failure on a GPU means the GPU.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.tiers.backends import cuda_missing, get_backend

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, LAYOUT, WINDOWED, Rig

MISSING = cuda_missing()
BACKENDS = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no usable CUDA: {MISSING}")]
    ),
]


class OnHost:
    """A tensor, read and written as if it were a numpy array: each access is queued on the current stream."""

    def __init__(self, rows) -> None:
        self._tensor = torch.as_tensor(rows)

    def view(self, dtype) -> OnHost:
        return OnHost(self._tensor.view({np.float32: torch.float32}[dtype]))

    def reshape(self, *shape) -> OnHost:
        return OnHost(self._tensor.reshape(*shape))

    def __len__(self) -> int:
        return len(self._tensor)

    def _index(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        return tuple(torch.as_tensor(p, device=self._tensor.device) if isinstance(p, np.ndarray) else p for p in parts)

    def __getitem__(self, index):
        return self._tensor[self._index(index)].cpu().numpy()

    def __setitem__(self, index, value) -> None:
        self._tensor[self._index(index)] = torch.as_tensor(value, device=self._tensor.device)


class TensorRig(Rig):
    """The stand-in engine with its pool in a tensor, on whichever device."""

    def view(self, g, layer):
        layout = self.layouts[g]
        pool = torch.as_tensor(self.pager.device_rows(g)).view(torch.float32)
        return OnHost(pool.reshape(len(pool), layout.num_layers, 2, BLOCK, layout.head_dim)[:, layer])

    def _read_staged(self, lease, g, layer, staged):
        rows = torch.as_tensor(staged.rows).cpu().numpy()
        return super()._read_staged(lease, g, layer, replace(staged, rows=rows))


def ids(n: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(1000) for i in range(n)]


def finish(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    rig.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_come_back_as_they_were_from_the_host_tier(backend):
    rig = TensorRig(pages=12, host=60, backend=get_backend(backend), layouts=[LAYOUT, WINDOWED])
    sequences = [rig.start(ids(30, seed)) for seed in range(4)]
    for _ in range(3):
        for seed, seq in enumerate(sequences):
            rig.prefill(seq)
            rig.say(seq, ids(3, 50 + seed))
    assert rig.pager.counters.get("moved_blocks", direction="host_to_device") > 0
    child = rig.pager.fork(sequences[0])
    rig.say(child, [1, 2])
    rig.say(sequences[0], [3])
    finish(rig)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_larger_than_device_and_host_is_streamed(backend, tmp_path):
    rig = TensorRig(pages=8, host=14, backend=get_backend(backend), path=tmp_path / "s", staging=4, nvme_bytes="1MiB")
    seq = rig.start(ids(120))
    rig.prefill(seq)
    for turn in range(5):
        rig.say(seq, ids(2, 9 + turn))
    assert rig.pager.counters.get("moved_slices", direction="nvme_to_host", reason="stream") > 0
    finish(rig)
