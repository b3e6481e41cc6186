"""Two engines and one prefix-cache worker, in processes of their own, share a prefix through one daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .. import warm
from .running import Pagerd

PROGRAM = Path(__file__).with_name("sharer.py")
PROMPT = 1025
STARTS_S = 280.0  # torch and a model three times: on a busy machine minutes; a bound on hanging, not an aim


def run(kind: str, daemon: Pagerd) -> dict[str, Any]:
    done = warm.heavy.run(PROGRAM, kind, daemon.address, timeout=STARTS_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(3 * STARTS_S + 60)
def test_the_second_and_third_process_compute_nothing_that_is_shared(tmp_path):
    with Pagerd(tmp_path, host_bytes=16 << 20, nvme_bytes=64 << 20) as daemon:
        first, second, third = (run(kind, daemon) for kind in ("engine", "engine", "worker"))
        assert [part["right"] for part in (first, second, third)] == [4, 4, 4]
        size = first["block_size"]
        assert second["block_size"] == third["block_size"] == size
        assert first["computed"][0] == PROMPT
        shared = (PROMPT - 1) // size * size  # the last token is computed for its logits
        for later in (second, third):
            assert set(later["cached"]) == {shared} and set(later["computed"]) == {PROMPT - shared}
        assert daemon.status()["daemon"]["pinned_slots"] == 0
