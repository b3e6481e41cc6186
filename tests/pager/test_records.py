"""An encrypted store under the whole pager: sessions and prefixes survive a restart with the secret, and only with it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from kvtier.pager.config import PagerConfig
from kvtier.tiers.errors import ConfigError, UnknownSessionError

sys.path.insert(0, str(Path(__file__).parent))
from harness import BLOCK, Rig

SECRET, OTHER = "11" * 32, "22" * 32
TOKENS = [70000 + i for i in range(5 * BLOCK + 2)]  # as four bytes each nothing else in a journal looks like them


def make_rig(tmp_path, secret: str = SECRET, codec: str | None = "aes", seed: int = 0) -> Rig:
    return Rig(
        seed,
        pages=10,
        host=24,
        path=tmp_path / "s",
        nvme_bytes=1 << 20,
        nvme_codec=codec,
        namespace_secrets={"mine": secret},
    )


def park(rig: Rig, session_id: str = "a telling name") -> None:
    seq = rig.start(TOKENS, "mine")
    rig.prefill(seq)
    rig.pager.park(session_id, seq, {"note": "what was said"})


def finish(rig: Rig) -> None:
    rig.settle()
    rig.pager.check_integrity()
    assert rig.wrong == []
    rig.close()


@pytest.mark.parametrize("codec", ["aes", "zstd+aes"])
def test_a_session_goes_on_after_a_restart_and_the_disk_tells_nothing_of_it(tmp_path, codec):
    rig = make_rig(tmp_path, codec=codec)
    park(rig)
    finish(rig)
    raw = b"".join(file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file())
    for word in (np.array(TOKENS, "<u4").tobytes()[:16], b"telling name", b"what was said", b"mine"):
        assert word not in raw
    again = make_rig(tmp_path, codec=None, seed=1)
    seq, parked = again.pager.resume("a telling name", "mine")
    assert (parked.token_ids, parked.extra) == (TOKENS, {"note": "what was said"})
    again.say(seq, [1])
    assert again.pager.counters.get("computed_tokens") == 1
    again.pager.park("a telling name", seq)
    again.pager.forget("a telling name")
    finish(again)
    last = make_rig(tmp_path, codec=None)
    assert last.pager.sessions() == {}
    finish(last)


def test_in_a_store_that_is_not_encrypted_the_same_words_are_on_disk(tmp_path):
    """Else the test above would pass for a session that was never stored."""
    rig = make_rig(tmp_path, codec="none")
    park(rig)
    finish(rig)
    raw = b"".join(file.read_bytes() for file in (tmp_path / "s").rglob("*") if file.is_file())
    assert all(word in raw for word in (np.array(TOKENS, "<u4").tobytes()[:16], b"telling name", b"what was said"))


def test_another_secret_finds_neither_session_nor_block_and_leaves_both(tmp_path, caplog):
    rig = make_rig(tmp_path)
    park(rig)
    finish(rig)
    caplog.set_level(logging.ERROR)
    other = make_rig(tmp_path, OTHER, None)
    assert "event=sessions_do_not_open count=1" in caplog.text and "telling" not in caplog.text
    with pytest.raises(UnknownSessionError):
        other.pager.resume("a telling name", "mine")
    assert other.pager.match(TOKENS, "mine").tokens == 0
    finish(other)
    again = make_rig(tmp_path, codec=None)
    assert again.pager.resume("a telling name", "mine")[1].num_computed == len(TOKENS)
    again.close()


def test_a_namespace_without_a_secret_is_refused_where_it_begins(tmp_path):
    rig = make_rig(tmp_path)
    with pytest.raises(
        ConfigError, match=r"store is encrypted and namespace 'theirs' has no secret .*namespace_secrets"
    ):
        rig.pager.begin("theirs")
    rig.pager.begin("mine--salted")
    rig.close()
    short = make_rig(tmp_path, "11" * 8, None)
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        short.pager.begin("mine")
    short.close()


def test_codecs_that_would_show_half_are_refused():
    config = PagerConfig("1MiB", "1MiB", nvme_path="s", nvme_codec={"full": "aes"})
    with pytest.raises(ConfigError, match="encrypt all layer groups of a store, or none"):
        config.validate().codecs(("full", "window"))
