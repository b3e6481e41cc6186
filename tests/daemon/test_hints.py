"""Hints over the protocol: what one client gives up leaves the daemon's tiers first, and what another refers to stays."""

from __future__ import annotations

import numpy as np
import pytest

from ..pager.harness import LAYOUT
from .running import Pagerd, wait_for
from .test_clients import all_shared, client

SIZE = LAYOUT.block_bytes
OVER, KEPT = list(range(1000, 1032)), list(range(2000, 2032))


@pytest.fixture
def daemon(tmp_path):
    with Pagerd(tmp_path, host_bytes=32 * SIZE) as running:
        yield running


def stored(rig, token_ids: list[int]) -> int:
    seq = rig.start(token_ids)
    rig.prefill(seq)
    wait_for(lambda: all_shared(rig))
    return seq


def crowd(rig, chains: int) -> None:
    for start in range(10_000, 10_000 + 100 * chains, 100):
        rig.pager.finish(stored(rig, list(range(start, start + 32))))


def held_by_daemon(rig, token_ids: list[int]) -> int:
    """Asked of the daemon itself: the client may know of a block longer."""
    chain = rig.pager._core.chain("default")
    keys: list[bytes] = []
    chain.extend(keys, token_ids)
    found = rig.pager._remote._tier.attachment.lookup(keys, prefix=True, hold=False)
    return int(np.count_nonzero(found[0]))


def test_a_released_chain_leaves_the_daemon_first(daemon):
    rig = client(daemon, pages=12)
    rig.pager.finish(stored(rig, KEPT))
    rig.pager.release(stored(rig, OVER))
    crowd(rig, 3)
    wait_for(lambda: held_by_daemon(rig, OVER) < 8)
    assert held_by_daemon(rig, KEPT) == 8
    rig.close()


def test_what_another_client_refers_to_is_not_given_up(daemon):
    first, second = client(daemon, pages=12), client(daemon, pages=12)
    seq = stored(first, OVER)
    other = second.start([*OVER, 1])
    second.prefill(other)
    wait_for(lambda: all_shared(second))
    first.pager.release(seq)
    crowd(first, 4)
    assert held_by_daemon(first, OVER) == 8
    assert not first.wrong and not second.wrong
    first.close()
    second.close()


def test_a_daemon_without_the_feature_is_told_nothing(daemon, monkeypatch):
    rig = client(daemon, pages=12)
    attachment = rig.pager._remote._tier.attachment
    said = []
    monkeypatch.setattr(attachment.connection, "call_patiently", lambda *a, **k: said.append(a))
    attachment.connection.welcome.features.remove("hints")
    attachment.hint([b"\1" * 32], "release")
    assert said == []
    monkeypatch.undo()
    rig.close()


def test_an_unknown_hint_changes_nothing(daemon):
    rig = client(daemon, pages=12)
    rig.pager.finish(stored(rig, KEPT))
    attachment = rig.pager._remote._tier.attachment
    attachment.hint(rig.pager._core.chain("default").extend(keys := [], KEPT) or keys, "bake")
    assert held_by_daemon(rig, KEPT) == 8
    rig.close()
