"""What all tests share: imports by package name only, a seed that can be repeated, marks that need hardware."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(_ROOT)
]  # `import kernels` is not ours


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the randomised tests; a failure prints it")


def pytest_report_header(config: pytest.Config) -> str:
    return f"kvtier: --seed {config.getoption('--seed')}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in (config.getoption("-m") or ""):
        skip = pytest.mark.skip(reason="soak: run with -m soak")
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(skip)
