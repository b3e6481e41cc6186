"""What warming says is durable is, whoever stored it and however the first try went."""

from __future__ import annotations

import shutil

import pytest

from kvtier.tiers.errors import TierUnavailableError

from .prefix_rig import DOCUMENT, Caches
from .test_families import tiny


def test_what_is_stored_already_is_durable_too_when_it_was_warmed(tmp_path, monkeypatch):
    """It may lie in memory alone."""
    caches, model = Caches(tmp_path / "s"), tiny("llama")
    cache = caches(model)

    def refuse(seqs, **_):
        raise TierUnavailableError("the disk refuses")

    with monkeypatch.context() as refusing:
        refusing.setattr(cache.pager, "persist", refuse)
        with pytest.raises(TierUnavailableError):
            cache.warm([DOCUMENT])
    assert cache.match(DOCUMENT) == len(DOCUMENT)
    assert cache.warm([DOCUMENT]).computed_tokens == 0
    with pytest.raises(TierUnavailableError):  # of the first try, for whoever stored
        cache.flush()
    cache.pager._core.nvme._writer.wait(60)
    shutil.copytree(tmp_path / "s", tmp_path / "killed", ignore=shutil.ignore_patterns("*.sock"))
    caches.close()
    killed = Caches(tmp_path / "killed")
    assert killed(model).match(DOCUMENT) == len(DOCUMENT)
    killed.close()


def test_warming_hears_of_its_own_failures_alone(tmp_path, monkeypatch):
    caches, model = Caches(tmp_path / "s"), tiny("llama")
    cache = caches(model)
    with monkeypatch.context() as refusing:
        refusing.setattr(cache.pager, "persist", lambda *_, **__: (_ for _ in ()).throw(TierUnavailableError("once")))
        with pytest.raises(TierUnavailableError):
            cache.warm([DOCUMENT[:90]])
    assert cache.warm([DOCUMENT]).computed_tokens > 0
    with pytest.raises(TierUnavailableError):
        cache.flush()
    caches.close()
