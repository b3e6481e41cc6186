"""What tests of the store share."""

from __future__ import annotations

import pytest

from kvtier.tiers.cpu import CpuBackend


@pytest.fixture
def backend():
    backend = CpuBackend()
    yield backend
    backend.close(5)
