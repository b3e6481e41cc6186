"""What all tests share: imports by package name only, seeds that can be repeated, marks that need hardware.

No test may fail by chance: generators start at --seed in every test, and hypothesis draws the same cases in every run.
The soak draws new ones.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [
    entry for entry in sys.path if Path(entry or ".").resolve() != Path(_ROOT)
]  # `import kernels` is not ours

_NO_CLOCK = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}  # a busy machine is no finding
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, **_NO_CLOCK)
hypothesis.settings.register_profile("new each time", **_NO_CLOCK)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the randomised tests; a failure prints it")
    parser.addoption("--slow", type=int, help="seed of a machine that is slow by chance; see slow_machine.py")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("new each time" if "soak" in (config.getoption("-m") or "") else "repeatable")
    if config.getoption("--slow") is not None:
        from .slow_machine import install

        install(config.getoption("--slow"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"kvtier: --seed {config.getoption('--seed')}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that draws and fails says how to run it again."""
    report = yield
    if report.failed and "seed" in inspect.signature(getattr(item, "function", seeded)).parameters:
        soak = "-m soak " if item.get_closest_marker("soak") else ""
        line = f"python -m pytest {soak}{item.nodeid!r} --seed {item.config.getoption('--seed')}"
        report.sections.append(("again", line))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    """Whoever draws without a generator of its own."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in (config.getoption("-m") or ""):
        skip = pytest.mark.skip(reason="soak: run with -m soak")
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(skip)
