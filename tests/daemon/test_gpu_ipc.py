"""A pager whose pages a daemon in a process of its own copies: every value that it reads is checked.

The same scenario runs on the CPU backend, so that a failure on a GPU means the GPU.
"""

from __future__ import annotations

import pytest

from kvtier.tiers.backends import cuda_missing, get_backend

from ..pager.harness import LAYOUT, WINDOWED
from ..pager.test_gpu import TensorRig, ids
from .running import Pagerd

MISSING = cuda_missing()
BACKENDS = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no usable CUDA: {MISSING}")]
    ),
]
BLOCK_BYTES = LAYOUT.block_bytes + WINDOWED.block_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_daemon_copies_into_pages_and_out_of_them(backend, tmp_path):
    with Pagerd(tmp_path, host_bytes=400 * BLOCK_BYTES, options=("--no-prefault", "--allow-ipc")) as daemon:
        options = {"daemon": daemon.address, "layouts": [LAYOUT, WINDOWED], "pages": 14, "transfer": "ipc"}
        rig = TensorRig(backend=get_backend(backend), **options)
        told = rig.pager._core.nvme.status()
        assert told["copies"] == "daemon", told["transfer_notice"]
        sequences = [rig.start(ids(30, seed)) for seed in range(4)]
        for _ in range(3):
            for seed, seq in enumerate(sequences):
                rig.prefill(seq)
                rig.say(seq, ids(3, 50 + seed))
        assert rig.pager.counters.get("moved_blocks", direction="host_to_device") > 0
        assert rig.pager.counters.get("moved_blocks", direction="device_to_host") > 0
        rig.settle()
        rig.pager.check_integrity()
        assert not rig.wrong
        rig.close()
        assert daemon.status()["daemon"]["pinned_slots"] == 0
        assert daemon.stop() == 0
