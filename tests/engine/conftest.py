"""Fixtures of the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ..books import agree, watched

if TYPE_CHECKING:
    from .prefix_rig import Caches

__all__ = ["agree", "caches", "watched"]  # fixtures, of which every test has the first and the last


@pytest.fixture
def caches(tmp_path) -> Iterator[Caches]:
    from .prefix_rig import Caches

    made = Caches(tmp_path / "store")
    yield made
    made.close()
