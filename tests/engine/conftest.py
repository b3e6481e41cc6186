"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .prefix_rig import Caches


@pytest.fixture
def caches(tmp_path) -> Iterator[Caches]:
    from .prefix_rig import Caches

    made = Caches(tmp_path / "store")
    yield made
    made.close()
