"""One server for most tests; each test leaves it as it found it."""

from __future__ import annotations

import pytest

from ..books import agree, watched
from ..tools.test_chat import make_tokenizer
from .running import serving, tiny_model

__all__ = ["agree", "model", "server", "shared_server", "tokenizer", "watched"]  # fixtures


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(scope="module")
def shared_server(model, tokenizer):
    with serving(model, tokenizer) as running:
        yield running


@pytest.fixture
def server(shared_server):
    yield shared_server
    shared_server.check_end()
